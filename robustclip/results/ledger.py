"""Ledgers: CSV files with one row per evaluated sample, appended batch by batch, so that a killed test resumes."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from robustclip import persistence

SAMPLE_COLUMNS = {
    "id": "sample id within the data set",
    "label": "its class number",
    "pixels": "hash of the clean image's pixels; empty: the method took embeddings",
    "clean": "class predicted for the clean image",
    "clean_loss": "cross-entropy of the clean image",
    "largest_logit": "largest absolute logit of the clean image",
    "logit_sum": "sum of the logits of the clean image",
    "least_logit": "smallest logit of the clean image",
    "outside": "largest distance of a pixel from [0, 1] at the input of the image tower; empty: not probed",
    "repeat": "largest difference of logits when the image runs again in another batch; empty: not probed",
    "faithful": "1 if the gradient predicts the change of the loss, else 0; empty: not probed, or there is neither",
    "regrad": "relative difference of two gradients at one point; empty: not probed",
    "spread": "squared sum of the gradient's absolute values over their number and sum of squares; empty: not probed",
    "steady": "least over largest size of the gradient within one step of the attack; empty: not probed",
    "rise": "rise of the margin an eighth of a grey level along the gradient, over the predicted; empty: not probed",
    "random": "1 if a forward and a backward pass draw from a global random generator, else 0; empty: not probed",
    "autograd": "number of calls that compute gradients during one answer; empty: not probed",
    "state": "largest difference of logits after other images were shown; inf: a tensor changed; empty: not probed",
    "leak": "largest difference of logits when the test step is given other labels; empty: not probed",
}
ATTACK_COLUMNS = {
    "by": "member of the attack that succeeded; `clean`: misclassified without attack; empty: robust",
    "prediction": "class predicted for the attacked image",
    "loss": "cross-entropy of the attacked image",
    "steps": "number of gradients that the attack computed",
    "dead": "number of these gradients that were zero in every pixel",
    "distance": "distance of the attacked image from the clean one, in the attack's norm",
    "excess": "distance of the attacked image from the perturbation set and the valid pixel range",
    "nans": "number of evaluations with a logit or gradient that is not finite",
    "exact": "number of evaluations in fp32 on which the verdict rests: those of an attack in fp32, or of a success",
    "again": "difference of the attacked image's loss when it is computed again in fp32; empty: not probed",
    "wider": "1 if the attack succeeds with a larger radius, for robust samples half the pixel range, else 0; "
    "empty: not probed",
    "longer": "1 if the attack succeeds with more steps, else 0; empty: not probed",
    "other": "1 if an attack with another loss and another search succeeds on a robust sample, else 0; empty: not "
    "probed",
    "transfer": "1 if an image made on the model without its defence succeeds on a robust sample, else 0; empty: not "
    "probed",
    "borrowed": "1 if an attack succeeds with the gradient of the model without its defence, or of rounded or nearby "
    "images, where `other` failed, else 0; empty: not probed",
}
# Further columns of methods with a test-time defence. The others are about the method with its defence.
DEFENDED_SAMPLE_COLUMNS = {
    "bare": "class predicted for the clean image without the defence",
    "bare_seconds": "seconds of one answer without the defence",
    "defended_seconds": "seconds of one answer with the defence",
    "draws": "largest difference of logits between two draws of the defence; empty: not probed",
}
DEFENDED_COLUMNS = {
    "undefended": "member that succeeded on the method without the defence; `clean`: misclassified without attack",
    "static": "member whose images of the undefended method succeed when they are replayed; `clean` as above",
    "replayed": "hash of the attacked image of the method without the defence, which is replayed",
    "share": "share of the judging draws of a random defence that classify the attacked image correctly",
    "own": "1 if the defence's own gradient succeeds on a sample that replayed images misclassify, else 0; empty: not "
    "probed",
}
TIME_COLUMN = "seconds"
BATCH_END = b"\n\n"  # an empty line; a batch without it is evaluated again as a whole

Row = Mapping[str, object]
Tidy = Callable[[list[dict[str, str]]], list[dict[str, str]]]
"""Function from all rows of a ledger to the rows to keep."""


def columns(attacks: Sequence[str], *, is_defended: bool = False) -> list[str]:
    """Returns the header of a task's ledger, in which columns of an attack are named ``<attack>.<column>``.

    Args:
        attacks: names of the attacks.
        is_defended: whether the method has a test-time defence.
    """
    of_samples = [*SAMPLE_COLUMNS, *(DEFENDED_SAMPLE_COLUMNS if is_defended else ())]
    names = [*ATTACK_COLUMNS, *(DEFENDED_COLUMNS if is_defended else ())]
    return [*of_samples, *(f"{attack}.{column}" for attack in attacks for column in names), TIME_COLUMN]


class Ledger:
    """The rows of one task or table in one process.

    Args:
        path: CSV file; an existing file may end in a half-written batch, which is removed.
        header: names of the columns.

    Raises:
        ValueError: the file has another header.
    """

    def __init__(self, path: Path, header: Sequence[str]) -> None:
        self.path, self.header = path, list(header)
        self._log = persistence.AppendLog(path, _lines([self.header]), BATCH_END)
        self.rows = read(path, self.header)

    def append(self, rows: Sequence[Row]) -> None:
        """Adds a batch in one write, and returns when it is on the disk.

        Raises:
            OSError: the disk is full, for example; the message has the path.
        """
        self._log.append(_lines([*([row.get(name, "") for name in self.header] for row in rows), []]))


def read(path: Path, header: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Reads the rows of a ledger.

    Args:
        path: the CSV file.
        header: required columns; None accepts any.

    Raises:
        ValueError: no such file, another header, or a row of another length.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            columns_read, *lines = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no ledger of `robustclip test`: {error}") from error
    if header is not None and columns_read != list(header):
        remedy = "another version wrote it; start a test of another name"
        raise ValueError(f"ledger {path} has the columns {','.join(columns_read)[:80]}..., {remedy}")
    for number, line in enumerate(lines, start=2):
        if line and len(line) != len(columns_read):
            raise ValueError(f"ledger {path} line {number}: expected {len(columns_read)} values, found {len(line)}")
    return [dict(zip(columns_read, line, strict=True)) for line in lines if line]


def header(path: Path) -> list[str]:
    """Reads the names of the columns of a ledger.

    Raises:
        ValueError: no such file, or an empty one.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file))
    except (OSError, ValueError, csv.Error, StopIteration) as error:
        raise ValueError(f"{path} is no ledger of `robustclip test`: {error}") from error


def gather(parts: Iterable[Path], target: Path, header: Sequence[str]) -> list[dict[str, str]]:
    """Reads the rows of all processes in the order of the ids, once each.

    Args:
        parts: ledgers of the processes.
        target: merged ledger of an earlier start; it may be absent.
        header: required columns.
    """
    paths = [*sorted(parts), *([target] if target.exists() else [])]
    rows = {int(row["id"]): row for path in paths for row in read(path, header)}
    return [rows[number] for number in sorted(rows)]


def merge(parts: Iterable[Path], target: Path, header: Sequence[str], tidy: Tidy | None = None) -> list[dict[str, str]]:
    """Joins the ledgers of all processes into one file, and returns its rows in the order of the ids.

    Args:
        parts: ledgers of the processes.
        target: file to write; rows that it has already are kept.
        header: required columns.
        tidy: function from all rows to the rows to keep; None keeps all.
    """
    ordered = gather(parts, target, header)
    ordered = ordered if tidy is None else tidy(ordered)
    write(target, header, ordered)
    return ordered


def write(path: Path, header: Sequence[str], rows: Iterable[Row]) -> None:
    """Writes a whole ledger.

    Args:
        path: CSV file.
        header: names of the columns.
        rows: rows in the order of the ids.
    """
    persistence.atomic_write(path, _lines([list(header), *([row[name] for name in header] for row in rows)]))


def _lines(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
