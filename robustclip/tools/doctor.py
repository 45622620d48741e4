"""Runs a configuration dry for ``robustclip doctor``, to find problems before a long run."""

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
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from robustclip import display
from robustclip.attacks import PGD, Attack, Cost
from robustclip.data import CLIPDataModule
from robustclip.data.batch_sizes import Pieces
from robustclip.evaluation import RobustEvaluation
from robustclip.evaluation.precision_ladder import rungs
from robustclip.evaluation.probes import passes_of_probes
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.models.layers import frozen
from robustclip.models.tf32 import tf32
from robustclip.tools.first_batches import INFO, OK, PROBLEM, WARNING, DataSet, Finding, examine
from robustclip.types import Batch

STYLES = {OK: "green", INFO: "cyan", WARNING: "yellow", PROBLEM: "bold red"}
SHOWN_PACKAGES = ("torch", "lightning", "open_clip_torch")
ENOUGH_SPACE = 2**30  # bytes; results and adversarial examples of a test take some megabytes
UNIT_TOLERANCE = 0.02  # features of bf16 towers have norms within 2**-7 of 1
REPEATS, LONGEST = 5, 3.0  # most repetitions and seconds of a timing
TYPICAL_CLASSES = 1000  # number of classes where no test set opens
ATTACK_STEPS = 2  # of the attacked batch that is timed
MOST_PASSES = 100  # of an attack that runs whole, since its number of steps cannot be changed
SHORTEST = 1e-9  # factor that reduces any attack to one step


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
    table = Table(*(Column(name, overflow="fold") for name in ("check", "result", "detail")), title="robustclip doctor")
    for finding in findings:
        table.add_row(finding.check, Text(finding.mark, style=STYLES[finding.mark]), finding.detail)
    problems = sum(finding.mark == PROBLEM for finding in findings)
    console = display.console()
    console.print(table)
    console.print(f"{problems} problem{'' if problems == 1 else 's'}" if problems else "no problem found")
    return problems


def check(plan: Plan) -> Iterator[Finding]:
    """Runs all checks, the cheap ones first."""
    yield _versions()
    yield from _machine(plan)
    for part, error in plan.failures.items():
        yield Finding(part, PROBLEM, error)
    model, data, evaluation = plan.model, plan.data, plan.evaluation
    if model is not None:
        model.to(plan.device)
        yield from _model(model, plan.device)
    if data is not None:
        if (trainer := plan.trainer) is not None:
            data.share_out(Pieces(trainer.world_size, trainer.accumulate_grad_batches))
        tests = yield from examine(data, "test", model, limit=evaluation.max_samples if evaluation else None)
        trains: list[DataSet] = []
        if model is not None and not isinstance(model, ZeroShot):
            mark = PROBLEM if plan.ckpt_path is None else WARNING  # a test of trained weights needs no training set
            limit = evaluation.fit_max_samples if evaluation else None
            trains = yield from examine(data, "fit", model, limit=limit, mark=mark)
        if model is not None and evaluation is not None:
            yield from Bench(model, data, evaluation, plan.trainer).findings(tests, trains)
    yield _space(plan.results)


class _Timer(Callback):
    """Measures the seconds per image of training steps, and stops the fit after enough of them.

    Args:
        device: device of the fit.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, list[float]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Starts the clock."""
        self._start = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Stops the clock."""
        self.seconds.append(_elapsed(self._start, self.device) / len(batch.labels))
        trainer.should_stop = sum(self.seconds) * len(batch.labels) > LONGEST


class Bench:
    """Times a clean batch, an attacked batch and a training step; run times follow by multiplication.

    Args:
        model: model on its device.
        data: data of the run, with batch sizes and loader processes.
        evaluation: evaluation of the run, with the attacks.
        trainer: trainer of the run, with precision and devices; None for one device in full precision.
    """

    def __init__(
        self, model: RobustMethod, data: CLIPDataModule, evaluation: RobustEvaluation, trainer: Trainer | None
    ) -> None:
        self.model, self.data, self.evaluation, self.trainer = model, data, evaluation, trainer
        self.device = next(model.parameters()).device
        self.learning_rates: list[float] = []  # of the parameter groups, known after a fit of a few steps
        self.world_size = 1 if trainer is None else trainer.world_size

    def findings(self, tests: Sequence[DataSet], trains: Sequence[DataSet]) -> Iterator[Finding]:
        """Reports attacks, batch size and times.

        Args:
            tests: readable test sets.
            trains: readable training and validation sets, the training set first.
        """
        if not self.evaluation.attacks:
            yield Finding("attacks", WARNING, "`evaluation.attacks` is empty, so only clean accuracy is measured")
        # Embeddings of `robustclip cache` have two dimensions and no attacks.
        tests, validation = ([s for s in sets if s.batch and s.batch.images.ndim == 4] for sets in (tests, trains[1:]))
        for name, attack in self.evaluation.attacks.items():
            yield self._attack(name, attack, tests)
        if tests:
            yield self._estimate("time of test", "data.eval_batch_size", partial(self._test, tests))
        if trains and trains[0].kind == "training":
            size, (processes, accumulated) = self.data.batch_size, self.data.pieces
            detail = f"{size * processes * accumulated:,} images per optimiser step: {size} x {processes} devices"
            yield Finding("effective batch", OK, f"{detail} x {accumulated} accumulated batches")
            setting = "data.batch_size or raise trainer.accumulate_grad_batches"
            yield self._estimate("time of an epoch", setting, partial(self._epoch, trains[0], validation))
            yield self._schedule(trains[0], size * processes * accumulated)

    def _attack(self, name: str, attack: Attack, tests: Sequence[DataSet]) -> Finding:
        """Reports settings and cost of an attack, and runs one step of it on two images."""
        cost = attack.cost(max((len(data_set.task.label_names) for data_set in tests), default=TYPICAL_CLASSES))
        passes = cost and f"at most {cost.gradient:,} gradient and {cost.forward:,} forward passes"
        detail = f"{_described(attack)}: {passes or 'unknown number of passes'} per image"
        aimed = attack
        try:
            for data_set in reversed(tests):
                aimed = attack.aimed_at(data_set.task.name, data_set.task.label_names)
            short = aimed.scaled(steps=SHORTEST) or (aimed if cost and sum(cost) <= MOST_PASSES else None)
            if short is not None and tests:
                short(*self._inputs(tests[0], 2))
        except Exception as error:  # an attack of the user may raise anything
            return Finding(f"attack: {name}", PROBLEM, f"{detail}; it fails: {type(error).__name__}: {error}")
        return Finding(f"attack: {name}", OK if cost else INFO, detail)

    def _estimate(self, check: str, setting: str, estimate: Callable[[], str]) -> Finding:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        try:
            detail = estimate()
        except torch.OutOfMemoryError:
            return Finding(check, PROBLEM, f"a batch does not fit into the GPU's memory; reduce {setting}")
        except (ValueError, OSError) as error:
            return Finding(check, PROBLEM, str(error))
        except Exception as error:  # the method needs the preparations of a whole fit, or has a defect
            return Finding(check, WARNING, f"not known; it fails here with {type(error).__name__}: {error}")
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory"
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            used = torch.cuda.max_memory_allocated(self.device)
            memory += f", {used / 2**30:.1f} of {total / 2**30:.0f} GiB on the GPU"
        return Finding(check, INFO, f"{detail}; so far {memory}")

    def _test(self, tests: Sequence[DataSet]) -> str:
        """Estimates the time of the whole test."""
        seconds, rates = self._evaluation(self.evaluation.attacks, tests, probed=self.evaluation.probes)
        unknown = [name for name, attack in self.evaluation.attacks.items() if attack.cost(2) is None]
        unknown += [data_set.task.name for data_set in tests if data_set.size is None]
        unknown += ["all ways through model.defence"] if self.model.defence is not None else []
        missing = f", and {', '.join(unknown)} on top" if unknown else ""
        return f"about {_duration(seconds)} without early stopping{missing}; {rates}"

    def _epoch(self, training: DataSet, validation: Sequence[DataSet]) -> str:
        """Estimates the time of an epoch of ``fit`` with its validation; trains the model for a few steps."""
        after = self._evaluation(self.evaluation.fit_attacks, validation)[0] if validation else 0.0
        timer = _Timer(self.device)
        options: dict[str, Any] = {"accelerator": "cpu" if self.device.type == "cpu" else "gpu", "devices": 1}
        options["precision"] = None if self.trainer is None else self.trainer.precision
        options |= {"max_epochs": 1, "limit_train_batches": REPEATS, "limit_val_batches": 0}
        fit = Trainer(**options, barebones=True, callbacks=[timer])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*barebones.*")  # it logs nothing, which is intended
            fit.fit(self.model, datamodule=self.data)
        groups = [group for optimizer in fit.optimizers for group in optimizer.param_groups]
        self.learning_rates = sorted({float(group.get("initial_lr", group["lr"])) for group in groups})
        rate = median(timer.seconds[1:] or timer.seconds)
        seconds = (training.size or 0) * self._with_loading(training, rate) / self.world_size
        return f"about {_duration(seconds)} of training and {_duration(after)} of validation; {1 / rate:,.0f} images/s"

    def _schedule(self, training: DataSet, images: int) -> Finding:
        """Reports the steps of the run, and the learning rate that results."""
        size, warmup, trainer = training.size or 0, self.model.warmup_steps, self.trainer
        steps = size // images if self.data.drop_last else -(-size // images)
        limits = [] if trainer is None else [steps * (trainer.max_epochs or -1), trainer.max_steps]
        total = min((limit for limit in limits if limit > 0), default=None)
        run = "no number of steps in the run" if total is None else f"{total:,} in the run"
        rates = " and ".join(f"{rate:.3g}" for rate in self.learning_rates) or "not known"
        detail = f"{steps:,} steps per epoch, {run}; learning rate {rates}"
        detail += f" after {warmup:,} steps of warm-up" if warmup else ""
        if total is not None and warmup >= total:
            return Finding("schedule", WARNING, f"{detail}, more than the run has; change model.warmup_steps")
        return Finding("schedule", OK, detail)

    def _evaluation(
        self, attacks: Mapping[str, Attack], sets: Sequence[DataSet], *, probed: int = 0
    ) -> tuple[float, str]:
        """Estimates the seconds of an evaluation with its probes per set, and describes the measured rates."""
        largest = max(sets, key=lambda data_set: data_set.size or 0)
        forward, gradient = self._passes(largest)
        query, step = forward, gradient
        for precision in rungs(self.evaluation.attack_precision, self.device.type):  # survivors are attacked in each
            with tf32(is_allowed=precision == "tf32"):
                cheaper = self._passes(largest, in_bfloat16=precision == "bf16")
            query, step = query + cheaper[0], step + cheaper[1]
        total = 0.0
        for data_set in sets:
            costs = [attack.cost(len(data_set.task.label_names)) or Cost(0, 0) for attack in attacks.values()]
            computing = forward + sum(cost.gradient * step + cost.forward * query + forward for cost in costs)
            loaded = (data_set.size or 0) * self._with_loading(data_set, computing)
            probing = min(probed, data_set.size or 0) * passes_of_probes([cost.gradient for cost in costs]) * step
            total += (loaded + probing) / self.world_size + data_set.head_seconds
        return total, f"{1 / forward:,.0f} images/s forward, {1 / gradient:,.0f} with gradient"

    def _passes(self, data_set: DataSet, *, in_bfloat16: bool = False) -> tuple[float, float]:
        """Times a clean batch per image, and an attacked batch per image and step."""
        size = min(self.data.eval_batch_size, data_set.size or self.data.eval_batch_size)
        attack, (images, forward, labels) = PGD(steps=ATTACK_STEPS), self._inputs(data_set, size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bfloat16), frozen(self.model):
            with torch.no_grad():
                clean = self._seconds(lambda: forward(images))
            return clean / size, self._seconds(lambda: attack(images, forward, labels)) / size / ATTACK_STEPS

    def _inputs(self, data_set: DataSet, size: int) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
        """Gives images, model and labels for an attack, and repeats images where fewer were read."""
        assert data_set.batch is not None
        chosen = torch.arange(size) % len(data_set.batch.labels)
        images, labels = (values[chosen].to(self.device) for values in data_set.batch[:2])
        return images, lambda pixels: self.model.logits(pixels, data_set.task.name).float(), labels

    def _seconds(self, action: Callable[[], Any]) -> float:
        """Returns the median time of a few runs after one to warm up, or the time of that one if it takes long."""
        times: list[float] = []
        while len(times) <= REPEATS and (not times or sum(times) < LONGEST):
            start = perf_counter()
            action()
            times.append(_elapsed(start, self.device))
        return median(times[1:] or times)

    def _with_loading(self, data_set: DataSet, computing: float) -> float:
        """Adds the loading time to the seconds per image; with loader processes, the longer of the two counts."""
        workers = self.data.num_workers
        return max(computing, data_set.load_seconds / workers) if workers else computing + data_set.load_seconds


def _elapsed(start: float, device: torch.device) -> float:
    """Returns the seconds since a start, after all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def _versions() -> Finding:
    wrong = []
    for requirement in map(Requirement, importlib.metadata.requires("robustclip") or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = importlib.metadata.distributions(name=requirement.name)
        version = next((distribution.version for distribution in installed), None)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} must be {requirement.specifier}, found {version or 'none'}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN_PACKAGES)
    detail = "; ".join(wrong) or f"Python {platform.python_version()}, {versions}"
    return Finding("versions", PROBLEM if wrong else OK, detail)


def _machine(plan: Plan) -> Iterator[Finding]:
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    gpus = f"GPUs: {', '.join(names)}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}" if names else "no GPU"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", OK, f"{usable} CPUs, {torch.get_num_threads()} threads; {gpus}")
    if plan.trainer is not None:
        is_idle = bool(names) and plan.device.type == "cpu"
        detail = f"{plan.trainer.world_size} x {plan.device}, precision {plan.trainer.precision}"
        yield Finding("trainer", WARNING if is_idle else OK, detail + ("; the GPU stays idle" if is_idle else ""))


def _model(model: RobustMethod, device: torch.device) -> Iterator[Finding]:
    model.freeze_untrained()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    clip, side = model.clip, model.image_size
    name, scale = f"{type(model).__name__} on {clip.arch or clip.pretrained}", float(clip.logit_scale.detach())
    detail = f"{name}: {total:,} parameters, {trained:,} trained; {side} x {side} pixels, logit scale {scale:.1f}"
    yield Finding("model", OK, detail)
    with frozen(model), torch.no_grad():
        features = model.image_features(torch.rand(2, 3, side, side, device=device)).float()
    error = float((features.norm(dim=-1) - 1).abs().max())
    if not bool(features.isfinite().all()):
        yield Finding("forward pass", PROBLEM, "image features are not finite; the weights may be damaged")
    elif error > UNIT_TOLERANCE:
        yield Finding("forward pass", PROBLEM, f"image features must have norm 1, found one that is off by {error:.3f}")
    else:
        yield Finding("forward pass", OK, f"finite, {features.shape[-1]} unit features")


def _space(folder: Path) -> Finding:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Finding("results", PROBLEM, f"{place} cannot be written to; set results.folder")
    free = shutil.disk_usage(place).free
    return Finding("results", OK if free >= ENOUGH_SPACE else WARNING, f"{folder}: {free / 2**30:.1f} GiB free")


def _described(attack: Attack) -> str:
    """Describes an attack with radii in 255ths."""
    radii = {key: f"{255 * value:.3g}/255" for key, value in attack.settings.items() if key in ("eps", "alpha")}
    settings = {key: radii.get(key, value) for key, value in attack.settings.items() if value is not None}
    return f"{type(attack).__name__}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
