"""How long a run would take on this machine: a batch is timed, the rest is multiplication."""

import inspect
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks import APGD, PGD, Attack, Square, TorchAttack
from robustclip.data import CLIPDataModule
from robustclip.evaluation import RobustEvaluation
from robustclip.methods import RobustMethod
from robustclip.models.layers import frozen
from robustclip.tools.datasets import Examined
from robustclip.tools.findings import INFO, OK, PROBLEM, WARNING, Finding
from robustclip.types import Batch

REPEATS, LONGEST = 5, 3.0  # a pass is timed this often, or for so many seconds
TYPICAL_CLASSES = 1000  # for the number of targets where no test set opens

Passes = tuple[int, int]


class Bench:
    """Times passes of one model.

    Args:
        model: on its device.
        data: tells batch sizes and loaders' processes.
        trainer: tells precision and number of devices; None for one device in full precision.
    """

    def __init__(self, model: RobustMethod, data: CLIPDataModule, trainer: Trainer | None) -> None:
        self.model, self.data, self.trainer = model, data, trainer
        self.device = next(model.parameters()).device
        self.world_size = 1 if trainer is None else trainer.world_size

    def batch(self, found: Examined, size: int) -> Batch:
        """``size`` images, by repeating those that were looked at."""
        chosen = torch.arange(size) % len(found.images)
        images, labels = found.images[chosen], found.labels[chosen]
        return Batch(images.to(self.device), labels.to(self.device), torch.arange(size, device=self.device))

    def training_precision(self) -> AbstractContextManager[Any]:
        """That of the run's training steps; attacks of an evaluation choose their own."""
        return nullcontext() if self.trainer is None else self.trainer.precision_plugin.forward_context()

    def passes(self, found: Examined, *, in_bfloat16: bool = False) -> tuple[float, float]:
        """Seconds per image of a forward pass, and of one with the gradient of the pixels."""
        size = min(self.data.eval_batch_size, found.size or self.data.eval_batch_size)
        batch = self.batch(found, size)

        def forward() -> Tensor:
            return F.cross_entropy(self.model.logits(images, found.task.name).float(), batch.labels, reduction="sum")

        def gradient() -> None:
            torch.autograd.grad(forward(), images)

        images = batch.images.requires_grad_()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bfloat16), frozen(self.model):
            with torch.no_grad():
                forward_seconds = self.seconds(forward)
            return forward_seconds / size, self.seconds(gradient) / size

    def seconds(self, action: Callable[[], Any]) -> float:
        """Median time of a few runs after one to warm up, which stands for them if it took long."""
        times: list[float] = []
        while len(times) <= REPEATS and (not times or sum(times) < LONGEST):
            start = perf_counter()
            action()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(perf_counter() - start)
        return median(times[1:] or times)

    def loading(self, found: Examined, computing: float) -> float:
        """Seconds per image with loading, which the loaders' processes do meanwhile."""
        workers = self.data.num_workers
        return max(computing, found.load_seconds / workers) if workers else computing + found.load_seconds

    def memory(self) -> str:
        """Most memory that was in use so far."""
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory"
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            used = torch.cuda.max_memory_allocated(self.device)
            text += f", {used / 2**30:.1f} of {total / 2**30:.0f} GiB on the GPU"
        return text


def passes(attack: Attack, classes: int) -> Passes | None:
    """Gradient passes and forward passes of an attack per image, if it stops at nothing.

    Args:
        attack: one, or a recipe with ``members``.
        classes: of the task, which bound the number of targets.

    Returns:
        None for attacks whose cost is not known.
    """
    if isinstance(attack, PGD):
        return attack.steps, int(attack.keep == "best")
    if isinstance(attack, APGD):
        runs = attack.restarts * max(1, min(attack.targets, classes - 1))
        return runs * (attack.steps + 1), int(attack.targets > 0)
    if isinstance(attack, Square):
        return 0, attack.queries
    if isinstance(attack, TorchAttack):
        return _passes_of_torchattacks(attack)
    members = [member.attack for member in attack.members(classes)]
    if any(type(member) is type(attack) for member in members):  # not a recipe
        return None
    costs = [cost for cost in (passes(member, classes) for member in members) if cost is not None]
    if len(costs) < len(members):
        return None
    return sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)


def _passes_of_torchattacks(attack: TorchAttack) -> Passes | None:
    import torchattacks  # here because its import is slow and most runs do not need it

    takes = inspect.signature(getattr(torchattacks, attack.name)).parameters
    steps = attack.kwargs.get("steps", takes["steps"].default if "steps" in takes else None)
    return None if steps is None else (int(steps) * int(attack.kwargs.get("n_restarts", 1)), 0)


def attack_findings(attacks: Mapping[str, Attack], tests: Sequence[Examined]) -> Iterator[Finding]:
    """What each attack costs."""
    classes = max((len(found.task.label_names) for found in tests), default=TYPICAL_CLASSES)
    if not attacks:
        yield Finding("attacks", WARNING, "none: `evaluation.attacks` is empty, so clean accuracy alone is measured")
    for name, attack in attacks.items():
        cost = passes(attack, classes)
        told = "cost not known" if cost is None else f"at most {cost[0]:,} gradient and {cost[1]:,} forward passes"
        yield Finding(f"attack: {name}", INFO if cost is None else OK, f"{_described(attack)}: {told} per image")


def estimate_test(bench: Bench, evaluation: RobustEvaluation, tests: Sequence[Examined]) -> Finding:
    """Time and memory of the whole test."""
    counted = [found for found in tests if found.size is not None]
    if not counted:
        return Finding("time of test", INFO, "not known: no set tells its number of samples")
    try:
        seconds, speeds = _evaluation_seconds(bench, evaluation, evaluation.attacks, counted)
    except torch.OutOfMemoryError:
        remedy = f"set data.eval_batch_size below {bench.data.eval_batch_size}"
        return Finding("time of test", PROBLEM, f"a batch does not fit into the GPU's memory; {remedy}")
    left_out = [name for name, attack in evaluation.attacks.items() if passes(attack, 2) is None]
    left_out += [found.task.name for found in tests if found.size is None]
    missing = f", and {', '.join(left_out)} on top" if left_out else ""
    rates = f"{1 / speeds[0]:,.0f} images/s forward, {1 / speeds[1]:,.0f} with gradient"
    line = f"about {_duration(seconds)} without early stopping{missing}; {rates}; so far {bench.memory()}"
    return Finding("time of test", INFO, line)


def estimate_epoch(bench: Bench, evaluation: RobustEvaluation, sets: Sequence[Examined]) -> Finding:
    """Time of an epoch of ``fit`` with its validation; trains the model for a step or two."""
    training, *validation = sets
    if training.kind != "training" or training.size is None:
        return Finding("time of an epoch", INFO, "not known: there is no training set or it does not tell its size")
    try:
        counted = [found for found in validation if found.size is not None]
        attacks = evaluation.fit_attacks
        after = _evaluation_seconds(bench, evaluation, attacks, counted)[0] if counted else 0.0
        step = _step_seconds(bench, training)
    except torch.OutOfMemoryError:
        remedy = f"set data.batch_size below {bench.data.batch_size}"
        return Finding("time of an epoch", PROBLEM, f"a batch does not fit into the GPU's memory; {remedy}")
    seconds = training.size * bench.loading(training, step) / bench.world_size
    detail = f"about {_duration(seconds)} of training and {_duration(after)} of validation"
    return Finding("time of an epoch", INFO, f"{detail}; {1 / step:,.0f} images/s; so far {bench.memory()}")


def _evaluation_seconds(
    bench: Bench, evaluation: RobustEvaluation, attacks: Mapping[str, Attack], sets: Sequence[Examined]
) -> tuple[float, tuple[float, float]]:
    """Seconds of an evaluation, and per image of a forward pass and of one with gradient."""
    largest = max(sets, key=lambda found: found.size or 0)
    forward, gradient = bench.passes(largest)
    query, step = forward, gradient
    if evaluation.attack_precision == "bf16":  # what survives that is attacked once more in fp32
        half_forward, half_gradient = bench.passes(largest, in_bfloat16=True)
        query, step = forward + half_forward, gradient + half_gradient
    total = 0.0
    for found in sets:
        computing = forward  # clean
        for attack in attacks.values():
            cost = passes(attack, len(found.task.label_names)) or (0, 0)
            computing += cost[0] * step + cost[1] * query + forward  # and the verdict
        total += (found.size or 0) * bench.loading(found, computing) / bench.world_size + found.head_seconds
    return total, (forward, gradient)


def _step_seconds(bench: Bench, training: Examined) -> float:
    """Seconds per image of a training step, attack included."""
    model, size = bench.model, min(bench.data.batch_size, training.size or bench.data.batch_size)
    batch = bench.batch(training, size)
    model.freeze_the_rest()
    model.train()
    model.prepare_training(training.task)

    def step() -> None:
        with bench.training_precision():
            loss = torch.stack(list(model.training_loss(batch).values())).sum()
        loss.backward()  # type: ignore[no-untyped-call]

    seconds = bench.seconds(step) / size
    model.zero_grad()
    return seconds


def _described(attack: Attack) -> str:
    """Radii as a person would write them."""
    shown = {key: f"{255 * value:.3g}/255" for key, value in attack.settings.items() if key in ("eps", "alpha")}
    settings = {key: shown.get(key, value) for key, value in attack.settings.items() if value is not None}
    return f"{type(attack).__name__}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
