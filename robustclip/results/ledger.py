"""One row per evaluated sample, appended batch by batch, so that a killed test resumes."""

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
    "outside": "how far the tower's pixels leave a normalised image's range, as a share of it; empty: not probed",
    "repeat": "largest difference of logits when the image runs again in another batch; empty: not probed",
}
ATTACK_COLUMNS = {
    "by": "attack that broke the sample; `clean`: wrong without one; empty: robust",
    "prediction": "class predicted for the attacked image",
    "loss": "its cross-entropy",
    "steps": "gradients that the attack took",
    "dead": "of these, gradients that were zero in every pixel",
    "distance": "of the attacked image from the clean one, in the attack's norm",
    "excess": "by how much it leaves ball or box",
    "nans": "evaluations with a logit or gradient that is not finite",
    "wider": "the same attack in a larger ball, of half the pixel range for robust samples: 1 broke it, 0 did not; "
    "empty: not probed",
    "longer": "the same attack with more steps: as above",
}
TIME_COLUMN = "seconds"
BATCH_END = b"\n\n"  # an empty line; a batch without it is evaluated again, in the same company

Row = Mapping[str, object]
Tidy = Callable[[list[dict[str, str]]], list[dict[str, str]]]
"""Function from all rows of a ledger to those that are kept."""
write_aside, lock, sweep = persistence.atomic_write, persistence.lock, persistence.sweep


def columns(attacks: Sequence[str]) -> list[str]:
    """Header of a task's ledger; a column of an attack is named ``<attack>.<column>``, the time comes last."""
    of_attacks = [f"{attack}.{column}" for attack in attacks for column in ATTACK_COLUMNS]
    return [*SAMPLE_COLUMNS, *of_attacks, TIME_COLUMN]


class Ledger:
    """The rows of one task or table, of one process.

    Args:
        path: CSV file; it may exist, and hold a last batch that was cut off.
        header: names of the columns.

    Raises:
        ValueError: the file has another header.
    """

    def __init__(self, path: Path, header: Sequence[str]) -> None:
        self.path, self.header = path, list(header)
        self._log = persistence.AppendLog(path, _lines([self.header]), BATCH_END)
        self.rows = read(path, self.header)

    def append(self, rows: Sequence[Row]) -> None:
        """Adds a batch in one write that is on the disk at the return.

        Raises:
            OSError: with the path, for example on a full disk.
        """
        self._log.append(_lines([*([row.get(name, "") for name in self.header] for row in rows), []]))


def read(path: Path, header: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Rows of a ledger.

    Args:
        path: of the CSV file.
        header: that it must have; None takes any.

    Raises:
        ValueError: no such file, another header, or a row of another length.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found, *lines = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no ledger of `robustclip test`: {error}") from error
    if header is not None and found != list(header):
        remedy = "another version wrote it; start a test of another name"
        raise ValueError(f"ledger {path} has the columns {','.join(found)[:80]}..., {remedy}")
    for number, line in enumerate(lines, start=2):
        if line and len(line) != len(found):
            raise ValueError(f"ledger {path} line {number}: expected {len(found)} values, found {len(line)}")
    return [dict(zip(found, line, strict=True)) for line in lines if line]


def gather(parts: Iterable[Path], target: Path, header: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of all processes in the order of the ids, once each.

    Args:
        parts: ledgers of the processes.
        target: merged ledger of an earlier start; it need not exist.
        header: columns that all must have.
    """
    paths = [*sorted(parts), *([target] if target.exists() else [])]
    rows = {int(row["id"]): row for path in paths for row in read(path, header)}
    return [rows[number] for number in sorted(rows)]


def merge(parts: Iterable[Path], target: Path, header: Sequence[str], tidy: Tidy | None = None) -> list[dict[str, str]]:
    """Join the ledgers of all processes into one file, and return its rows in the order of the ids.

    Args:
        parts: ledgers of the processes.
        target: file to write, with the rows that it has already.
        header: columns that all must have.
        tidy: function from all rows to those that are kept; None keeps them as they are.
    """
    ordered = gather(parts, target, header)
    ordered = ordered if tidy is None else tidy(ordered)
    write_aside(target, _lines([list(header), *([row[name] for name in header] for row in ordered)]))
    return ordered


def _lines(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
