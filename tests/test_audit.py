"""The audit: deliberate breakages lower the grade, each by the check that is meant for it; what is intact passes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.attacks import PGD, Attack, Recipe, Square, TorchAttack
from robustclip.attacks.base import Forward, Loss
from robustclip.attacks.verdict import _Watch
from robustclip.callbacks import ResultsWriter, RobustEvaluation, evaluation
from robustclip.callbacks.checks import GRADES
from robustclip.data import CLIPDataModule
from robustclip.methods import RobustMethod, TeCoA, ZeroShot
from robustclip.runs import Run
from robustclip.types import Task

QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip
TASKS = ("outlines", "mosaics")  # the model is right about most of their samples, and sure of few
SAMPLES = 48  # of each; two of them are probed
SETTINGS: dict[str, Any] = {"eps": "5/255", "alpha": "1.25/255", "steps": 10}  # of the shapes demo
CLASSES = 12  # of each of the tasks


def run_test(
    folder: Path,
    method: RobustMethod,
    attack: Attack,
    *,
    tasks: Sequence[str] = TASKS,
    max_samples: int = SAMPLES,
    batch_size: int = 64,
    baseline: Path | None = None,
    **options: Any,
) -> Run:
    """A test as the command runs it."""
    writer = ResultsWriter(str(folder), baseline=None if baseline is None else str(baseline))
    callbacks = [RobustEvaluation({"pgd": attack}, max_samples=max_samples, **options), writer]
    data = CLIPDataModule(train="shapes:source", test=[f"shapes:{task}" for task in tasks], batch_size=batch_size)
    Trainer(callbacks=callbacks, **QUIET).test(method, datamodule=data, verbose=False)
    assert writer.path is not None
    return Run.open(writer.path)


def statuses(run: Run, *, but: str = "pass") -> dict[str, str]:
    """Checks by name, without those of one status."""
    return {each["name"]: each["status"] for each in run.result["audit"]["checks"] if each["status"] != but}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The undefended model under PGD."""
    return run_test(tmp_path_factory.mktemp("intact"), ZeroShot(), PGD(**SETTINGS))


# Attacks with a mistake


class WrongSign(PGD):
    def perturb(self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, **kwargs: Any) -> Tensor:
        return super().perturb(images, forward, targets, lambda *given: -loss(*given), **kwargs)


class HalfMean(PGD):
    """The mean over the batch in half precision, and no loss scaling."""

    def perturb(self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, **kwargs: Any) -> Tensor:
        return super().perturb(images, forward, targets, lambda z, y: F.cross_entropy(z.half(), y)[None], **kwargs)


class NormalisedOutside(PGD):
    def perturb(self, images: Tensor, forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        return super().perturb(images, lambda x: forward(normalised(x)), *args, **kwargs)


class NormalisedImages(PGD):
    """Searches around normalised images, as papers' code does, but with the radius and the box of raw ones."""

    def perturb(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().perturb(normalised(images), *args, **kwargs)


class ReturnsClean(PGD):
    """Searches on the side and returns what it was given."""

    is_anytime = False

    def perturb(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        super().perturb(images, *args, **kwargs)
        return images


class ReturnsNaN(PGD):
    is_anytime = False

    def perturb(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().perturb(images, *args, **kwargs) * torch.nan


class LeavesHalf(PGD):
    """Attacks every other sample of a batch."""

    def perturb(self, images: Tensor, forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        chosen = (torch.arange(len(images)) % 2 == 0).view(-1, 1, 1, 1)
        attacked = super().perturb(images, lambda x: forward(torch.where(chosen, x, images)), *args, **kwargs)
        return torch.where(chosen, attacked, images)


class WrongLabels(PGD):
    def perturb(self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, **kwargs: Any) -> Tensor:
        return super().perturb(images, forward, (targets + 1) % CLASSES, loss, **kwargs)


class OtherRadius(PGD):
    """Names one radius and uses another."""

    factor = 255.0

    def perturb(self, *args: Any, **kwargs: Any) -> Tensor:
        vars(twin := PGD(**SETTINGS)).update(eps=self.eps * self.factor, alpha=self.alpha * self.factor)
        return twin.perturb(*args, **kwargs)


class SmallerRadius(OtherRadius):
    factor = 1 / 255


def grey_levels() -> PGD:
    """What `PGD(eps=5)` would be if it were not refused."""
    return PGD(**SETTINGS)._changed(eps=5.0, alpha=1.25)


# Models with a mistake, or with a defence that only blinds the attack


class Detached(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        return super().image_features(images.detach())


class NoTemperature(ZeroShot):
    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        return super().logits(images, task) / self.clip.logit_scale


class NormalisedTwice(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        return super().image_features((images - self.clip.mean) / self.clip.std)


class Noisy(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        return super().image_features(images + 0.05 * torch.randn_like(images))


class Dropout(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(F.dropout(super().image_features(images), 0.1), dim=-1)


class WholeBatch(ZeroShot):
    """Centres each batch, as adaptation at test time does."""

    def image_features(self, images: Tensor) -> Tensor:
        features = super().image_features(images)
        return F.normalize(features - 0.5 * features.mean(0), dim=-1)


class SometimesNaN(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        is_dark = images.mean((1, 2, 3)) < 0.4
        return super().image_features(images).masked_fill(is_dark[:, None], torch.nan)


class Quantised(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        return super().image_features((images * 32).round() / 32)


class Misleading(torch.autograd.Function):
    """The identity, whose gradient has wrong signs where a hash of the pixel says so."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.save_for_backward(images)
        return images.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (images,) = ctx.saved_tensors
        return gradient * (images * 1e4).sin().sign()


class Masked(ZeroShot):
    def image_features(self, images: Tensor) -> Tensor:
        return super().image_features(Misleading.apply(images))


class Saturated(ZeroShot):
    """Logits so large that cross-entropy is flat: right, repeatable, and without a gradient."""

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        return 1e4 * super().logits(images, task)


class Collapsed(ZeroShot):
    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        logits = super().logits(images, task)
        return logits + 1000 * F.one_hot(torch.tensor(0), logits.shape[1])


class OtherOrder(ZeroShot):
    def class_features(self, task: Task) -> Tensor:
        return super().class_features(task).roll(1, 0)


def normalised(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25


# Evaluations with a mistake


@contextlib.contextmanager
def not_frozen(model: nn.Module) -> Iterator[None]:
    """Training mode, BatchNorm included."""
    # Not the last BatchNorm, which sees one pixel and refuses batches of one.
    last = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    modes = {module: module.training for module in model.modules() if module is not last}
    for module in modes:
        module.training = True
    yield
    for module, mode in modes.items():
        module.training = mode


def in_training_mode(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(evaluation, "frozen", not_frozen)


def judged_clean(patch: pytest.MonkeyPatch) -> None:
    judge = _Watch._judge

    def on_clean(self: _Watch, seen: Tensor, logits: Tensor, *, is_final: bool) -> None:
        clean = self.images[self.rows]
        judge(self, clean, self.forward(clean), is_final=is_final)

    patch.setattr(_Watch, "_judge", on_clean)


@dataclass(frozen=True)
class Breakage:
    """What is broken, and the check that must notice it."""

    check: str
    status: str
    method: Callable[[], RobustMethod] = ZeroShot
    attack: Callable[[], Attack] = lambda: PGD(**SETTINGS)
    patch: Callable[[pytest.MonkeyPatch], None] = lambda _: None
    options: tuple[tuple[str, Any], ...] = ()


def small(recipe: str) -> Recipe:
    return Recipe(recipe, "5/255", budget=0.05)  # type: ignore[arg-type]


SURE = (("tasks", ("sizes",)), ("max_samples", 192), ("batch_size", 256))  # half of the losses are below 0.002
BREAKAGES = {
    "wrong sign": Breakage("loss_rises", "fail", attack=lambda: WrongSign(**SETTINGS)),
    "detached graph": Breakage("pixel_gradients", "fail", Detached),
    "mean in half precision": Breakage("pixel_gradients", "fail", attack=lambda: HalfMean(**SETTINGS), options=SURE),
    "saturated loss": Breakage("pixel_gradients", "fail", Saturated),
    "no temperature": Breakage("logit_scale", "warn", NoTemperature),
    "normalised again in the attack": Breakage("ball_and_box", "fail", attack=lambda: NormalisedOutside(**SETTINGS)),
    "attack around normalised images": Breakage("ball_and_box", "fail", attack=lambda: NormalisedImages(**SETTINGS)),
    "normalised again in the method": Breakage("normalised_once", "warn", NormalisedTwice),
    "attack returns clean images": Breakage("uses_radius", "fail", attack=lambda: ReturnsClean(**SETTINGS)),
    "verdict on clean images": Breakage("uses_radius", "fail", patch=judged_clean),
    "half of the samples attacked": Breakage("uses_radius", "fail", attack=lambda: LeavesHalf(**SETTINGS)),
    "wrong labels": Breakage("loss_rises", "fail", attack=lambda: WrongLabels(**SETTINGS)),
    "radius in grey levels": Breakage("radius", "warn", attack=grey_levels),
    "radius 255 times too large": Breakage("ball_and_box", "fail", attack=lambda: OtherRadius(**SETTINGS)),
    "radius 255 times too small": Breakage("uses_radius", "fail", attack=lambda: SmallerRadius(**SETTINGS)),
    "radius divided twice": Breakage("radius", "warn", attack=lambda: PGD(5 / 255**2, 1.25 / 255**2, 10)),
    "noise only": Breakage("pixel_gradients", "fail", attack=lambda: PGD("5/255", "1.25/255", steps=0)),
    "training mode": Breakage("repeatable", "fail", patch=in_training_mode),
    "dropout": Breakage("repeatable", "fail", Dropout),
    "statistics of the batch": Breakage("repeatable", "fail", WholeBatch),
    "randomised defence": Breakage("repeatable", "fail", Noisy),
    "NaN for some samples": Breakage("finite", "fail", SometimesNaN),
    "NaN from the attack": Breakage("finite", "fail", attack=lambda: ReturnsNaN(**SETTINGS)),
    "quantised input": Breakage("pixel_gradients", "fail", Quantised),
    "masked gradients, by the loss": Breakage("loss_rises", "fail", Masked),
    "masked gradients, by random search": Breakage("black_box", "fail", Masked, lambda: small("cascade")),
    "collapsed model": Breakage("predictions_vary", "warn", Collapsed),
    "classes in another order": Breakage("better_than_chance", "warn", OtherOrder),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_breakage_lowers_the_grade(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intact: Run) -> None:
    case = BREAKAGES[name]
    case.patch(monkeypatch)
    run = run_test(tmp_path, case.method(), case.attack(), **dict(case.options))
    print(
        run.result["audit"]["grade"],
        statuses(run),
        {k: v["acc1"] for k, v in run.result["mean"].items()},
        [c["found"] for c in run.result["audit"]["checks"] if c["name"] == case.check],
    )
    assert statuses(run).get(case.check) == case.status
    grades = list(GRADES.values())
    assert grades.index(run.result["audit"]["grade"]) > grades.index(intact.result["audit"]["grade"])


def test_intact_attack_passes(intact: Run) -> None:
    assert statuses(intact) == {"black_box": "not_measured", "any_radius": "not_measured"}
    assert intact.result["audit"]["grade"] == "B"
