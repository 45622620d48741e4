"""``robustclip doctor``: what would stop or spoil a long run, found before it starts."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from robustclip import display
from robustclip.data import CLIPDataModule
from robustclip.evaluation import RobustEvaluation
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.models.layers import frozen
from robustclip.tools.datasets import Examined, examine
from robustclip.tools.estimate import Bench, attack_findings, estimate_epoch, estimate_test
from robustclip.tools.findings import INFO, OK, PROBLEM, WARNING, Finding

SHOWN_PACKAGES = ("torch", "lightning", "open_clip_torch")
LITTLE_SPACE = 2**30  # bytes; results and examples of a test take some megabytes
UNIT_TOLERANCE = 0.02  # features of bf16 towers have norms within 2**-7 of 1
STYLES = {OK: "green", INFO: "cyan", WARNING: "yellow", PROBLEM: "bold red"}


@dataclass
class Plan:
    """What a run would be made of, as far as it could be built.

    Args:
        results: folder that results would go to.
        ckpt_path: checkpoint of the run.
        failures: what part could not be built, and why.
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
        """Where the run would compute; the CPU if its trainer is refused."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device


def doctor(plan: Plan) -> int:
    """Prints every check of a planned run with its result.

    Args:
        plan: what the run would be made of.

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
    console.print(f"{problems} problem{'' if problems == 1 else 's'}" if problems else "nothing stands in the way")
    return problems


def check(plan: Plan) -> Iterator[Finding]:
    """All checks, the cheap ones first."""
    yield from _environment()
    yield from _machine(plan)
    for part, why in plan.failures.items():
        yield Finding(part, PROBLEM, why)
    if plan.model is not None:
        plan.model.to(plan.device)
        yield from _model(plan.model, plan.device, plan.trainer)
    tests, trains = yield from _data(plan)
    if plan.model is not None and plan.evaluation is not None and plan.data is not None:
        yield from attack_findings(plan.evaluation.attacks, tests)
        bench = Bench(plan.model, plan.data, plan.trainer)
        if tests:
            yield estimate_test(bench, plan.evaluation, tests)
        if trains:
            yield estimate_epoch(bench, plan.evaluation, trains)
    yield from _space(plan.results)


def _data(plan: Plan) -> Generator[Finding, None, tuple[list[Examined], list[Examined]]]:
    """Looks at the sets of ``test``, and at those of ``fit`` for a method that learns."""
    if plan.data is None:
        return [], []
    plan.data.max_samples = plan.evaluation.max_samples if plan.evaluation else None
    tests = yield from examine(plan.data, "test", plan.model)
    if plan.model is None or isinstance(plan.model, ZeroShot):
        return tests, []
    plan.data.max_samples = plan.evaluation.fit_max_samples if plan.evaluation else None
    # A test of trained weights can do without the training set.
    return tests, (yield from examine(plan.data, "fit", plan.model, lenient=plan.ckpt_path is not None))


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


def _model(model: RobustMethod, device: torch.device, trainer: Trainer | None) -> Iterator[Finding]:
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
