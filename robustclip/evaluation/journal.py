"""Keeps the ledgers of a running test: the finished samples, and the rows of every batch."""

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, distributed

from robustclip.attacks import Member
from robustclip.attacks.perturbation_set import distance
from robustclip.attacks.pixel_units import BOX_TOLERANCE
from robustclip.attacks.sample_losses import cross_entropy
from robustclip.evaluation.detection_summary import JOINT
from robustclip.evaluation.engine import ROBUST, WRONG, Verdict
from robustclip.results import ledger
from robustclip.results.adversarial_examples import SUFFIX, Example, save
from robustclip.results.run import LEDGERS, PARTS
from robustclip.types import Batch

Members = Mapping[tuple[str, str], Sequence[Member]]
Row = dict[str, object]


class Journal:
    """The ledgers of a running evaluation: one per task, and one per table of a section of the result.

    All processes must create it together.

    Args:
        trainer: trainer of the evaluation.
        headers: columns of every ledger by its name; the first column is ``id``.
        folder: folder of the test, with the files of its earlier starts; None keeps the rows in memory alone.

    Attributes:
        earlier: rows of earlier starts by the name of the ledger.
    """

    def __init__(self, trainer: Trainer, headers: Mapping[str, Sequence[str]], folder: Path | None = None) -> None:
        self._trainer, self.headers, self.folder = trainer, headers, folder
        self.earlier: dict[str, list[dict[str, str]]] = {name: [] for name in headers}
        self._ledgers: dict[str, ledger.Ledger | _InMemory] = {name: _InMemory(headers[name]) for name in headers}
        if folder is not None:
            for name, header in headers.items():
                own = folder / PARTS / f"{name}.{trainer.global_rank}.csv"
                self._ledgers[name] = ledger.Ledger(own, header)
            self.earlier = {name: self.rows(name) for name in headers}
            trainer.strategy.barrier("ledgers are read")
        self._earlier = {name: {int(row["id"]): row for row in rows} for name, rows in self.earlier.items()}
        self._seen = {name: set(rows) for name, rows in self._earlier.items()}
        self._skipped: set[str] = set()  # tasks whose loaders leave out the finished samples

    def done(self, task: str) -> frozenset[int]:
        """Returns the ids of the finished samples of a task or of an unknown set, for loaders to leave out.

        A sample is finished if every ledger of the set has it.
        """
        self._skipped.add(task)
        names = [name for name in self.headers if name == task or name.endswith(f"{JOINT}{task}")]
        return frozenset.intersection(*(self._finished(name) for name in names)) if names else frozenset()

    def skips(self, task: str) -> bool:
        """Returns whether the loader of a task leaves out the finished samples; a user's own loader may not."""
        return task in self._skipped

    def append(self, name: str, rows: Sequence[Row]) -> None:
        """Adds a batch, without the samples that the ledger has already.

        Args:
            name: name of the ledger.
            rows: one row per sample.
        """
        added = [row for row in rows if int(str(row["id"])) not in self._seen[name]]
        if added:
            self._ledgers[name].append(added)
            self._seen[name] |= {int(str(row["id"])) for row in added}

    def rows(self, name: str) -> list[dict[str, str]]:
        """Returns the rows of all processes, once each and in the order of the ids; all processes must call it."""
        if self.folder is None:
            parts = _of_all_processes(self._ledgers[name].rows)
            rows = {int(row["id"]): row for part in parts for row in part}
            return [rows[number] for number in sorted(rows)]
        self._trainer.strategy.barrier(f"ledgers of {name} are written")
        return ledger.gather(*self._paths(name), self.headers[name])

    def merge(self, tidy: Mapping[str, ledger.Tidy]) -> dict[str, list[dict[str, str]]]:
        """Joins the parts of all processes into one file per ledger, and returns the rows by the ledger's name.

        Args:
            tidy: functions from all rows of a ledger to those that are kept, by the ledger's name.
        """
        return {name: ledger.merge(*self._paths(name), header, tidy.get(name)) for name, header in self.headers.items()}

    def is_finished(self, task: str, batch: Batch) -> bool:
        """Returns whether an earlier start has evaluated a whole batch; loaders of a user may yield it again.

        Args:
            task: name of a ledger with labels and hashes of pixels.
            batch: images on any device.

        Raises:
            ValueError: a finished sample has another image or label now.
        """
        rows = {} if task in self._skipped else self._earlier[task]
        known = [_sample(rows[number]) for number in batch.index.tolist() if number in rows]
        changed = len({*known} - {*_samples(batch)})
        if changed:
            raise self._refusal(task, changed)
        return bool(known) and len(known) == len(batch.index)

    def check_images(self, finished: Callable[[str], Iterable[Batch]]) -> None:
        """Reads the finished samples once more, and checks that they still have their images and labels.

        Args:
            finished: function from a task to batches of this process's share of its finished samples.

        Raises:
            ValueError: samples have changed; the message has the task and their number.
        """
        for task in sorted(self._skipped & self.earlier.keys()):
            done = self.done(task)
            known = {_sample(row) for row in self.earlier[task] if int(row["id"]) in done}
            count = sum(sample in known for batch in finished(task) for sample in _samples(batch)) if known else 0
            strategy = self._trainer.strategy
            same = int(strategy.reduce(torch.tensor(count, device=strategy.root_device), reduce_op="sum"))
            if same < len(known):
                raise self._refusal(task, len(known) - same)

    def _refusal(self, task: str, count: int) -> ValueError:
        return ValueError(
            f"{count} of {len(self.earlier[task])} samples of {task} that {self.folder} has tested now have other"
            " images or labels; restore the data, or start a test under another results.name"
        )

    def _finished(self, name: str) -> frozenset[int]:
        return frozenset(int(row["id"]) for row in self.earlier[name])

    def _paths(self, name: str) -> tuple[list[Path], Path]:
        if self.folder is None:
            raise RuntimeError("a journal without a folder has no files")
        return sorted((self.folder / PARTS).glob(f"{name}.*.csv")), self.folder / LEDGERS / f"{name}.csv"


class _InMemory:
    """A ledger without a file."""

    def __init__(self, header: Sequence[str]) -> None:
        self.header = header
        self.rows: list[dict[str, str]] = []

    def append(self, rows: Sequence[Row]) -> None:
        self.rows += [{name: str(row.get(name, "")) for name in self.header} for row in rows]


class Examples:
    """Keeps the attacked images of the misclassified samples with the smallest ids.

    Args:
        folder: folder ``examples`` of the test.
        members: task and attack to the members of the attack.
        count: number of images per task and attack.
        earlier: task to the rows of earlier starts of the test.
    """

    def __init__(
        self, folder: Path, members: Members, count: int, earlier: Mapping[str, Sequence[Mapping[str, str]]]
    ) -> None:
        self.folder, self.members, self.count = folder, members, count
        # The smallest ids, since the order of samples depends on processes and workers.
        self._first = {(task, attack): first_misclassified(earlier[task], attack, count) for task, attack in members}

    def add(self, task: str, attack: str, batch: Batch, rows: Sequence[Row], verdict: Verdict) -> None:
        """Keeps the images of a batch that are among the first.

        Args:
            task: name of the task.
            attack: name of the attack.
            batch: clean images.
            rows: rows of the ledger, one per image.
            verdict: verdict of the attack.
        """
        members = self.members[task, attack]
        for number, by in enumerate(verdict.by.tolist()):
            if by >= 0 and self._is_first(task, attack, int(batch.index[number])):
                example = Example(
                    batch.images[number],
                    verdict.attacked[number],
                    task=task,
                    attack=attack,
                    number=int(batch.index[number]),
                    label=int(batch.labels[number]),
                    clean_prediction=int(str(rows[number]["clean"])),
                    prediction=int(verdict.prediction[number]),
                    by=members[by].name,
                    eps=math.inf if members[by].attack.eps is None else members[by].attack.eps,
                    norm=members[by].attack.norm,
                )
                save(example, self.folder)

    def _is_first(self, task: str, attack: str, sample: int) -> bool:
        """Records a misclassified sample, and returns whether it is among the first so far."""
        first = self._first[task, attack]
        place = bisect(first, sample)
        first.insert(place, sample)
        del first[self.count :]
        return place < self.count


def labelled_rows(batch: Batch, columns: Mapping[str, Sequence[object]]) -> list[Row]:
    """Returns rows of a ledger with id, label and hash of the pixels of every image.

    Args:
        batch: images, or embeddings, which have no hash.
        columns: further values per image.
    """
    known = {
        "id": batch.index.tolist(),
        "label": batch.labels.tolist(),
        "pixels": batch.digests or [""] * len(batch.labels),
    }
    table = {**known, **columns}
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def _of_all_processes(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [rows]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, rows)
    return parts


def _samples(batch: Batch) -> list[tuple[int, int, str]]:
    """Lists id, label and hash of the pixels of every image."""
    digests = batch.digests or [""] * len(batch.labels)
    return list(zip(batch.index.tolist(), batch.labels.tolist(), digests, strict=True))


def _sample(row: Mapping[str, str]) -> tuple[int, int, str]:
    return int(row["id"]), int(row["label"]), row["pixels"]


def first_misclassified(rows: Sequence[Mapping[str, str]], attack: str, count: int) -> list[int]:
    """Lists the ids of the first samples on which an attack succeeded.

    Args:
        rows: rows of the ledger, in the order of the ids.
        attack: name of the attack.
        count: largest number of ids.
    """
    return [int(row["id"]) for row in rows if row[f"{attack}.by"] not in ("", "clean")][:count]


def keep_examples(folder: Path, rows: Sequence[Mapping[str, str]], attack: str, count: int) -> None:
    """Removes all adversarial examples but those of the smallest ids, since every process has kept that many.

    Args:
        folder: folder of a task and attack.
        rows: rows of the ledger, in the order of the ids.
        attack: name of the attack.
        count: number of examples to keep.
    """
    kept = {f"{number}{SUFFIX}" for number in first_misclassified(rows, attack, count)}
    for path in folder.glob("*"):
        if path.name not in kept:
            path.unlink()


def sample_rows(
    batch: Batch,
    logits: Tensor,
    verdicts: Mapping[str, Verdict],
    members: Members,
    task: str,
) -> list[Row]:
    """Makes the rows of a batch for the ledger of a task.

    Args:
        batch: clean images.
        logits: ``(B, C)`` of the clean images.
        verdicts: verdicts by attack.
        members: task and attack to the members of the attack.
        task: name of the task.
    """
    logits = logits.detach().clone()
    rows = labelled_rows(batch, {"clean": logits.argmax(-1).tolist()})
    clean = {"clean_loss": cross_entropy(logits, batch.labels), "largest_logit": logits.abs().amax(-1)}
    clean |= {"logit_sum": logits.sum(-1), "least_logit": logits.amin(-1)}
    fill(rows, range(len(rows)), clean)
    for attack, verdict in verdicts.items():
        columns = _attack_columns(batch, verdict, members[task, attack])
        fill(rows, range(len(rows)), {f"{attack}.{name}": values for name, values in columns.items()})
    return rows


def _attack_columns(batch: Batch, verdict: Verdict, members: Sequence[Member]) -> dict[str, Any]:
    names = {ROBUST: "", WRONG: "clean"} | {number: member.name for number, member in enumerate(members)}
    norm = members[0].attack.norm
    return {
        "by": [names[number] for number in verdict.by.tolist()],
        "prediction": verdict.prediction,
        "loss": verdict.loss,
        "steps": verdict.steps,
        "dead": verdict.dead,
        "distance": distance(verdict.attacked, batch.images, norm),
        "excess": verdict.excess.where(verdict.excess > BOX_TOLERANCE, 0),
        "nans": verdict.nans,
        "exact": verdict.exact,
    }


def fill(rows: list[Row], numbers: Sequence[int], columns: Mapping[str, Any]) -> None:
    """Writes a value into each chosen row; floats get five digits, since further ones depend on the batch size.

    Args:
        rows: rows of a ledger.
        numbers: positions of the rows to write.
        columns: values for these rows by the names of their columns.
    """
    for name, values in columns.items():
        listed = values.tolist() if isinstance(values, torch.Tensor) else values
        for number, value in zip(numbers, listed, strict=True):
            rows[number][name] = f"{value:.5g}" if isinstance(value, float) else value
