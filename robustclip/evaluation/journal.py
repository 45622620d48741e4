"""The ledgers of a running test: what is behind it, and what each batch adds."""

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat as endless
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from robustclip.attacks import Member
from robustclip.attacks.attack import BOX_TOLERANCE, Forward
from robustclip.attacks.perturbation_set import distance
from robustclip.attacks.sample_losses import cross_entropy
from robustclip.evaluation.engine import ROBUST, WRONG, Verdict
from robustclip.evaluation.probes import breaks, probed, repeat, stronger
from robustclip.results import ledger
from robustclip.results.adversarial_examples import SUFFIX, Example, save
from robustclip.results.run import EXAMPLES, LEDGERS, PARTS
from robustclip.types import Batch, Task

Members = Mapping[tuple[str, str], Sequence[Member]]
Row = dict[str, object]


class Journal:
    """One ledger per task and process, in the folder of the test.

    Args:
        folder: of the test.
        trainer: tells the process; all processes must come here.
        tasks: of the test.
        members: task and attack to the attack's members.
        save_examples: how many per task and attack.
    """

    def __init__(
        self, folder: Path, trainer: Trainer, tasks: Sequence[Task], members: Members, save_examples: int
    ) -> None:
        self.folder, self.members, self.save_examples = folder, members, save_examples
        attacks = list(dict.fromkeys(attack for _, attack in members))
        self._ledgers = {}
        self.earlier: dict[str, list[dict[str, str]]] = {}
        for task in tasks:
            own = folder / PARTS / f"{task.name}.{trainer.global_rank}.csv"
            self._ledgers[task.name] = ledger.Ledger(own, attacks)
        trainer.strategy.barrier("ledgers are open")
        for task in tasks:
            parts, whole = (folder / PARTS).glob(f"{task.name}.*.csv"), folder / LEDGERS / f"{task.name}.csv"
            self.earlier[task.name] = ledger.gather(parts, whole, ledger.columns(attacks))
        trainer.strategy.barrier("ledgers are read")
        # Ids of the broken samples that come first, whatever the order in which processes and workers meet them.
        self._first = {
            (task, attack): first_broken(self.earlier[task], attack, save_examples) for task, attack in members
        }

    def done(self, task: str) -> frozenset[int]:
        """Ids of the samples that need no second look."""
        return frozenset(int(row["id"]) for row in self.earlier[task])

    def check_images(self, trainer: Trainer, finished: Callable[[str], Iterable[Batch]]) -> None:
        """Refuse to resume over other images or labels than those of the finished samples, which are read once more.

        Args:
            trainer: joins the processes, which must all come here.
            finished: task to batches of this process's share of its finished samples.

        Raises:
            ValueError: with the task and the number of samples that have changed.
        """
        for task, rows in self.earlier.items():
            if not rows:
                continue
            known = {(int(row["id"]), int(row["label"]), row["pixels"]) for row in rows}
            count = sum(
                sample in known
                for batch in finished(task)
                for sample in zip(
                    batch.index.tolist(), batch.labels.tolist(), batch.digests or endless(""), strict=False
                )
            )
            same = int(
                trainer.strategy.reduce(torch.tensor(count, device=trainer.strategy.root_device), reduce_op="sum")
            )
            if same < len(rows):
                raise ValueError(
                    f"{len(rows) - same} of {len(rows)} samples of {task} that {self.folder} has tested now have other"
                    " images or labels; restore the data, or start a test under another results.name"
                )

    def write(
        self, task: str, batch: Batch, rows: list[Row], verdicts: Mapping[str, Verdict], *, seconds: float
    ) -> None:
        """Adds a batch: examples first, so that no row stands without its example."""
        for attack, verdict in verdicts.items():
            self._save_examples(task, attack, batch, rows, verdict)
        share = f"{seconds / max(1, len(rows)):.6f}"
        self._ledgers[task].append([{**row, ledger.TIME_COLUMN: share} for row in rows])

    def _save_examples(self, task: str, attack: str, batch: Batch, rows: list[Row], verdict: Verdict) -> None:
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
                save(example, self.folder / EXAMPLES)

    def _is_first(self, task: str, attack: str, sample: int) -> bool:
        """Notes a broken sample; is it one of those to keep, as far as anyone knows?"""
        first = self._first[task, attack]
        place = bisect(first, sample)
        first.insert(place, sample)
        del first[self.save_examples :]
        return place < self.save_examples


def first_broken(rows: Sequence[Mapping[str, str]], attack: str, count: int) -> list[int]:
    """The smallest ``count`` ids of samples that an attack broke; ``rows`` come in the order of the ids."""
    return [int(row["id"]) for row in rows if row[f"{attack}.by"] not in ("", "clean")][:count]


def keep_examples(folder: Path, rows: Sequence[Mapping[str, str]], attack: str, count: int) -> None:
    """Leaves the examples of the smallest ids in the folder of a task and attack; every process kept as many."""
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
    """Rows of a batch, probes included; arguments as for `examine`, plus ``clip`` in the options."""
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
    if len(again):
        _fill(rows, again.tolist(), repeat(batch.images[again], forward, logits[again], clip=options["clip"]))
    for attack, verdict in verdicts.items():
        found = _attack_columns(batch, verdict, members[task, attack])
        _fill(rows, range(len(rows)), {f"{attack}.{name}": values for name, values in found.items()})
        first = members[task, attack][0].attack
        for name, concerned, probe in stronger(first, verdict.by[attacked], batch.images):
            chosen = attacked[concerned]
            if len(chosen):
                images, labels, index = batch.images[chosen], batch.labels[chosen], batch.index[chosen]
                outcome = breaks(images, labels, forward, probe, index=index, seed=options["seed"])
                _fill(rows, chosen.tolist(), {f"{attack}.{name}": outcome})
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
    }


def _fill(rows: list[Row], numbers: Sequence[int], columns: Mapping[str, Any]) -> None:
    """Puts one value per chosen row; floats with five digits, further ones depend on the size of a batch."""
    for name, values in columns.items():
        listed = values.tolist() if isinstance(values, torch.Tensor) else values
        for number, value in zip(numbers, listed, strict=True):
            rows[number][name] = f"{value:.5g}" if isinstance(value, float) else value
