"""Detection of unknown classes in a test: against scikit-learn on scores made by hand, and under attack."""

from pathlib import Path
from typing import Any

import detection_cases as cases
import numpy as np
import pytest
import torch
from helpers import ShardWriter, run_test
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from robustclip.attacks import PGD
from robustclip.attacks.attack import Forward, Loss
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import OODDetection, ResultsWriter, RobustEvaluation
from robustclip.methods import ZeroShot
from robustclip.metrics import SEPARATION
from robustclip.results.run import Run
from robustclip.tools.compare import unlike_unknown
from robustclip.types import UNKNOWN


@pytest.fixture(scope="module")
def folder(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.write_all(tmp_path_factory.mktemp("detection"), write_shards)


@pytest.fixture(scope="module")
def one_process(folder: Path) -> dict[str, Any]:
    cases.run(folder, 1)
    return Run.open(folder / "1" / cases.NAME).result["detection"]


def images_of(loader: Any) -> tuple[Tensor, Tensor]:
    batches = list(loader)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def test_the_result_equals_scikit_learns_for_scores_computed_by_hand(folder: Path, one_process: dict[str, Any]) -> None:
    module, method = cases.data(folder, test=["mixed"], unknown=["mixed"]), cases.method(folder).eval()
    module.setup("test")
    known, labels = images_of(module.test_dataloader()[0])
    unknown, none = images_of(module.unknown_dataloaders()["mixed_unknown"])
    assert none.eq(UNKNOWN).all()
    assert (len(known), len(unknown)) == (9, 6)
    with torch.no_grad():
        head = method.clip.encode_classes(module.test_tasks[0])
        cosines = [(method.image_features(images) @ head.T).double() for images in (known, unknown)]
    scale = float(method.clip.logit_scale.detach())
    scores = {
        "mcm": [each.softmax(1).amax(1) for each in cosines],
        "msp": [(scale * each).softmax(1).amax(1) for each in cosines],
        "max_logit": [scale * each.amax(1) for each in cosines],
        "energy": [(scale * each).exp().sum(1).log() for each in cosines],
    }
    answers, truth = cosines[0].argmax(1), np.repeat([1, 0], [9, 6])
    accuracy = sum(float((answers[labels == c] == c).float().mean()) for c in range(3)) / 3
    found = one_process["tasks"]["mixed"]
    assert found["class_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    ece = multiclass_calibration_error((scale * cosines[0]).softmax(1), labels, num_classes=3, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(ece), abs=1e-5)
    pair = found["unknown"]["mixed_unknown"]
    assert (found["n"], pair["n"]) == (9, 6)
    for name, (high, low) in scores.items():
        joined = torch.cat([high, low])
        values, auroc = pair["scores"][name], roc_auc_score(truth, joined)
        assert values["auroc"] == pytest.approx(auroc, abs=1e-6), name
        assert values["aupr"] == pytest.approx(average_precision_score(truth, joined), abs=1e-6)
        assert values["fpr95"] == pytest.approx(float((low >= high.min()).float().mean()), abs=1e-6)  # 9 of 9 are kept
        assert values["h"] == pytest.approx(2 * accuracy * auroc / max(accuracy + auroc, 1e-9), abs=1e-6)
    assert list(found["unknown"]) == ["mixed_unknown", "lone_unknown"]
    assert list(one_process["tasks"]) == ["mixed", "lone_known"]


def test_histograms_count_every_sample_and_curves_begin_and_end(one_process: dict[str, Any]) -> None:
    scores = one_process["tasks"]["mixed"]["unknown"]["mixed_unknown"]["scores"]
    assert {name for name, values in scores.items() if "roc" in values} == {"mcm", "energy"}
    for kind in ("clean", "attacked"):
        counts, curve = scores["mcm"]["histogram"][kind], scores["mcm"]["roc"][kind]
        assert {side: sum(values) for side, values in counts.items()} == {"known": 9, "unknown": 6}
        for side in ("known", "unknown"):
            assert (curve[side][0], curve[side][-1]) == (0, 1)
    low, high = scores["mcm"]["histogram"]["range"]
    assert 1 / 3 < low < high < 1


class Spy(PGD):
    """Keeps what it is given and what it returns."""

    def perturb(self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, **options: Any) -> Tensor:
        attacked = super().perturb(images, forward, targets, loss, **options)
        with torch.no_grad():
            seen.append((images, attacked, targets, forward(images), forward(attacked)))
        return attacked


seen: list[tuple[Tensor, ...]] = []


def colours(attack: PGD | None, **options: Any) -> dict[str, float]:
    """What the embedded shapes model makes of six known and six unknown colours."""
    sets = [DataSource("shapes:colours", classes="0-5")]
    module = CLIPDataModule(test=sets, unknown=sets, image_size=32, batch_size=12)
    callbacks = [OODDetection(attack=attack, **options), RobustEvaluation(max_samples=36)]
    trainer = run_test(ZeroShot(), module, *callbacks)
    prefix = "test/colours/detection/"
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def test_an_attack_lowers_known_and_raises_unknown_scores_within_the_perturbation_set() -> None:
    eps = 4 / 255
    seen.clear()
    found = colours(Spy(eps=eps, alpha=eps / 4, steps=8, keep="best"), attacked=["energy", "mcm"])
    for name in ("colours_unknown/energy", "colours_unknown/mcm"):
        assert found[f"{name}/auroc"] > 0.9
        assert found[f"{name}/attacked/auroc"] < found[f"{name}/auroc"] - 0.5
        assert found[f"{name}/attacked/fpr95"] > found[f"{name}/fpr95"]
        assert found[f"{name}/attacked/aupr"] < found[f"{name}/aupr"]
    assert sum(len(images) for images, *_ in seen) == 2 * 2 * 36
    for number, (images, attacked, sign, before, after) in enumerate(seen):
        assert (attacked >= (images - eps).clamp(min=0)).all()
        assert (attacked <= (images + eps).clamp(max=1)).all()
        is_known = number < len(seen) / 2
        assert sign.unique().tolist() == [-1 if is_known else 1]
        if number % 2 == 0:  # energy is attacked first
            moved = after.logsumexp(1) - before.logsumexp(1)
            assert ((moved < 0) if is_known else (moved > 0)).all()


def test_an_attack_that_moves_nothing_changes_no_number() -> None:
    found = colours(PGD(eps=0, alpha=0, steps=1), scores=["mcm"])
    attacked = {name: value for name, value in found.items() if "/attacked/" in name}
    assert {name.split("/")[-1] for name in attacked} == {*SEPARATION}
    assert all(found[name.replace("attacked/", "")] == value for name, value in attacked.items())


def test_the_worse_of_clean_and_attacked_counts() -> None:
    class Helpful(PGD):
        """Moves every image where the defender wants it."""

        def __call__(self, images: Tensor, forward: Forward, targets: Tensor, *args: Any, **options: Any) -> Tensor:
            return super().__call__(images, forward, -targets, *args, **options)

    found = colours(Helpful(eps="4/255", alpha="1/255", steps=4), scores=["mcm"])
    assert found["colours_unknown/mcm/attacked/auroc"] == found["colours_unknown/mcm/auroc"]


def test_wrong_answers_are_no_positives_where_only_right_ones_count(folder: Path, one_process: dict[str, Any]) -> None:
    callbacks = [OODDetection(known=["mixed"], unknown={"mixed": ["mixed_unknown"]}, is_correct_only=True)]
    method = cases.method(folder)
    module = cases.data(folder, test=["mixed", "lone_known"], unknown=["mixed", "lone_unknown"])
    trainer = run_test(method, module, *callbacks)
    known, labels = images_of(module.test_dataloader()[0])
    unknown, _ = images_of(module.unknown_dataloaders()["mixed_unknown"])
    with torch.no_grad():
        high, low = (method.logits(images, "mixed").double() for images in (known, unknown))
    kept = high[high.argmax(1) == labels]
    assert 0 < len(kept) < len(high)
    truth = [1] * len(kept) + [0] * len(low)
    expected = roc_auc_score(truth, torch.cat([kept, low]).logsumexp(1))
    metrics = {name: value for name, value in trainer.callback_metrics.items() if "/detection/" in name}
    assert float(metrics["test/mixed/detection/mixed_unknown/energy/auroc"]) == pytest.approx(expected, abs=1e-6)
    accuracy = one_process["tasks"]["mixed"]["class_accuracy"]  # of all samples
    assert float(metrics["test/mixed/detection/class_accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    assert not any(name.startswith("test/lone_known/") or "/lone_unknown" in name for name in metrics)


def test_a_model_that_diverged_has_no_numbers(folder: Path) -> None:
    method = cases.method(folder)
    torch.nn.init.constant_(next(method.clip.net.visual.parameters()), torch.nan)
    module = cases.data(folder, test=["lone_known"], unknown=["lone_unknown"])
    trainer = run_test(method, module, OODDetection(attack=PGD(steps=1)))
    prefix = "test/lone_known/detection/"
    for name in ("ece", "lone_unknown/mcm/auroc", "lone_unknown/mcm/h", "lone_unknown/mcm/attacked/fpr95"):
        assert trainer.callback_metrics[prefix + name].isnan(), name


class PowerCut(Exception):  # noqa: N818  # not ours to catch
    """Ends a test."""


class Cut(PGD):
    """Ends the test at one of its calls."""

    calls: int | None = None

    def perturb(self, *args: Any, **kwargs: Any) -> Tensor:
        if Cut.calls is not None:
            if Cut.calls == 0:
                raise PowerCut
            Cut.calls -= 1
        return super().perturb(*args, **kwargs)


@pytest.mark.slow
def test_a_resumed_test_detects_exactly_as_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    """Nine samples and one of two known tasks, and one unknown to both: the test ends within each of the three."""

    def detect(name: str) -> dict[str, Any]:
        attack = Cut(eps="8/255", alpha="4/255", steps=3, keep="best")
        callbacks = [OODDetection(attack=attack), RobustEvaluation(), ResultsWriter(str(tmp_path), name=name)]
        module = cases.data(folder, test=["mixed", "lone_known"], unknown=["lone_unknown"])
        run_test(cases.method(folder), module, *callbacks)
        return dict(Run.open(tmp_path / name).result["detection"])

    whole = detect("whole")
    assert whole["tasks"]["mixed"]["unknown"]["lone_unknown"]["scores"]["mcm"]["auroc"] > 0
    for calls in ((4, 3, 1), (9, 1), (11,)):
        for Cut.calls in calls:
            with pytest.raises(PowerCut):
                detect(f"cut_{calls[0]}")
        Cut.calls = None
        assert detect(f"cut_{calls[0]}") == whole


def test_the_images_of_an_unknown_set_are_part_of_the_result(folder: Path, write_shards: ShardWriter) -> None:
    hashes = []
    for number, (name, seed, batch) in enumerate([("changing", 0, 1), ("changing", 0, 3), ("changing", 1, 1)]):
        write_shards(folder, name, "test", [6], cases.CLASSES, seed=seed)
        module = cases.data(folder, test=["mixed"], unknown=["changing"])
        module.eval_batch_size = batch
        callbacks = [OODDetection(), RobustEvaluation(), ResultsWriter(str(folder / "changing_results"), str(number))]
        run_test(cases.method(folder), module, *callbacks)
        result = Run.open(folder / "changing_results" / str(number)).result
        hashes.append(result["detection"]["tasks"]["mixed"]["unknown"]["changing"]["data"]["pixels"])
    assert hashes[0] == hashes[1] != hashes[2]
    runs = [Run.open(folder / "changing_results" / number) for number in "012"]
    assert unlike_unknown(runs[0], runs[1]) == []
    (line,) = unlike_unknown(runs[0], runs[2])
    assert line.startswith(f"unknown set changing differs in pixels: {hashes[0]} against {hashes[2]}")


@pytest.mark.parametrize(
    ("options", "unknown", "words"),
    [
        ({"headline": "energy", "scores": ["mcm"]}, ["lone_unknown"], r"got \['mcm'\]; add 'energy'"),
        ({"attack": PGD(), "attacked": ["msp"], "scores": ["mcm"]}, ["lone_unknown"], r"got \['mcm'\]; add 'msp'"),
        ({"attack": PGD(loss="margin")}, ["lone_unknown"], "attack.loss must be null, got 'margin'"),
        ({"known": ["other"]}, ["lone_unknown"], "known of OODDetection names 'other'; the data have mixed"),
        ({"unknown": {"other": []}}, ["lone_unknown"], "unknown of OODDetection names 'other'; the data have mixed"),
        (
            {"unknown": {"mixed": ["other"]}},
            ["lone_unknown"],
            "unknown.mixed of OODDetection names 'other'; the data have lone_unknown",
        ),
        ({}, [], "OODDetection needs a data set of unknown classes"),
    ],
)
def test_settings_without_detection_are_refused(
    folder: Path, options: dict[str, Any], unknown: list[str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run_test(cases.method(folder), cases.data(folder, test=["mixed"], unknown=unknown), OODDetection(**options))
