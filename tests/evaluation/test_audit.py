"""The audit: deliberate breakages lower the grade, each by the check that is meant for it; what is intact passes."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import quick_trainer
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.attacks import APGD, PGD, Attack, Recipe, Square, TorchAttack
from robustclip.attacks.attack import Forward, Loss
from robustclip.cli.main import run as main
from robustclip.data import CLIPDataModule
from robustclip.evaluation import ResultsWriter, RobustEvaluation, engine, robust
from robustclip.evaluation.audit import GRADES, AuditCheck, Check
from robustclip.evaluation.checks import CHECKS
from robustclip.evaluation.engine import Verdict, _Watch
from robustclip.evaluation.evidence import Evidence
from robustclip.evaluation.gradient_probes import gradients
from robustclip.evaluation.grading import audit, checks_at
from robustclip.evaluation.precision_ladder import ladder
from robustclip.evaluation.ways import Ways
from robustclip.methods import RobustMethod, TeCoA, ZeroShot
from robustclip.results.run import Run
from robustclip.types import Task, TrainingImages

TASKS = ("outlines",)  # the model is right about two thirds of its samples, and sure of few
SAMPLES = 32  # with 8 probes, the gradients of two or so are examined
SETTINGS: dict[str, Any] = {"eps": "5/255", "alpha": "1.25/255", "steps": 10}  # of the shapes demo
CLASSES = 12


def run_test(
    folder: Path,
    method: RobustMethod,
    attack: Attack,
    *,
    tasks: Sequence[str] = TASKS,
    max_samples: int = SAMPLES,
    batch_size: int = 64,
    baseline: Path | None = None,
    is_undefended: bool | None = None,
    **options: Any,
) -> Run:
    """A test as the command runs it; subclasses of ZeroShot with a mistake are declared undefended, as it is."""
    is_undefended = isinstance(method, ZeroShot) if is_undefended is None else is_undefended
    writer = ResultsWriter(
        str(folder), baseline=None if baseline is None else str(baseline), is_undefended=is_undefended
    )
    callbacks = [RobustEvaluation({"pgd": attack}, max_samples=max_samples, **options), writer]
    data = CLIPDataModule(train="shapes:source", test=[f"shapes:{task}" for task in tasks], batch_size=batch_size)
    quick_trainer(*callbacks).test(method, datamodule=data, verbose=False)
    assert writer.path is not None
    return Run.open(writer.path)


def statuses(run: Run, *, but: str = "pass") -> dict[str, str]:
    """Checks by name, without those of one status."""
    return {each["name"]: each["status"] for each in run.result["audit"]["checks"] if each["status"] != but}


def rank(run: Run) -> int:
    """Of a run's grade, 0 the best."""
    return list(GRADES.values()).index(run.result["audit"]["grade"])


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
    """The identity, whose gradient has wrong signs at pixels that a hash selects."""

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
    # The last ones see one pixel, and refuse batches of one.
    late = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][4:]
    modes = {module: module.training for module in model.modules() if module not in late}
    for module in modes:
        module.training = True
    yield
    for module, mode in modes.items():
        module.training = mode


def in_training_mode(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(robust, "frozen", not_frozen)


def judged_clean(patch: pytest.MonkeyPatch) -> None:
    judge = _Watch._judge

    def on_clean(self: _Watch, seen: Tensor, logits: Tensor, *, is_final: bool) -> None:
        clean = self.images[self.rows]
        judge(self, clean, self.forward(clean), is_final=is_final)

    patch.setattr(_Watch, "_judge", on_clean)


def without_last_rung(patch: pytest.MonkeyPatch) -> None:
    """Takes robust in bf16 for robust."""
    run = _Watch.run
    patch.setattr(_Watch, "run", lambda self, *args: None if self.is_exact else run(self, *args))


def without_confirmation(patch: pytest.MonkeyPatch) -> None:
    """Takes misclassified in bf16 for misclassified."""
    patch.setattr(_Watch, "_confirm", lambda self, seen, is_misclassified, logits: is_misclassified)


def everything_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Gives the engine the model in bf16 as the one that decides."""

    def examine(images: Tensor, labels: Tensor, forward: Forward, *args: Any, **options: Any) -> Verdict:
        rung = ladder(forward, ["bf16"], "cpu")[0]
        return engine.examine(images, labels, rung.forward, *args, **options)

    patch.setattr(robust, "examine", examine)


@dataclass(frozen=True)
class Breakage:
    """A defect of a model or an attack, and the check that must report it."""

    check: str
    status: str
    method: Callable[[], RobustMethod] = ZeroShot
    attack: Callable[[], Attack] = lambda: PGD(**SETTINGS)
    patch: Callable[[pytest.MonkeyPatch], None] = lambda _: None
    options: tuple[tuple[str, Any], ...] = ()


def small_cascade() -> Recipe:
    return Recipe("cascade", "5/255", budget=0.02)


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
    "masked gradients, by random search": Breakage(
        "black_box", "fail", Masked, small_cascade, options=(("tasks", ("outlines",)),)
    ),
    "no attack in fp32": Breakage(
        "fp32_verdict",
        "fail",
        attack=lambda: PGD("1/255", "0.5/255", 10),
        patch=without_last_rung,
        options=(("attack_precision", "bf16"),),
    ),
    "successes in bf16 count": Breakage(
        "fp32_verdict", "fail", patch=without_confirmation, options=(("attack_precision", "bf16"),)
    ),
    "verdicts in bf16": Breakage("fp32_verdict", "fail", patch=everything_in_bfloat16),
    "collapsed model": Breakage("predictions_vary", "warn", Collapsed),
    "classes in another order": Breakage("better_than_chance", "warn", OtherOrder),
}


OFTEN = {"wrong sign", "wrong labels", "quantised input", "verdict on clean images", "half of the samples attacked"}


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in BREAKAGES]
)
def test_breakage_lowers_the_grade(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intact: Run) -> None:
    case = BREAKAGES[name]
    case.patch(monkeypatch)
    run = run_test(tmp_path, case.method(), case.attack(), **{"probes": 8, **dict(case.options)})
    assert statuses(run).get(case.check) == case.status
    assert rank(run) > rank(intact)


def test_intact_attack_passes(intact: Run) -> None:
    assert statuses(intact) == {"black_box": "not_measured", "full_recipe": "not_measured"}
    assert intact.result["audit"]["grade"] == "B"


def test_a_short_recipe_passes_every_check_but_that_of_its_length(tmp_path: Path) -> None:
    run = run_test(tmp_path, ZeroShot(), small_cascade(), max_samples=32)
    assert statuses(run) == {"full_recipe": "not_measured"}
    assert run.result["audit"]["grade"] == "B"


NO_ALARM: dict[str, tuple[Attack, dict[str, Any]]] = {
    "l2": (PGD(0.5, 0.125, 10, "l2"), {}),
    "last image counts": (PGD(**SETTINGS), {"stop": "last"}),
    "papers' PGD": (PGD("5/255", "5/255", 20), {"stop": "last", "max_samples": 24}),
    "bf16": (PGD(**SETTINGS), {"attack_precision": "bf16"}),
    "small batches": (PGD(**SETTINGS), {"batch_size": 7}),
    "no random start": (PGD(**SETTINGS, random_start=False), {}),
    "two members, last image counts": (small_cascade(), {"stop": "last", "max_samples": 24}),
    "torchattacks": (TorchAttack("PGD", "5/255", {"alpha": "1.25/255", "steps": 10}), {}),
    "minimum norm": (TorchAttack("CW", None, {"steps": 10}), {}),
    "no radius": (PGD(0, 0, 1), {}),
    "one sample": (PGD(**SETTINGS), {"max_samples": 1}),
}


@pytest.mark.parametrize("name", NO_ALARM)
def test_sound_attacks_of_other_kinds_raise_no_alarm(name: str, tmp_path: Path) -> None:
    attack, options = NO_ALARM[name]
    run = run_test(tmp_path, ZeroShot(), attack, **{"probes": 8, **options})
    assert set(statuses(run).values()) == {"not_measured"} or not statuses(run), statuses(run)


@pytest.mark.slow
def test_defence_needs_a_baseline_of_its_own_protocol(tmp_path: Path, intact: Run) -> None:
    run = run_test(tmp_path, TeCoA(), PGD(**SETTINGS), baseline=intact.folder)
    assert statuses(run) == statuses(intact)
    alone = run_test(tmp_path, TeCoA(), PGD(**SETTINGS))
    assert statuses(alone) == {**statuses(intact), "baseline": "not_measured"}
    other = run_test(tmp_path, TeCoA(), PGD(**SETTINGS), max_samples=40, baseline=intact.folder)
    status, text = found(other.result["audit"], "baseline")
    assert status == "not_measured"
    assert text.startswith(f"{intact.name} has another protocol for outlines under pgd: sample_ids: ")


def test_a_baseline_is_a_test_of_the_base_model_of_the_run(tmp_path: Path, intact: Run, tiny_model: Path) -> None:
    trained = TeCoA()
    with torch.no_grad():
        next(trained.clip.net.parameters()).add_(1e-3)
    defended = run_test(tmp_path, trained, PGD(**SETTINGS), max_samples=8)
    with pytest.raises(ValueError, match="must be a test of a base model as it is, found trained weights of TeCoA"):
        run_test(tmp_path, TeCoA(), PGD(**SETTINGS), baseline=defended.folder)
    other = TeCoA(pretrained=str(tiny_model))
    own, theirs = other.clip.fingerprint, intact.result["model"]["fingerprint"]
    with pytest.raises(ValueError, match=f"tested weights {theirs}, but the base model here has {own}"):
        run_test(tmp_path, other, PGD(**SETTINGS), baseline=intact.folder)
    older = intact.result | {"model": {"fingerprint": theirs}}
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "result.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match="older version"):
        run_test(tmp_path, TeCoA(), PGD(**SETTINGS), baseline=tmp_path / "older")


def test_a_baseline_that_saw_other_images_is_not_used(tmp_path: Path, intact: Run) -> None:
    """Of the 32 samples of the baseline's ledger, two are said to have had other pixels."""
    shutil.copytree(intact.folder, tmp_path / "changed")
    ledger = tmp_path / "changed" / "ledger" / "outlines.csv"
    rows = intact.rows("outlines")
    text = ledger.read_text()
    for row in rows[:2]:
        text = text.replace(row["pixels"], "0" * 16)
    ledger.write_text(text)
    result = json.loads((tmp_path / "changed" / "result.json").read_text())
    for protocol in result["protocol"]["outlines"].values():
        protocol["axes"]["pixels"] = "32, digest of others"
    (tmp_path / "changed" / "result.json").write_text(json.dumps(result))
    run = run_test(tmp_path, TeCoA(), PGD(**SETTINGS), baseline=tmp_path / "changed")
    assert found(run.result["audit"], "baseline") == (
        "not_measured",
        "changed has another protocol for outlines under pgd: pixels: 2 of 32 samples show other images",
    )


def test_a_model_is_undefended_only_where_that_is_declared(tmp_path: Path) -> None:
    run = run_test(tmp_path, ZeroShot(), PGD(**SETTINGS), is_undefended=False)
    assert found(run.result["audit"], "baseline")[0] == "not_measured"
    assert run.result["is_undefended"] is False


# Checks of users

OWN = """
from robustclip.evaluation.audit import AuditCheck


class EnoughSamples(AuditCheck):
    name = "enough_samples"
    why = "a small set decides nothing"

    def grade(self, evidence):
        smallest = min(len(columns["id"]) for columns in evidence.samples.values())
        return self.answer("warn" if smallest < 100 else "pass", f"smallest task: {smallest} samples")
"""
INCOMPLETE = """
from robustclip.evaluation.audit import AuditCheck


class Nameless(AuditCheck):
    why = "it has no name"


class Taken(AuditCheck):
    name, why = "radius", "it has the name of another one"

    def grade(self, evidence):
        return self.answer("pass", "")
"""


def test_own_check_by_class_path_is_part_of_the_grade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("size_checks.py").write_text(OWN)
    status = main(
        ["test", "--model", "ZeroShot", "--data.test", "[shapes:outlines]", "--evaluation.max_samples", "8",
         "--results.checks", "[size_checks.EnoughSamples]", "--results.is_undefended", "true",
         "--results.folder", str(tmp_path), "--results.name", "own", "--trainer.accelerator", "cpu"]
    )  # fmt: skip
    assert status == 0
    report = Run.open(tmp_path / "own").result["audit"]
    assert [check["name"] for check in report["checks"]] == [*(check.name for check in CHECKS), "enough_samples"]
    assert report["checks"][-1] == {
        "name": "enough_samples", "status": "warn", "found": "smallest task: 8 samples",
        "why": "a small set decides nothing",
    }  # fmt: skip
    assert report["grade"] == "C"


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("incomplete_checks.Nameless", "must define name, grade"),
        ("incomplete_checks.Taken", "the name 'radius'"),
        ("incomplete_checks.Absent", "there is no class"),
        ("robustclip.evaluation.ResultsWriter", "must be a subclass of robustclip.evaluation.audit.AuditCheck"),
    ],
)
def test_classes_other_than_checks_are_refused(
    path: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "incomplete_checks.py").write_text(INCOMPLETE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"results\.checks: ") as error:
        ResultsWriter(checks=[path])
    assert key in str(error.value)
    assert path in str(error.value)


def test_an_own_check_that_passes_leaves_the_grade() -> None:
    class Sound(AuditCheck):
        name, why = "sound", "never"

        def grade(self, evidence: Evidence) -> Check:
            return self.of_count(0, 50, (0.1, 0.2), "faults")

    ours = audit(make_evidence())
    both = audit(make_evidence(), [Sound()])
    assert both["grade"] == ours["grade"]
    assert both["checks"][:-1] == ours["checks"]
    assert found(both, "sound") == ("pass", "0 of 50 faults")
    assert checks_at([]) == []


# The checks themselves, on ledgers made here


def make_evidence(
    n: int = 400,
    *,
    survivors: int = 20,
    attack: Attack | None = None,
    is_undefended: bool = True,
    is_robust: bool | None = None,
    defence: dict[str, Any] | None = None,
    ways: dict[str, Any] | None = None,
    trained_on: tuple[int, Sequence[str]] = (0, ()),
    **columns: Any,
) -> Evidence:
    """A sound ledger of one task with 10 classes; its last samples survive.

    Args:
        n: samples.
        survivors: of them.
        attack: PGD by default.
        is_undefended: see `Evidence`.
        is_robust: see `Evidence`.
        defence: changes of a defence that declares nothing; None for a model without one.
        ways: changes of the ways with their default settings.
        trained_on: see `Evidence`; the pixels of a sample have its number as digest.
        columns: replaced columns; a number fills a column, a list its beginning.
    """
    attack = attack or PGD(**SETTINGS)
    members = attack.members(10)
    index = np.arange(n)
    is_survivor, is_probed = index >= n - survivors, index % 4 == 3
    broken = np.where(is_probed & ~is_survivor, 1.0, np.nan)
    defaults: dict[str, Any] = {
        "id": index, "pixels": index.astype(str), "label": index % 10, "clean": index % 10,
        "clean_loss": np.full(n, 0.5),
        "largest_logit": np.full(n, 20.0), "logit_sum": index * 1.0, "least_logit": np.full(n, -5.0),
        "outside": np.where(is_probed, 0.05, np.nan),
        "repeat": np.where(is_probed, 1e-5, np.nan), "by": np.where(is_survivor, "", members[0].name).astype(object),
        "loss": np.full(n, 2.0), "steps": np.full(n, 10.0), "dead": np.zeros(n), "distance": np.full(n, 5 / 255),
        "excess": np.zeros(n), "nans": np.zeros(n), "exact": np.full(n, 10.0),
        "again": np.where(is_probed, 1e-5, np.nan), "wider": np.where(is_probed, 1.0, np.nan), "longer": broken,
        "faithful": np.where(is_probed, 1.0, np.nan), "regrad": np.where(is_probed, 0.0, np.nan),
        "spread": np.where(is_probed, 0.4, np.nan), "steady": np.where(is_probed, 0.8, np.nan),
        "rise": np.where(is_probed, 0.97, np.nan),
        "other": np.where(is_probed & is_survivor, 0.0, np.nan),
        "transfer": np.where(is_probed & is_survivor, 0.0, np.nan),
        "borrowed": np.where(is_probed & is_survivor, 0.0, np.nan), "own": np.full(n, np.nan),
        "draws": np.full(n, np.nan),
    } | {name: np.where(is_probed, 0.0, np.nan) for name in ("random", "autograd", "state", "leak")}  # fmt: skip
    for name, values in columns.items():
        listed = values if isinstance(values, list) else [values] * n
        defaults[name][: len(listed)] = listed
    declared: dict[str, Any] = {
        "is_undefended": is_undefended,
        "is_robust": is_robust,
        "trained_on": TrainingImages(*trained_on),
    }
    if defence is not None:
        nothing = {"is_random": False, "needs_gradients": False, "backward": "own"}
        declared |= {"is_undefended": False, "defence": nothing | defence, "ways": Ways().settings | (ways or {})}
    return Evidence({"a": defaults}, {("a", "pgd"): defaults}, {("a", "pgd"): members}, {"a": 10}, {}, **declared)


def found(report: dict[str, Any], name: str) -> tuple[str, str]:
    """Status of a check, and what it found."""
    (check,) = [check for check in report["checks"] if check["name"] == name]
    return check["status"], check["found"]


def in_cascade(by_square: int) -> dict[str, Any]:
    return {"attack": Recipe("cascade", "5/255"), "by": ["square"] * by_square}


def through(way: str, **columns: Any) -> dict[str, Any]:
    """Columns of a defence whose samples all fall to one way but for the last twenty."""
    return {"defence": {}, "by": [f"{way}.pgd"] * 380, **columns}


def range_of(first: int, last: int) -> list[str]:
    return [str(number) for number in range(first, last)]


# Wilson's interval of k of 400 has its lower end at 0.0077 for 6, 0.0107 for 8, 0.0990 for 51, 0.1010 for 52.
LIMITS: list[tuple[str, str, dict[str, Any]]] = [
    ("baseline", "pass", {"survivors": 40}),
    ("baseline", "warn", {"survivors": 41}),
    ("baseline", "warn", {"survivors": 120}),
    ("baseline", "warn", {"survivors": 121}),  # sound gradients: the weights may just be robust
    ("baseline", "fail", {"survivors": 121, "faithful": 0.0}),
    ("baseline", "not_measured", {"survivors": 121, "is_robust": True}),
    ("baseline", "not_measured", {"is_undefended": False}),
    ("radius", "pass", {"attack": PGD("0.5/255")}),
    ("radius", "warn", {"attack": PGD("0.4/255")}),
    ("radius", "pass", {"attack": PGD("63/255")}),
    ("radius", "warn", {"attack": PGD("64/255")}),
    ("radius", "pass", {"attack": PGD(3, 1, norm="l2")}),
    ("radius", "warn", {"attack": PGD(128, 1, norm="l2")}),
    ("radius", "not_measured", {"attack": PGD(0)}),
    ("pixel_gradients", "pass", {"survivors": 400}),
    ("pixel_gradients", "pass", {"survivors": 400, "dead": [1.0] * 6}),  # of 4000
    ("pixel_gradients", "warn", {"survivors": 400, "dead": [1.0] * 12}),
    ("pixel_gradients", "fail", {"survivors": 400, "dead": [1.0] * 60}),
    ("pixel_gradients", "pass", {"survivors": 0, "dead": 10.0}),
    ("pixel_gradients", "fail", {"steps": 0}),
    ("pixel_gradients", "pass", {"dead": [*[0.0] * 380, *[10.0] * 20], "attack": TorchAttack("CW")}),
    ("pixel_gradients", "fail", {"dead": 10.0, "attack": TorchAttack("CW")}),
    ("pixel_gradients", "not_measured", {"steps": 0, "attack": Square("5/255")}),
    ("loss_rises", "pass", {"loss": [0.4] * 6}),
    ("loss_rises", "warn", {"loss": [0.4] * 8}),
    ("loss_rises", "warn", {"loss": [0.4] * 51}),
    ("loss_rises", "fail", {"loss": [0.4] * 52}),
    ("loss_rises", "pass", {"loss": 0.5}),
    ("loss_rises", "fail", {"loss": 1e-4, "clean_loss": 2e-4}),
    ("uses_radius", "pass", {"distance": [0.0] * 380}),  # of broken samples
    ("uses_radius", "pass", {"survivors": 400, "distance": [2.4 / 255] * 6}),
    ("uses_radius", "warn", {"survivors": 400, "distance": [2.4 / 255] * 8}),
    ("uses_radius", "fail", {"survivors": 400, "distance": [2.4 / 255] * 52}),
    ("uses_radius", "pass", {"survivors": 400, "distance": [2.6 / 255] * 52}),
    ("uses_radius", "pass", {"survivors": 0}),
    ("uses_radius", "not_measured", {"attack": PGD(0)}),
    ("ball_and_box", "pass", {"excess": [1e-6]}),
    ("ball_and_box", "fail", {"excess": [1.1e-6]}),
    ("ball_and_box", "not_measured", {"n": 0}),
    ("finite", "fail", {"nans": [1.0]}),
    ("finite", "fail", {"largest_logit": [np.nan]}),
    ("finite", "fail", {"largest_logit": [np.inf]}),
    ("finite", "fail", {"distance": [np.nan]}),
    ("fp32_verdict", "pass", {"again": [1.9e-3]}),  # of losses of 2
    ("fp32_verdict", "fail", {"again": [2.1e-3]}),
    ("fp32_verdict", "warn", {"exact": [0.0] * 3}),
    ("fp32_verdict", "fail", {"exact": [0.0] * 10}),
    ("fp32_verdict", "not_measured", {"n": 0}),
    ("repeatable", "pass", {"repeat": [0.0199]}),
    ("repeatable", "fail", {"repeat": [0.0201]}),
    ("repeatable", "fail", {"repeat": [0.0011], "largest_logit": 0.5}),
    ("repeatable", "not_measured", {"repeat": np.nan}),
    ("repeatable", "fail", {"repeat": [0.03], "defence": {}}),
    ("repeatable", "pass", {"repeat": [0.03] * 3, "defence": {"needs_gradients": True}}),  # of 103: 0.0099 at least
    ("repeatable", "fail", {"repeat": [0.03] * 4, "defence": {"needs_gradients": True}}),
    ("larger_radius", "warn", {"wider": [*[np.nan] * 379, 0.0]}),  # one held, no other was probed
    ("larger_radius", "fail", {"wider": [*[np.nan] * 378, 0.0, 0.0]}),
    ("larger_radius", "pass", {"wider": [*[1.0] * 50, 0.0]}),
    ("larger_radius", "not_measured", {"wider": np.nan}),
    ("any_radius", "pass", {"wider": np.nan}),  # 5 % survive
    ("any_radius", "not_measured", {"survivors": 100, "wider": np.nan}),
    ("any_radius", "fail", {"survivors": 400, "wider": 0.0}),
    ("any_radius", "not_measured", {"n": 0}),
    ("more_steps", "fail", {"longer": 0.0}),
    ("gradient_fidelity", "pass", {}),
    ("gradient_fidelity", "not_measured", {"faithful": [*[1.0] * 20, *[np.nan] * 380]}),
    ("gradient_fidelity", "pass", {"faithful": [*[1.0] * 29, *[np.nan] * 371]}),
    ("gradient_fidelity", "warn", {"faithful": [*[0.0] * 6, *[1.0] * 44, *[np.nan] * 350]}),  # 0.056 at least
    ("gradient_fidelity", "fail", {"faithful": [*[0.0] * 20, *[1.0] * 30, *[np.nan] * 350]}),
    ("gradient_fidelity", "not_measured", {"faithful": np.nan}),
    ("gradient_repeats", "pass", {"regrad": [2e-3]}),
    ("gradient_repeats", "fail", {"regrad": [0.06]}),
    ("gradient_spread", "pass", {"spread": 0.021}),
    ("gradient_spread", "warn", {"spread": 0.019}),
    ("gradient_spread", "warn", {"spread": 0.96}),
    ("gradient_spread", "fail", {"spread": 0.0019}),
    ("gradient_steadiness", "pass", {"steady": 0.21}),
    ("gradient_steadiness", "warn", {"steady": 0.19}),
    ("gradient_steadiness", "fail", {"steady": 0.019}),
    ("gradient_steadiness", "not_measured", {"steady": np.nan}),
    ("gradient_steadiness", "pass", {"rise": 0.21}),
    ("gradient_steadiness", "warn", {"rise": 0.19}),
    ("gradient_steadiness", "fail", {"rise": 0.049}),
    ("saturated_loss", "pass", {"survivors": 400, "loss": [0.0] * 13}),  # 0.019 at least
    ("saturated_loss", "warn", {"survivors": 400, "loss": [0.0] * 14}),
    ("saturated_loss", "pass", {"survivors": 0, "loss": 0.0}),
    ("saturated_loss", "warn", {"survivors": 400, "loss": 0.0, "attack": PGD("5/255", loss="ce")}),
    ("saturated_loss", "warn", {"survivors": 400, "loss": 0.0, "attack": APGD("5/255")}),
    ("saturated_loss", "pass", {"survivors": 400, "loss": 0.0, "attack": PGD("5/255", loss="margin")}),
    ("saturated_loss", "pass", {"survivors": 400, "loss": 0.0, "attack": PGD("5/255", target="red")}),
    ("saturated_loss", "pass", {"survivors": 400, "loss": 0.0, "attack": PGD(0)}),
    ("saturated_loss", "pass", {"survivors": 400, "loss": 0.0, "attack": Square("5/255")}),
    ("saturated_loss", "not_measured", {"n": 0}),
    ("random_state", "pass", {"random": [1.0]}),  # without effect
    ("random_state", "fail", {"random": [1.0], "regrad": [0.1]}),
    ("random_state", "not_measured", {"random": np.nan}),
    ("stateful", "pass", {"state": [0.019]}),
    ("stateful", "fail", {"state": [0.021]}),
    ("stateful", "fail", {"state": [np.inf]}),
    ("label_leak", "fail", {"leak": [15.0]}),
    ("label_leak", "not_measured", {"leak": np.nan}),
    ("autograd_inside", "warn", {"autograd": [5.0]}),
    ("softmax_head", "warn", {"logit_sum": 1.0, "least_logit": 0.0}),
    ("softmax_head", "pass", {"logit_sum": 1.0}),
    ("other_attack", "pass", {}),
    ("other_attack", "pass", {"survivors": 400, "other": 0.0}),
    ("other_attack", "not_measured", {"survivors": 400, "other": [*[1.0] * 30, *[0.0] * 370]}),  # weak
    ("other_attack", "warn", {"survivors": 400, "other": [*[1.0] * 80, *[0.0] * 320]}),
    ("other_attack", "fail", {"survivors": 400, "other": [*[1.0] * 160, *[0.0] * 240]}),
    ("other_attack", "not_measured", {"survivors": 400, "other": np.nan}),
    ("transfer", "fail", {"survivors": 400, "transfer": [*[1.0] * 160, *[0.0] * 240]}),
    ("transfer", "pass", {"survivors": 400, "transfer": 1.0, "other": 1.0}),  # the own gradient finds them too
    ("transfer", "pass", {"survivors": 400, "transfer": [*[1.0] * 12, *[0.0] * 388], "other": 0.0}),  # 0.017 at least
    ("transfer", "warn", {"survivors": 400, "transfer": [*[1.0] * 14, *[0.0] * 386], "other": 0.0}),  # 0.021
    ("transfer", "warn", {"transfer": [*[np.nan] * 380, *[1.0] * 20]}),  # all of the 5 % that survive
    ("borrowed_gradients", "pass", {}),
    ("borrowed_gradients", "not_measured", {"survivors": 400, "borrowed": np.nan}),
    ("borrowed_gradients", "fail", {"survivors": 400, "borrowed": [*[1.0] * 60, *[0.0] * 340]}),
    ("borrowed_gradients", "pass", {"survivors": 400, "borrowed": 1.0, "defence": {}}),  # the ways try this themselves
    ("ways", "pass", {}),
    ("ways", "pass", through("own", own=np.nan)),
    ("ways", "pass", through("replay", own=1.0)),
    ("ways", "not_measured", through("replay", own=np.nan)),
    ("ways", "warn", through("replay", own=[0.0] * 4 + [1.0] * 376)),  # 0.004 of 400 at least
    ("ways", "warn", through("replay", own=[0.0] * 380)),  # a failure, but for all ways being tried
    ("ways", "warn", through("bare", own=np.nan)),
    ("ways", "warn", {"defence": {}, "ways": {"names": ["replay", "own"]}}),
    ("ways", "warn", {"defence": {}, "ways": {"queries": 0}}),
    ("ways", "warn", {"defence": {"is_random": True}, "ways": {"draws": 1}}),
    ("gradient_fidelity", "warn", {"defence": {}, "faithful": 0.0}),
    ("gradient_fidelity", "fail", {"defence": {}, "faithful": 0.0, "ways": {"queries": 0}}),
    ("gradient_fidelity", "pass", {"defence": {"backward": "none"}, "faithful": 0.0}),
    ("declared", "pass", {}),
    ("declared", "not_measured", {"defence": {}}),
    ("declared", "pass", {"defence": {}, "draws": 0.0}),
    ("declared", "warn", {"defence": {}, "draws": 0.5}),
    ("declared", "pass", {"defence": {"is_random": True}, "draws": 0.5}),
    ("declared", "warn", {"defence": {"is_random": True}, "draws": 0.0}),
    ("declared", "warn", {"defence": {}, "draws": 0.0, "autograd": 2.0}),
    ("declared", "pass", {"defence": {"needs_gradients": True}, "draws": 0.0, "autograd": 2.0}),
    ("declared", "warn", {"defence": {}, "draws": 0.0, "faithful": np.nan}),  # no gradient
    ("declared", "pass", {"defence": {"backward": "none"}, "draws": 0.0, "faithful": 0.0}),
    ("autograd_inside", "pass", {"defence": {"needs_gradients": True}, "autograd": 5.0}),
    ("full_recipe", "not_measured", {}),
    ("full_recipe", "pass", {"attack": Recipe("autoattack", "5/255")}),
    ("full_recipe", "not_measured", {"attack": Recipe("autoattack", "5/255", budget=0.5)}),
    ("black_box", "not_measured", {}),
    ("black_box", "not_measured", {"attack": Square("5/255"), "by": "square"}),
    ("black_box", "pass", in_cascade(2)),  # 0.0014 of 400
    ("black_box", "warn", in_cascade(4)),
    ("black_box", "fail", in_cascade(16)),
    ("normalised_once", "pass", {"outside": 0.5}),
    ("normalised_once", "warn", {"outside": 0.51}),
    ("normalised_once", "not_measured", {"outside": np.nan}),
    ("logit_scale", "warn", {"largest_logit": 1.0}),
    ("logit_scale", "not_measured", {"n": 0}),
    ("better_than_chance", "warn", {"clean": [1, *[0] * 399]}),
    ("better_than_chance", "pass", {"n": 19, "survivors": 0, "clean": 11}),
    ("unseen_images", "pass", {}),
    ("unseen_images", "pass", {"trained_on": (5000, range_of(399, 450))}),  # one image
    ("unseen_images", "warn", {"trained_on": (5000, range_of(398, 450))}),  # 0.011 of 5000 at least, 0.13 of 400
    ("unseen_images", "pass", {"trained_on": (300, range_of(398, 450))}),  # 0.008
    ("unseen_images", "warn", {"trained_on": (400, range_of(398, 450))}),  # 0.011
    ("predictions_vary", "warn", {"clean": [3] * 380}),
    ("predictions_vary", "pass", {"clean": [3] * 370}),
    ("predictions_vary", "pass", {"clean": 3, "label": 3}),
]


@pytest.mark.parametrize(("name", "status", "change"), LIMITS, ids=[f"{name}-{status}" for name, status, _ in LIMITS])
def test_limit_of_a_check(name: str, status: str, change: dict[str, Any]) -> None:
    assert found(audit(make_evidence(**change)), name)[0] == status


def test_nothing_measured_is_nothing_blamed() -> None:
    """No task, a task without samples, and samples without an attack."""
    sound = make_evidence()
    bare = [Evidence({}, {}, {}, {}, {}, is_undefended=True), make_evidence(0), replace(sound, attacked={}, members={})]
    for evidence in bare:
        assert audit(evidence)["grade"] == "B"


def test_an_empty_task_is_left_out_of_the_undefended_accuracy() -> None:
    """The accuracy is that of the one task with samples."""
    full, empty = make_evidence(survivors=200), make_evidence(0)
    both = replace(
        full,
        samples={"a": full.samples["a"], "b": empty.samples["a"]},
        attacked={("a", "pgd"): full.attacked["a", "pgd"], ("b", "pgd"): empty.attacked["a", "pgd"]},
        members={(task, "pgd"): full.members["a", "pgd"] for task in "ab"},
        class_counts={"a": 10, "b": 10},
    )
    status, text = found(audit(both), "baseline")
    assert status == "warn"
    assert text.startswith("undefended: 50.0% correct under pgd; the attack is weak, or the weights are robust")


@pytest.mark.parametrize(
    ("change", "grade"),
    [
        ({"attack": Recipe("cascade", "5/255")}, "A"),
        ({}, "B"),
        ({"largest_logit": 0.5}, "C"),
        ({"largest_logit": 0.5, "nans": 1.0}, "F"),
    ],
)
def test_grade_is_that_of_the_worst_check(change: dict[str, Any], grade: str) -> None:
    assert audit(make_evidence(**change))["grade"] == grade


def test_a_gradient_that_vanishes_a_little_further_promises_too_much() -> None:
    """One image has a gradient on a first bit of the way alone, one everywhere, and one nowhere."""
    scale = torch.tensor([1.0, 1.0, 0.0])

    def forward(images: Tensor) -> Tensor:
        pixels = images.mean((1, 2, 3))
        cut = torch.stack([pixels[0].clamp(max=0.50001), *pixels[1:]]) * scale
        return torch.stack([cut, -cut], 1)

    images, labels = torch.full((3, 3, 4, 4), 0.5), torch.ones(3, dtype=torch.long)
    rise = gradients(images, labels, forward, None)["rise"]
    assert rise[:2].tolist() == pytest.approx([0.02, 1], abs=1e-3)
    assert rise[2].isnan()
