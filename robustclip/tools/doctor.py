"""``robustclip doctor``: a dry run of a configuration, which finds before a long run what would stop or spoil it."""

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text
from torch import Tensor

from robustclip import display
from robustclip.attacks import PGD, Attack, Cost
from robustclip.data import CLIPDataModule
from robustclip.evaluation import RobustEvaluation
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.models.layers import frozen
from robustclip.tools.first_batches import INFO, OK, PROBLEM, WARNING, DataSet, Finding, examine
from robustclip.types import Batch

STYLES = {OK: "green", INFO: "cyan", WARNING: "yellow", PROBLEM: "bold red"}
SHOWN_PACKAGES = ("torch", "lightning", "open_clip_torch")
LITTLE_SPACE = 2**30  # bytes; results and examples of a test take some megabytes
UNIT_TOLERANCE = 0.02  # features of bf16 towers have norms within 2**-7 of 1
REPEATS, LONGEST = 5, 3.0  # a pass is timed this often, or for so many seconds
TYPICAL_CLASSES = 1000  # for the number of targets where no test set opens
ATTACK_STEPS = 2  # of the attacked batch that is timed
MOST_PASSES = 100  # of an attack that is tried whole, since its number of steps is not to be changed
SHORTEST = 1e-9  # factor that leaves one step of any attack


@dataclass
class Plan:
    """Objects of a run, as far as they could be built.

    Args:
        results: folder for the results.
        ckpt_path: checkpoint of the run.
        failures: error by the part that could not be built.
        model: None if it does not load.
        data: None if it could not be built.
        evaluation: None if it could not be built.
        trainer: None if it refuses this machine.
    """

    results: Path
    ckpt_path: str | None = None
    failures: dict[str, str] = field(default_factory=dict)
    model: RobustMethod | None = None
    data: CLIPDataModule | None = None
    evaluation: RobustEvaluation | None = None
    trainer: Trainer | None = None

    @property
    def device(self) -> torch.device:
        """Device of the run; the CPU if its trainer is refused."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device


def doctor(plan: Plan) -> int:
    """Prints every check of a planned run with its result.

    Args:
        plan: objects of the run.

    Returns:
        Number of problems, each of which would stop the run.
    """
    findings = list(check(plan))
    shown = Table(title="robustclip doctor")
    for title in ("check", "result", "detail"):
        shown.add_column(title, overflow="fold")
    for finding in findings:
        shown.add_row(finding.check, Text(finding.mark, style=STYLES[finding.mark]), finding.detail)
    problems = sum(finding.mark == PROBLEM for finding in findings)
    console = display.console()
    console.print(shown)
    console.print(f"{problems} problem{'' if problems == 1 else 's'}" if problems else "no problem found")
    return problems


def check(plan: Plan) -> Iterator[Finding]:
    """All checks, the cheap ones first."""
    yield from _environment()
    yield from _machine(plan)
    for part, why in plan.failures.items():
        yield Finding(part, PROBLEM, why)
    model, data, evaluation = plan.model, plan.data, plan.evaluation
    if model is not None:
        model.to(plan.device)
        yield from _model(model, plan.device)
    tests = trains = list[DataSet]()
    if data is not None:
        tests = yield from examine(data, "test", model, limit=evaluation.max_samples if evaluation else None)
    if data is not None and model is not None and not isinstance(model, ZeroShot):
        mark = PROBLEM if plan.ckpt_path is None else WARNING  # a test of trained weights needs no training set
        limit = evaluation.fit_max_samples if evaluation else None
        trains = yield from examine(data, "fit", model, limit=limit, mark=mark)
    if model is not None and data is not None and evaluation is not None:
        yield from Bench(model, data, evaluation, plan.trainer).findings(tests, trains)
    yield from _space(plan.results)


class _Timer(Callback):
    """Measures the seconds per image of training steps, and stops the fit when enough are measured."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Starts the clock."""
        self._start = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Stops the clock."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self.seconds.append((perf_counter() - self._start) / len(batch.labels))
        trainer.should_stop = sum(self.seconds) * len(batch.labels) > LONGEST


class Bench:
    """Times a clean batch, an attacked batch and a training step; run times follow by multiplication.

    Args:
        model: on its device.
        data: of the run; gives batch sizes and loader processes.
        evaluation: of the run; gives the attacks.
        trainer: gives precision and devices; None for one device in full precision.
    """

    def __init__(
        self, model: RobustMethod, data: CLIPDataModule, evaluation: RobustEvaluation, trainer: Trainer | None
    ) -> None:
        self.model, self.data, self.evaluation, self.trainer = model, data, evaluation, trainer
        self.device = next(model.parameters()).device
        self.world_size = 1 if trainer is None else trainer.world_size

    def findings(self, tests: Sequence[DataSet], trains: Sequence[DataSet]) -> Iterator[Finding]:
        """Attacks, batch size and times.

        Args:
            tests: that can be read.
            trains: training and validation sets that can be read.
        """
        if not self.evaluation.attacks:
            yield Finding("attacks", WARNING, "`evaluation.attacks` is empty, so only clean accuracy is measured")
        tests, validation = ([each for each in sets if _has_images(each)] for sets in (tests, trains[1:]))
        for name, attack in self.evaluation.attacks.items():
            yield self._attack(name, attack, tests)
        if tests:
            yield self._tried("time of test", "data.eval_batch_size", partial(self._test, tests))
        if trains and trains[0].kind == "training":
            size, count = self.data.batch_size, 1 if self.trainer is None else self.trainer.accumulate_grad_batches
            detail = f"{size * self.world_size * count:,} images per optimiser step: {size} x {self.world_size} devices"
            yield Finding("effective batch", OK, f"{detail} x {count} accumulated batches")
            yield self._tried("time of an epoch", "data.batch_size", partial(self._epoch, trains[0], validation))

    def _attack(self, name: str, attack: Attack, tests: Sequence[DataSet]) -> Finding:
        """Settings and cost of an attack, one step of which runs on two images."""
        cost = attack.cost(max((len(found.task.label_names) for found in tests), default=TYPICAL_CLASSES))
        passes = cost and f"at most {cost.gradient:,} gradient and {cost.forward:,} forward passes"
        detail = f"{_described(attack)}: {passes or 'unknown number of passes'} per image"
        try:
            short = attack.scaled(steps=SHORTEST) or (attack if cost and sum(cost) <= MOST_PASSES else None)
            if short is not None and tests:
                short(*self._inputs(tests[0], 2))
        except Exception as error:  # an attack of the user may raise anything
            return Finding(f"attack: {name}", PROBLEM, f"{detail}; it fails: {type(error).__name__}: {error}")
        return Finding(f"attack: {name}", OK if cost else INFO, detail)

    def _tried(self, check: str, setting: str, estimate: Callable[[], str]) -> Finding:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        try:
            detail = estimate()
        except torch.OutOfMemoryError:
            return Finding(check, PROBLEM, f"a batch does not fit into the GPU's memory; reduce {setting}")
        except (ValueError, OSError) as error:
            return Finding(check, PROBLEM, str(error))
        except Exception as error:  # of a method that needs the preparations of a whole fit, or a defect of the user's
            return Finding(check, WARNING, f"not known; it fails here with {type(error).__name__}: {error}")
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory"
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            used = torch.cuda.max_memory_allocated(self.device)
            memory += f", {used / 2**30:.1f} of {total / 2**30:.0f} GiB on the GPU"
        return Finding(check, INFO, f"{detail}; so far {memory}")

    def _test(self, tests: Sequence[DataSet]) -> str:
        """Time of the whole test."""
        seconds, rates = self._evaluation(self.evaluation.attacks, tests)
        left_out = [name for name, attack in self.evaluation.attacks.items() if attack.cost(2) is None]
        left_out += [found.task.name for found in tests if found.size is None]
        missing = f", and {', '.join(left_out)} on top" if left_out else ""
        return f"about {_duration(seconds)} without early stopping{missing}; {rates}"

    def _epoch(self, training: DataSet, validation: Sequence[DataSet]) -> str:
        """Time of an epoch of ``fit`` with its validation; trains the model for a few steps."""
        after = self._evaluation(self.evaluation.fit_attacks, validation)[0] if validation else 0.0
        timer = _Timer()
        place: Any = {"accelerator": "cpu" if self.device.type == "cpu" else "gpu", "devices": 1}
        place["precision"] = None if self.trainer is None else self.trainer.precision
        limits: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": REPEATS, "limit_val_batches": 0}
        fit = Trainer(**place, **limits, barebones=True, callbacks=[timer])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*barebones.*")  # it logs nothing, which is intended
            fit.fit(self.model, datamodule=self.data)
        rate = median(timer.seconds[1:] or timer.seconds)
        seconds = (training.size or 0) * self._with_loading(training, rate) / self.world_size
        return f"about {_duration(seconds)} of training and {_duration(after)} of validation; {1 / rate:,.0f} images/s"

    def _evaluation(self, attacks: Mapping[str, Attack], sets: Sequence[DataSet]) -> tuple[float, str]:
        """Seconds of an evaluation, and the measured rates."""
        largest = max(sets, key=lambda found: found.size or 0)
        forward, gradient = self._passes(largest)
        query, step = forward, gradient
        if self.evaluation.attack_precision == "bf16":  # images that survive bf16 are attacked once more in fp32
            query, step = (x + y for x, y in zip((query, step), self._passes(largest, in_bfloat16=True), strict=True))
        total = 0.0
        for found in sets:
            costs = [attack.cost(len(found.task.label_names)) or Cost(0, 0) for attack in attacks.values()]
            computing = forward + sum(cost.gradient * step + cost.forward * query + forward for cost in costs)
            total += (found.size or 0) * self._with_loading(found, computing) / self.world_size + found.head_seconds
        return total, f"{1 / forward:,.0f} images/s forward, {1 / gradient:,.0f} with gradient"

    def _passes(self, found: DataSet, *, in_bfloat16: bool = False) -> tuple[float, float]:
        """Seconds per image of a clean batch, and per image and step of an attacked one."""
        size, attack = min(self.data.eval_batch_size, found.size or self.data.eval_batch_size), PGD(steps=ATTACK_STEPS)
        images, forward, labels = self._inputs(found, size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bfloat16), frozen(self.model):
            with torch.no_grad():
                clean = self._seconds(lambda: forward(images))
            return clean / size, self._seconds(lambda: attack(images, forward, labels)) / size / ATTACK_STEPS

    def _inputs(self, found: DataSet, size: int) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
        """Images, model and labels for an attack; images are repeated where fewer were read."""
        assert found.batch is not None
        chosen = torch.arange(size) % len(found.batch.labels)
        images, labels = (values[chosen].to(self.device) for values in found.batch[:2])
        return images, lambda pixels: self.model.logits(pixels, found.task.name).float(), labels

    def _seconds(self, action: Callable[[], Any]) -> float:
        """Median time of a few runs after one to warm up, which is the result if it takes long."""
        times: list[float] = []
        while len(times) <= REPEATS and (not times or sum(times) < LONGEST):
            start = perf_counter()
            action()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(perf_counter() - start)
        return median(times[1:] or times)

    def _with_loading(self, found: DataSet, computing: float) -> float:
        """Seconds per image, of which loader processes hide the shorter part."""
        workers = self.data.num_workers
        return max(computing, found.load_seconds / workers) if workers else computing + found.load_seconds


def _has_images(found: DataSet) -> bool:
    """Whether a set has images, and not embeddings of ``robustclip cache``, which have no attacks."""
    return found.batch is not None and found.batch.images.ndim == 4


def _environment() -> Iterator[Finding]:
    wrong = []
    for text in importlib.metadata.requires("robustclip") or []:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        if version == "none" or not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name} must be {needed.specifier}, found {version}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN_PACKAGES)
    detail = "; ".join(wrong) or f"Python {platform.python_version()}, {versions}"
    yield Finding("versions", PROBLEM if wrong else OK, detail)


def _machine(plan: Plan) -> Iterator[Finding]:
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    gpus = f"GPUs: {', '.join(names)}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}" if names else "no GPU"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", OK, f"{usable} CPUs, {torch.get_num_threads()} threads; {gpus}")
    if plan.trainer is not None:
        trainer = plan.trainer
        is_idle = bool(names) and plan.device.type == "cpu"
        detail = f"{trainer.world_size} x {plan.device}, precision {trainer.precision}"
        yield Finding("trainer", WARNING if is_idle else OK, detail + ("; the GPU stays idle" if is_idle else ""))


def _model(model: RobustMethod, device: torch.device) -> Iterator[Finding]:
    model.freeze_the_rest()
    total = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    side = model.image_size
    name = model.clip.arch or model.clip.pretrained
    yield Finding(
        "model",
        OK,
        f"{type(model).__name__} on {name}: {total:,} parameters, {learning:,} learn; {side} x {side} pixels,"
        f" logit scale {float(model.clip.logit_scale.detach()):.1f}",
    )
    with frozen(model), torch.no_grad():
        features = model.image_features(torch.rand(2, 3, side, side, device=device)).float()
    if not bool(features.isfinite().all()):
        yield Finding("forward pass", PROBLEM, "image features are not finite; the weights may be damaged")
        return
    off = float((features.norm(dim=-1) - 1).abs().max())
    if off > UNIT_TOLERANCE:
        yield Finding("forward pass", PROBLEM, f"image features must have norm 1, found one that is off by {off:.3f}")
        return
    yield Finding("forward pass", OK, f"finite, {features.shape[-1]} unit features")


def _space(folder: Path) -> Iterator[Finding]:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Finding("results", PROBLEM, f"{place} cannot be written to; set results.folder")
        return
    free = shutil.disk_usage(place).free
    mark = OK if free >= LITTLE_SPACE else WARNING
    yield Finding("results", mark, f"{folder}: {free / 2**30:.1f} GiB free")


def _described(attack: Attack) -> str:
    """Radii as a person would write them."""
    shown = {key: f"{255 * value:.3g}/255" for key, value in attack.settings.items() if key in ("eps", "alpha")}
    settings = {key: shown.get(key, value) for key, value in attack.settings.items() if value is not None}
    return f"{type(attack).__name__}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
