"""Chooses the samples of a test that are probed, and probes them in whole batches."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustclip.attacks import Attack, Member
from robustclip.attacks.attack import Forward
from robustclip.evaluation import probes, stand_in_probes
from robustclip.evaluation.defended_model import Judge, Way, defence_of
from robustclip.evaluation.engine import ROBUST, StopRule, Verdict
from robustclip.evaluation.gradient_probes import gradients
from robustclip.evaluation.journal import Members, Row, fill
from robustclip.evaluation.precision_ladder import exact
from robustclip.evaluation.ways import Ways, falls_to_own
from robustclip.methods import RobustMethod
from robustclip.models.clip import CLIPModel
from robustclip.models.heads import encode_heads, head_logits
from robustclip.types import Batch, Task


@dataclass
class Held:
    """Samples of one task that wait for their probes.

    Attributes:
        batch: images, labels and ids.
        logits: ``(B, C)`` of the clean images.
        by: attack to its verdict ``(B,)``.
        rows: rows of the ledger, which the probes complete.
    """

    batch: Batch
    logits: Tensor
    by: dict[str, Tensor]
    rows: list[Row]

    def take(self, places: Tensor) -> "Held":
        """Returns the samples at some places ``(N,)``."""
        images, labels, index = (part[places] for part in self.batch[:3])
        by = {attack: verdict[places] for attack, verdict in self.by.items()}
        rows = [self.rows[place] for place in places.tolist()]
        return Held(Batch(images, labels, index), self.logits[places], by, rows)

    def join(self, other: "Held") -> "Held":
        """Returns these samples followed by those of another batch."""
        images, labels, index = (torch.cat(parts) for parts in zip(self.batch[:3], other.batch[:3], strict=True))
        by = {attack: torch.cat([verdict, other.by[attack]]) for attack, verdict in self.by.items()}
        logits = torch.cat([self.logits, other.logits])
        return Held(Batch(images, labels, index), logits, by, [*self.rows, *other.rows])


class ProbeQueue:
    """Holds the probed samples of a test back until there is a whole batch of them, since small batches are slow.

    Their rows are written late, so that a killed test examines them again. Which samples are probed depends on their
    ids and on the number of samples of the task alone.

    Args:
        method: tested method.
        tasks: tasks of the test, in the order of their loaders.
        members: task and attack to the members of the attack.
        sizes: task to its number of samples; None where it is not known.
        quota: number of samples to probe per task; 0 for none.
        seed: seed of the attacks.
        stop: stop rule of the attacks.
        ways: ways through a test-time defence.
    """

    def __init__(
        self,
        method: RobustMethod,
        tasks: Sequence[Task],
        members: Members,
        *,
        sizes: Mapping[str, int | None],
        quota: int,
        seed: int,
        stop: StopRule,
        ways: Ways,
    ) -> None:
        self.method, self.members = method, members
        self.tasks = {task.name: task for task in tasks}
        self.shares = {name: probes.share_of(quota, sizes[name]) for name in self.tasks}
        self.fine_shares = {name: probes.share_of(quota // probes.FINE, sizes[name]) for name in self.tasks}
        self.seed, self.stop, self.ways, self.capacity = seed, stop, ways, 1
        self._waiting: dict[str, Held] = {}
        self._undefended: dict[str, Forward] = {}
        self._base: CLIPModel | None = None

    def add(
        self, task: str, batch: Batch, logits: Tensor, verdicts: Mapping[str, Verdict], rows: Sequence[Row]
    ) -> list[Row]:
        """Takes the rows of an evaluated batch, and returns those that can be written.

        Args:
            task: name of the task.
            batch: clean images.
            logits: ``(B, C)`` of the images.
            verdicts: verdicts by attack.
            rows: rows of the batch.
        """
        with torch.inference_mode(False):
            is_probed = probes.draws(batch.index) < self.shares[task]
            by = {attack: verdict.by.clone() for attack, verdict in verdicts.items()}
            own = Held(
                Batch(batch.images.clone(), batch.labels.clone(), batch.index.clone()),
                logits.detach().clone(),
                by,
                list(rows),
            )
            if self.method.defence is None:
                self._compute_again(task, own, is_probed, verdicts)
            ready = own.take((~is_probed).nonzero()[:, 0]).rows
            self.capacity = max(self.capacity, len(rows))
            added = own.take(is_probed.nonzero()[:, 0])
            waiting = self._waiting.get(task)
            if waiting is not None and waiting.batch.images.shape[1:] != added.batch.images.shape[1:]:
                ready += self._probe(task, waiting) if waiting.rows else []  # images of one size alone make a batch
                waiting = None
            held = added if waiting is None else waiting.join(added)
            while len(held.rows) >= self.capacity:
                places = torch.arange(len(held.rows), device=batch.index.device)
                ready += self._probe(task, held.take(places[: self.capacity]))
                held = held.take(places[self.capacity :])
            self._waiting[task] = held
        return ready

    def _compute_again(self, task: str, own: Held, is_probed: Tensor, verdicts: Mapping[str, Verdict]) -> None:
        """Computes the losses of probed attacked images again, which must be those of the verdicts."""
        places = is_probed.nonzero()[:, 0]
        for attack, verdict in verdicts.items() if len(places) else ():
            again = probes.losses(verdict.attacked[places], own.batch.labels[places], self._answers(task))
            fill(own.rows, places.tolist(), {f"{attack}.again": (again - verdict.loss[places]).abs()})

    def _answers(self, task: str) -> Forward:
        """Returns the tested model; of a defence, the way with the gradient of the undefended model, never cut."""
        if self.method.defence is None:
            return exact(partial(self.method.logits, task=task))
        return Way(self.method, task, "bare", range(1))

    def finish(self) -> dict[str, list[Row]]:
        """Probes the samples that still wait, and returns their rows by task."""
        waiting, self._waiting = self._waiting, {}
        with torch.inference_mode(False):
            return {task: self._probe(task, held) for task, held in waiting.items() if held.rows}

    def _probe(self, task: str, held: Held) -> list[Row]:
        """Completes the rows of some samples."""
        images, forward = held.batch.images, self._answers(task)
        judge = forward
        if self.method.defence is not None:
            judge = Judge(self.method, task, self.ways.judges, labels=held.batch.labels, index=held.batch.index)
        judge = probes.bound(judge, held.batch.index)
        fill(held.rows, range(len(held.rows)), probes.repeat(images, judge, held.logits, clip=self.method.clip))
        for attack, by in held.by.items():
            self._attack_again(task, attack, held, by, forward)
        is_fine = probes.draws(held.batch.index) < self.fine_shares[task]
        if images.ndim == 4 and bool(is_fine.any()):  # embeddings have no pixels
            part = held.take(is_fine.nonzero()[:, 0])
            if self.method.defence is None:
                self._examine_model(task, part, forward)
            else:
                self._examine_defence(task, part)
        return held.rows

    def _attack_again(self, task: str, attack: str, held: Held, by: Tensor, forward: Forward) -> None:
        """Runs stronger and other attacks on the samples of one attack, and moves images over from other models."""
        members = self.members[task, attack]
        if members[0].attack.target is not None:
            return  # the audit judges attacks that aim at any wrong class
        for name, mask, attacks in probes.stronger(members[0].attack, by, held.batch.images):
            part = held.take(mask.nonzero()[:, 0])
            self._fill_outcomes(f"{attack}.{name}", part, forward, attacks)
        survivors = held.take((by == ROBUST).nonzero()[:, 0])
        if survivors.rows:
            self._fill_outcomes(f"{attack}.other", survivors, forward, [probes.other_attack(members)])
        if survivors.rows and self.method.defence is None:
            moved, (images, labels, index) = stand_in_probes.transferred_attack(members), survivors.batch[:3]
            sources = self._sources(task, images[:1])
            if len(sources) > 1 and stand_in_probes.is_alike(forward, sources[0], images[:8], labels[:8]):
                sources = sources[1:]  # towers to which the method adds nothing
            options: dict[str, Any] = {"index": index, "seed": self.seed}
            broken = stand_in_probes.transfers(images, labels, forward, sources, moved, **options)
            fill(survivors.rows, range(len(broken)), {f"{attack}.transfer": broken})
            self._borrow(f"{attack}.borrowed", survivors, forward, sources, members)

    def _borrow(
        self, column: str, survivors: Held, forward: Forward, sources: Sequence[Forward], members: Sequence[Member]
    ) -> None:
        """Attacks the samples that another attack left robust with gradients that are not the model's own."""
        other = column.replace(".borrowed", ".other")
        left = survivors.take(
            torch.tensor([n for n, row in enumerate(survivors.rows) if row.get(other) != 1], dtype=torch.long)
        )
        if left.rows:
            images, labels, index = left.batch[:3]
            options: dict[str, Any] = {"index": index, "seed": self.seed}
            outcomes = stand_in_probes.stand_in_outcomes(images, labels, forward, sources, members, **options)
            fill(left.rows, range(len(outcomes)), {column: outcomes})

    def _fill_outcomes(self, column: str, part: Held, forward: Forward, attacks: Sequence[Attack | None]) -> None:
        if part.rows:
            images, labels, index = part.batch[:3]
            options: dict[str, Any] = {"index": index, "seed": self.seed, "logits": part.logits}
            outcomes = probes.probe_outcomes(images, labels, forward, attacks, **options)
            fill(part.rows, range(len(outcomes)), {column: outcomes})

    def _examine_defence(self, task: str, part: Held) -> None:
        """Examines whether a defence has the properties that it declares, and whether its own gradient would do."""
        images, index, defence = part.batch.images, part.batch.index, defence_of(self.method)
        one, other = (self.method.answers(images, task, index=index, draw=draw).detach() for draw in (0, 1))
        fill(part.rows, range(len(part.rows)), {"draws": (one - other).abs().amax(-1)})
        first = self.ways.judges if defence.is_random else 0  # the first draw of the attacks
        own = Way(self.method, task, "own", range(first, first + 1))
        self._examine_model(task, part, own, is_cut=defence.backward == "none")
        for attack, by in part.by.items():
            through = self.members[task, attack]
            numbers = [number for number, member in enumerate(through) if member.name.startswith("replay.")]
            held = part.take(torch.isin(by, by.new_tensor(numbers)).nonzero()[:, 0])
            if held.rows and through[0].attack.target is None:
                options: dict[str, Any] = {"index": held.batch.index, "seed": self.seed, "stop": self.stop}
                fallen = falls_to_own(self.method, task, *held.batch[:2], through, self.ways, **options)
                fill(held.rows, range(len(fallen)), {f"{attack}.own": fallen})

    def _examine_model(self, task: str, part: Held, forward: Forward, *, is_cut: bool = False) -> None:
        """Examines gradients unless they are declared as cut, random numbers, state and labels, on fewer samples."""
        (images, labels, index), count = part.batch[:3], len(part.rows)
        forward = probes.bound(forward, index)
        attacks = [member.attack for attack in part.by for member in self.members[task, attack]]
        columns: dict[str, Any] = {}
        if attacks and part.logits.shape[1] > 1:
            if not is_cut:
                columns = dict(gradients(images, labels, forward, probes.largest(attacks)))
            columns["random"] = [int(probes.advances_generators(images, labels, forward))] * count
        columns["autograd"] = [probes.autograd_calls(images, forward, self.method.clip.net.visual)] * count
        with _no_logging(self.method):
            number = list(self.tasks).index(task)
            test_step = lambda others: self._step(part.batch._replace(images=others), number, labels)  # noqa: E731
            columns["state"] = probes.state_change(images, forward, self.method, test_step)
            step = partial(self._step, part.batch, number)
            columns["leak"] = probes.label_leak(step, labels, part.logits.shape[1])
        for name in ("faithful", "steady", "rise", "state", "leak"):
            values = columns[name].tolist() if name in columns else [math.nan] * count
            columns[name] = ["" if math.isnan(value) else value for value in values]
        fill(part.rows, range(count), columns)

    def _step(self, batch: Batch, number: int, labels: Tensor) -> Tensor:
        """Answers a batch with other labels, as the trainer's test step does."""
        batch = batch._replace(labels=labels)
        with torch.no_grad():
            batch = self.method.on_after_batch_transfer(self.method.on_before_batch_transfer(batch, number), number)
            self.method.on_test_batch_start(batch, 0, number)
            logits: Tensor = self.method.test_step(batch, 0, number)
            self.method.on_test_batch_end(logits, batch, 0, number)
        return logits

    def _sources(self, task: str, images: Tensor) -> list[Forward]:
        """Returns the models without what the method adds to them: the tested towers alone, and the base model."""
        if task not in self.method.heads:  # a model without a text tower has no base model
            return []
        towers = partial(_tower_logits, self.method.clip, self.method.heads[task])
        base = self._base_model(task, images.device)
        if base is None:
            return [towers]
        with torch.no_grad():
            is_same = torch.allclose(towers(images), base(images), rtol=1e-4, atol=1e-4)
        return [base] if is_same else [towers, base]

    def _base_model(self, task: str, device: torch.device) -> Forward | None:
        """Loads the base model at its first use, and encodes the classes of a task; None if there is no base model."""
        clip = self.method.clip
        if clip.pretrained is None:
            return None
        if self._base is None:
            with torch.random.fork_rng():
                self._base = CLIPModel(clip.arch, clip.pretrained, clip.image_size).eval().requires_grad_(False)
            self._base.to(device)
        if task not in self._undefended:
            with torch.no_grad():
                head = encode_heads(self._base.encode_classes, [self.tasks[task]])[task]
            self._undefended[task] = partial(_tower_logits, self._base, head)
        return self._undefended[task]


def _tower_logits(clip: CLIPModel, head: Tensor, images: Tensor) -> Tensor:
    """Computes the zero-shot logits ``(B, C)`` of the towers alone."""
    return head_logits(clip.encode_image(images), head, clip.logit_scale)


@contextmanager
def _no_logging(method: RobustMethod) -> Iterator[None]:
    """Keeps a method from logging the values of a step that is run for a probe."""
    silent: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    names = {"log": silent, "log_dict": silent}
    vars(method).update(names)
    try:
        yield
    finally:
        for name in names:
            del vars(method)[name]
