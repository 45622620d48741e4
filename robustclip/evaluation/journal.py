"""The ledgers of a running test: the samples that are finished, and the rows that each batch adds."""

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, distributed

from robustclip.attacks import Attack, Member
from robustclip.attacks.attack import BOX_TOLERANCE, Forward
from robustclip.attacks.perturbation_set import distance
from robustclip.attacks.sample_losses import cross_entropy
from robustclip.evaluation.detection_summary import JOINT
from robustclip.evaluation.engine import ROBUST, WRONG, Verdict
from robustclip.evaluation.probes import breaks, probed, repeat, stronger
from robustclip.results import ledger
from robustclip.results.adversarial_examples import SUFFIX, Example, save
from robustclip.results.run import LEDGERS, PARTS
from robustclip.types import Batch

Members = Mapping[tuple[str, str], Sequence[Member]]
Row = dict[str, object]


class Journal:
    """The ledgers of a running evaluation: one per task, and one per table of a section of the result.

    Args:
        trainer: joins the processes, which must all come here.
        headers: name of every ledger to its columns, of which the first is ``id``.
        folder: of the test, with what earlier starts of it have left; None keeps the rows in memory alone.
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
        self._seen = {name: {int(row["id"]) for row in rows} for name, rows in self.earlier.items()}
        self._skipped: set[str] = set()  # tasks whose loaders leave out the finished samples

    def done(self, task: str) -> frozenset[int]:
        """Ids of the samples of a task, or of an unknown set, that are finished; loaders leave them out.

        A sample is finished if every ledger of the set has it.
        """
        self._skipped.add(task)
        names = [name for name in self.headers if name == task or name.endswith(f"{JOINT}{task}")]
        return frozenset.intersection(*(self._finished(name) for name in names)) if names else frozenset()

    def skips(self, task: str) -> bool:
        """Whether the loader of a task leaves out the finished samples; a data module need not offer it."""
        return task in self._skipped

    def append(self, name: str, rows: Sequence[Row]) -> None:
        """Add a batch; rows of samples that the ledger has already are left out.

        Args:
            name: of the ledger.
            rows: one per sample.
        """
        added = [row for row in rows if int(str(row["id"])) not in self._seen[name]]
        if added:
            self._ledgers[name].append(added)
            self._seen[name] |= {int(str(row["id"])) for row in added}

    def rows(self, name: str) -> list[dict[str, str]]:
        """Rows of all processes, which must all come here, once each and in the order of the ids."""
        if self.folder is None:
            parts = _of_all_processes(self._ledgers[name].rows)
            found = {int(row["id"]): row for part in parts for row in part}
            return [found[number] for number in sorted(found)]
        self._trainer.strategy.barrier(f"ledgers of {name} are written")
        return ledger.gather(*self._paths(name), self.headers[name])

    def merge(self, tidy: Mapping[str, ledger.Tidy]) -> dict[str, list[dict[str, str]]]:
        """Joins the parts of all processes into one file per ledger, and returns the rows by the ledger's name.

        Args:
            tidy: functions from all rows of a ledger to those that are kept, by the ledger's name.
        """
        return {name: ledger.merge(*self._paths(name), header, tidy.get(name)) for name, header in self.headers.items()}

    def is_finished(self, task: str, batch: Batch) -> bool:
        """Whether an earlier start has evaluated a whole batch, which a loader of the user's own gives again.

        Args:
            task: name of a ledger with labels and hashes of pixels.
            batch: on any device.

        Raises:
            ValueError: a finished sample has another image or label now.
        """
        rows = {int(row["id"]): row for row in self.earlier[task]} if task not in self._skipped else {}
        found = [rows.get(number) for number in batch.index.tolist()]
        known = [_sample(row) for row in found if row is not None]
        changed = len({*known} - {*_samples(batch)})
        if changed:
            raise self._refusal(task, changed)
        return bool(known) and len(known) == len(found)

    def check_images(self, finished: Callable[[str], Iterable[Batch]]) -> None:
        """Check that the finished samples, which are read once more, still have their images and labels.

        Args:
            finished: task to batches of this process's share of its finished samples.

        Raises:
            ValueError: with the task and the number of samples that have changed.
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
    """Rows that no file keeps, as a ledger would return them."""

    def __init__(self, header: Sequence[str]) -> None:
        self.header = header
        self.rows: list[dict[str, str]] = []

    def append(self, rows: Sequence[Row]) -> None:
        self.rows += [{name: str(row.get(name, "")) for name in self.header} for row in rows]


class Examples:
    """Keeps the attacked images of the misclassified samples with the smallest ids.

    Args:
        folder: ``examples`` of the test.
        members: task and attack to the members of the attack.
        count: how many images per task and attack.
        earlier: task to the rows that earlier starts of the test have left.
    """

    def __init__(
        self, folder: Path, members: Members, count: int, earlier: Mapping[str, Sequence[Mapping[str, str]]]
    ) -> None:
        self.folder, self.members, self.count = folder, members, count
        # Ids of the misclassified samples that come first, in whatever order processes and workers meet them.
        self._first = {(task, attack): first_broken(earlier[task], attack, count) for task, attack in members}

    def add(self, task: str, attack: str, batch: Batch, rows: Sequence[Row], verdict: Verdict) -> None:
        """Keep the images of a batch that are among the first.

        Args:
            task: name of the task.
            attack: name of the attack.
            batch: of clean images.
            rows: of the ledger, one per image.
            verdict: of the attack.
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
        """Note a misclassified sample, and return whether its image is one of those to keep so far."""
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
    """Id, label and hash of the pixels of every image."""
    digests = batch.digests or [""] * len(batch.labels)
    return list(zip(batch.index.tolist(), batch.labels.tolist(), digests, strict=True))


def _sample(row: Mapping[str, str]) -> tuple[int, int, str]:
    return int(row["id"]), int(row["label"]), row["pixels"]


def first_broken(rows: Sequence[Mapping[str, str]], attack: str, count: int) -> list[int]:
    """Ids of the first misclassified samples under an attack.

    Args:
        rows: of the ledger, in the order of the ids.
        attack: name of the attack.
        count: largest number of ids.
    """
    return [int(row["id"]) for row in rows if row[f"{attack}.by"] not in ("", "clean")][:count]


def keep_examples(folder: Path, rows: Sequence[Mapping[str, str]], attack: str, count: int) -> None:
    """Remove all adversarial examples but those of the smallest ids, since every process has kept as many.

    Args:
        folder: of a task and attack.
        rows: of the ledger, in the order of the ids.
        attack: name of the attack.
        count: number of examples to keep.
    """
    kept = {f"{number}{SUFFIX}" for number in first_broken(rows, attack, count)}
    for path in folder.glob("*"):
        if path.name not in kept:
            path.unlink()


def sample_rows(
    batch: Batch,
    logits: Tensor,
    verdicts: Mapping[str, Verdict],
    members: Members,
    task: str,
    forward: Forward,
    options: Mapping[str, Any],
) -> list[Row]:
    """Rows of a batch for the ledger of a task.

    Args:
        batch: of clean images.
        logits: ``(B, C)`` of the clean images.
        verdicts: by attack.
        members: task and attack to the members of the attack.
        task: name of the task.
        forward: images to logits.
        options: ``seed`` of the attacks, and ``clip``, the model to probe; None probes nothing.
    """
    logits = logits.detach().clone()
    clean = {
        "id": batch.index,
        "label": batch.labels,
        "pixels": batch.digests or [""] * len(batch.labels),
        "clean": logits.argmax(-1),
        "clean_loss": cross_entropy(logits, batch.labels),
        "largest_logit": logits.abs().amax(-1),
    }
    rows: list[Row] = [{} for _ in batch.labels]
    _fill(rows, range(len(rows)), clean)
    again, attacked = probed(batch.index)
    if options["clip"] is None:
        again = attacked = again[:0]
    if len(again):
        _fill(rows, again.tolist(), repeat(batch.images[again], forward, logits[again], clip=options["clip"]))
    for attack, verdict in verdicts.items():
        found = _attack_columns(batch, verdict, members[task, attack])
        _fill(rows, range(len(rows)), {f"{attack}.{name}": values for name, values in found.items()})
        first = members[task, attack][0].attack
        for name, chosen, probe in _probes(first, verdict, attacked, batch):
            images, labels, index = batch.images[chosen], batch.labels[chosen], batch.index[chosen]
            outcome = breaks(images, labels, forward, probe, index=index, seed=options["seed"])
            _fill(rows, chosen.tolist(), {f"{attack}.{name}": outcome})
    return rows


def _probes(first: Attack, verdict: Verdict, attacked: Tensor, batch: Batch) -> list[tuple[str, Tensor, Attack | None]]:
    """Probes by column, with the places in the batch of the samples that they concern; none without a sample."""
    probes = [
        (name, attacked[places], probe) for name, places, probe in stronger(first, verdict.by[attacked], batch.images)
    ]
    return [each for each in probes if len(each[1])]


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
    }


def _fill(rows: list[Row], numbers: Sequence[int], columns: Mapping[str, Any]) -> None:
    """Write a value into each chosen row; floats get five digits, since further ones depend on the batch size."""
    for name, values in columns.items():
        listed = values.tolist() if isinstance(values, torch.Tensor) else values
        for number, value in zip(numbers, listed, strict=True):
            rows[number][name] = f"{value:.5g}" if isinstance(value, float) else value
