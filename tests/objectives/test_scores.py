"""Scores of known classes and what is measured of them, against formulas, scikit-learn and counting."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import quick_trainer
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score, roc_curve
from torch import Tensor

from robustclip.attacks import PGD
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import OODDetection
from robustclip.evaluation.nearest_neighbours import Neighbours
from robustclip.methods import ZeroShot
from robustclip.metrics import class_accuracy, harmonic_mean, roc, separation
from robustclip.objectives.scores import GEN, SCORES, DeltaEnergy, LogitGap, Model, Score, score_of
from robustclip.results.run import Run
from robustclip.tools.compare import unlike_unknown
from robustclip.types import Task

SCALE = torch.tensor(50.0, dtype=torch.float64)


def logits(*shape: int, seed: int = 0) -> Tensor:
    cosines = 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SCALE * cosines


def by_hand(row: list[float]) -> dict[str, float]:
    """The scores of one sample, summed class by class."""
    exponentials = [math.exp(z) for z in row]
    p = [e / sum(exponentials) for e in exponentials]
    of_cosines = [math.exp(z / float(SCALE)) for z in row]
    return {
        "mcm": max(of_cosines) / sum(of_cosines),
        "msp": max(p),
        "max_logit": max(row),
        "energy": math.log(sum(exponentials)),
        "entropy": sum(each * math.log(each) for each in p),
        "logit_gap": (max(row) - sorted(row)[-2]) / float(SCALE),  # half of five classes: the first two
        "gen": -sum((each * (1 - each)) ** 0.1 for each in p),
        "delta_energy": math.log(sum(exponentials)) - math.log(sum(sorted(exponentials)[:-1]) + 1),
    }


def test_scores_are_their_formulas() -> None:
    rows = logits(6, 5)
    expected = [by_hand(row.tolist()) for row in rows]
    for name, score in SCORES.items():
        assert score.value(rows, SCALE).tolist() == pytest.approx([each[name] for each in expected], rel=1e-12), name


@pytest.mark.parametrize("name", SCORES)
def test_the_attacked_quantity_increases_with_the_score(name: str) -> None:
    rows = logits(500, 4)
    value, evidence = SCORES[name].value(rows, SCALE), SCORES[name].evidence(rows, SCALE)
    assert torch.equal(value.argsort(), evidence.argsort())
    if name in ("mcm", "msp"):  # 1 / (1 + exp(-log-odds)) is increasing
        torch.testing.assert_close(evidence.sigmoid(), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("row", "n", "expected"),
    [
        ([5.0, 1.0, 0.5], 2, 4.0),
        ([5.0, 1.0, 0.5], 3, 4.25),
        ([0.31, 0.24, 0.22, 0.18, 0.15], 2, 0.07),
        ([0.31, 0.24, 0.22, 0.18, 0.15], 3, 0.08),
        ([0.31, 0.24, 0.22, 0.18, 0.15], 4, 0.0966666667),
        ([0.31, 0.24, 0.22, 0.18, 0.15], 5, 0.1125),
        ([2.0, 2.1, 1.9], 3, 0.15),
    ],
)
def test_logit_gap_is_that_of_its_authors(row: list[float], n: int, expected: float) -> None:
    cosines = torch.tensor([row], dtype=torch.float64)
    for scale in (1.0, 100.0):
        found = LogitGap(n).value(scale * cosines, torch.tensor(scale, dtype=torch.float64))
        assert float(found) == pytest.approx(expected, abs=1e-9)
    assert float(LogitGap(n).value(cosines + 7, torch.tensor(1.0))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("row", "gamma", "m", "expected"),
    [
        ([3.0, 1.0, 0.0], 0.1, 2, -1.611810355),
        ([3.0, 1.0, 0.0], 0.1, 100, -2.337033125),
        ([3.0, 1.0, 0.0], 0.5, 2, -0.681098029),
        ([3.0, 1.0, 0.0], 0.5, 3, -0.881710144),
        ([3.0, 1.0, 0.0], 1.0, 2, -0.232959836),
        ([3.0, 1.0, 0.0], 1.0, 3, -0.273205057),
        ([1.0, 1.0, 1.0], 0.1, 3, -2.58107131),
        ([1.0, 1.0, 1.0], 0.5, 3, -1.414213562),
        ([31.0, 24.0, 22.0, 18.0, 15.0], 0.1, 2, -0.999427907),
        ([31.0, 24.0, 22.0, 18.0, 15.0], 0.1, 100, -1.880329436),
        ([31.0, 24.0, 22.0, 18.0, 15.0], 1.0, 100, -0.002071258),
    ],
)
def test_gen_is_that_of_its_authors(row: list[float], gamma: float, m: int, expected: float) -> None:
    found = GEN(gamma, m).value(torch.tensor([row], dtype=torch.float64), SCALE)
    assert float(found) == pytest.approx(expected, abs=1e-8)


def test_scores_order_seven_images_as_worked_out() -> None:
    known = [[31, 24, 22, 18, 15], [29, 20, 19, 19, 12], [27, 26, 20, 15, 14], [33, 30, 21, 20, 19]]
    unknown = [[25, 24, 24, 23, 20], [26, 19, 18, 17, 16], [22, 21, 20, 19, 18]]
    for score, values, auroc in (
        (LogitGap(5), [0.1125, 0.115, 0.0825, 0.105, 0.0225, 0.085, 0.025], 0.916667),
        (GEN(), [-1.880329, -1.754585, -2.737035, -2.283666, -3.864987, -2.238839, -3.827234], 0.833333),
        (DeltaEnergy(), [6.871820, 8.448576, 1.311436, 3.048411, 0.760418, 6.561225, 1.011725], 0.833333),
        (DeltaEnergy(2), [8.981992, 9.306611, 7.304760, 11.640990, 1.303555, 7.593809, 2.044308], 0.916667),
        (
            DeltaEnergy(temperature=1.0),
            [0.060008, 0.056695, 0.051798, 0.062982, 0.046082, 0.050221, 0.041124],
            1,
        ),
    ):
        found = score.value(torch.tensor(known + unknown, dtype=torch.float64), torch.tensor(100.0).double())
        assert found.tolist() == pytest.approx(values, abs=1e-6)
        assert float(separation(found[:4], found[4:])["auroc"]) == pytest.approx(auroc, abs=1e-6)


E1, E2, E3 = [0.31, 0.24, 0.22, 0.18, 0.15], [0.25, 0.24, 0.24, 0.23, 0.20], [0.90, 0.10, 0.00]


@pytest.mark.parametrize(
    ("row", "tau", "low", "one", "two", "alone"),
    [
        (E1, 1.0, 0.0, 0.060008049, 0.107266594, 0.052226001),
        (E1, 1.0, None, 0.246545921, 0.548591178, 0.237182864),
        (E1, 0.01, 0.0, 6.871819761, 8.981992118, 3.436365557),
        (E2, 1.0, 0.0, 0.046082414, 0.092167491, 0.045022827),
        (E2, 0.01, 0.0, 0.760417899, 1.303555339, 0.489228786),
        (E3, 0.01, 0.0, 79.999909204, 88.901387711, 39.999954602),
        (E3, 0.01, None, 79.999954601, 90.0, 39.999977301),
        (E3, 1.0, 0.0, 0.385300252, 0.419756723, 0.204304745),
    ],
)
def test_delta_energy_is_as_worked_out(
    row: list[float], tau: float, low: float | None, one: float, two: float, alone: float
) -> None:
    outputs, scale = 100 * torch.tensor([row], dtype=torch.float64), torch.tensor(100.0, dtype=torch.float64)
    for count, crop, expected in ((1, "together", one), (1, "each", one), (2, "together", two), (2, "each", alone)):
        for temperature in (tau, None) if tau == 0.01 else (tau,):
            found = DeltaEnergy(count, crop, low, temperature).value(outputs, scale)  # type: ignore[arg-type]
            assert float(found) == pytest.approx(expected, abs=1e-8), (count, crop)
    if tau == 1:  # at 0.01 the low value is nothing beside the others
        shifted = DeltaEnergy(2, "each", low, tau).value(outputs + 5, scale)
        assert (float(shifted) == pytest.approx(alone, abs=1e-8)) == (low is None)


def test_delta_energy_of_one_class_ranks_as_the_softmax_and_of_two_does_not() -> None:
    rows = logits(300, 10, seed=5)
    rows = rows[SCORES["msp"].value(rows, SCALE) < 0.999]
    assert len(rows) > 200
    softmax, cosines = SCORES["msp"].value(rows, SCALE), SCORES["mcm"].value(rows, SCALE)
    for score, reference in (
        (DeltaEnergy(low=None), softmax),
        (DeltaEnergy(low=None, temperature=1.0), cosines),
    ):
        torch.testing.assert_close(score.value(rows, SCALE), -torch.log1p(-reference), rtol=0, atol=1e-12)
    assert torch.equal(DeltaEnergy(low=None).value(rows, SCALE).argsort(), softmax.argsort())
    assert not torch.equal(DeltaEnergy(2, low=None).value(rows, SCALE).argsort(), softmax.argsort())
    permuted = rows[:, torch.randperm(10, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(DeltaEnergy(3).value(permuted, SCALE), DeltaEnergy(3).value(rows, SCALE))
    everything = DeltaEnergy(10).value(rows, SCALE)
    torch.testing.assert_close(everything, rows.logsumexp(1) - math.log(10))


def test_delta_energy_measures_its_grid() -> None:
    score, rows = DeltaEnergy(has_grid=True), logits(4, 4)
    score.setup(CLIPDataModule(), [Task("few", ("a", "b", "c", "d")), Task("more", tuple("abcdefg"))])
    assert score.variants == [
        *("1_together_own", "1_together_1", "2_together_own", "2_together_1", "2_each_own", "2_each_1")
    ]
    columns = score.columns(rows, SCALE)
    assert list(columns) == ["delta_energy", *(f"delta_energy/{name}" for name in score.variants)]
    assert torch.equal(columns["delta_energy/2_each_1"], DeltaEnergy(2, "each", temperature=1.0).value(rows, SCALE))
    assert torch.equal(columns["delta_energy/1_together_own"], columns["delta_energy"])


def test_gap_of_all_classes_is_mcm_at_a_high_temperature() -> None:
    rows, one = logits(5, 30) / SCALE, torch.tensor(1.0, dtype=torch.float64)
    confidence = (rows / 1e4).softmax(-1).amax(-1)
    torch.testing.assert_close(
        (confidence - 1 / 30) * 1e4 * 30**2 / 29, LogitGap(30).value(rows, one), rtol=0, atol=1e-5
    )


def test_gen_of_a_certain_image_is_finite_and_has_a_gradient() -> None:
    row = torch.tensor([[200.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    value = GEN().value(row, SCALE).sum()
    (gradient,) = torch.autograd.grad(value, row)
    assert math.isfinite(float(value.detach()))
    assert gradient.isfinite().all()
    assert gradient[0, 0] > 0
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert float(GEN(1.0).value(p.log()[None], SCALE)) == pytest.approx(-(1 - float(p.square().sum())))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LogitGap(1), "n of logit_gap must be at least 2, got 1"),
        (lambda: LogitGap(6).value(logits(2, 5), SCALE), "n of logit_gap must be at most the 5 classes, got 6"),
        (lambda: DeltaEnergy(0), "DeltaEnergy: count must be .* at least 1, got 0"),
        (lambda: DeltaEnergy(low=1.0), "low of delta_energy must be a cosine below 1 or null, got 1"),
        (lambda: DeltaEnergy(temperature=0.0), "DeltaEnergy: temperature must be .* got 0.0"),
        (lambda: DeltaEnergy(5, low=None).value(logits(2, 5), SCALE), "count of delta_energy .* 5 for 5 of them"),
        (lambda: GEN(0.0), "gamma of gen must be above 0 and m at least 1, got 0 and 100"),
    ],
)
def test_bad_parameters_of_scores_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_parameters_of_our_scores_are_in_the_settings() -> None:
    callback = OODDetection(scores=[GEN(0.5), "logit_gap", "mcm"], headline="gen")
    assert callback._settings()["own_scores"] == {
        "gen": {"class": "GEN", "gamma": 0.5, "m": 100},
        "logit_gap": {"class": "LogitGap", "n": None},
    }
    callback = OODDetection(scores=[Neighbours([5, 1]), "mcm"])
    assert callback._settings()["own_scores"] == {"knn": {"class": "Neighbours", "curve": [1, 5]}}


def test_evidence_has_a_gradient_where_a_softmax_has_none() -> None:
    certain = torch.tensor([[90.0, 0.0, -5.0]], requires_grad=True)
    for function, has_gradient in ((SCORES["msp"].value, False), (SCORES["msp"].evidence, True)):
        (gradient,) = torch.autograd.grad(function(certain, SCALE.float()).sum(), certain)
        assert bool(gradient[0, 0] > 0.5) == has_gradient


# Scores of users

OWN = """
from robustclip.objectives.scores import Score


class TopGap(Score):
    name = "top_gap"

    def __init__(self, top: int = 3) -> None:
        self.top = top

    def value(self, outputs, scale):
        ranked = (outputs / scale).topk(self.top).values
        return ranked[:, 0] - ranked[:, 1:].mean(-1)
"""


def test_own_score_by_class_path_is_attacked_and_has_its_settings_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gap_scores.py").write_text(OWN)
    attack = {"class_path": "PGD", "init_args": {"eps": "4/255", "alpha": "1/255", "steps": 2}}
    runs = []
    for name, score in {
        "path": "gap_scores.TopGap",
        "options": {"class_path": "gap_scores.TopGap", "init_args": {"top": 2}},
    }.items():
        options = {"scores": ["mcm", score], "headline": "top_gap", "attack": attack}
        detection = [{"class_path": "OODDetection", "init_args": options}]
        colours = "[{source: shapes:colours, classes: 0-5}]"
        status = run(
            ["test", "--model", "ZeroShot", "--data.test", colours, "--data.unknown", colours,
             "--evaluation.max_samples", "12", "--trainer.callbacks", json.dumps(detection),
             "--trainer.accelerator", "cpu", "--results.folder", str(tmp_path), "--results.name", name]
        )  # fmt: skip
        assert status == 0
        runs.append(Run.open(tmp_path / name))
    for top, each in zip((3, 2), runs, strict=True):
        detection = each.result["detection"]
        assert detection["scores"] == {"top_gap": {"class": "TopGap", "top": top}}
        scores = detection["tasks"]["colours"]["unknown"]["colours_unknown"]["scores"]
        assert list(scores) == ["mcm", "top_gap"]
        assert 0.5 < scores["top_gap"]["auroc"] <= 1
        assert scores["top_gap"]["attacked"]["auroc"] < scores["top_gap"]["auroc"]
    assert unlike_unknown(runs[0], runs[0]) == []
    (line,) = unlike_unknown(*runs)
    assert "top_gap" in line
    assert "'top': 3" in line
    assert "'top': 2" in line


class Negatives(Score):
    """Share of the classes in a softmax with further names, as an example of a score that prepares."""

    name = "negatives"

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._features: dict[str, Tensor] = {}

    def prepare(self, model: Model, task: Task) -> None:
        further = [model.class_features(Task(task.name, names, task.templates)) for names in (self.names,)]
        self._features[task.name] = torch.cat([model.class_features(task), *further])

    def forward(self, model: Model, images: Tensor, task: str) -> Tensor:
        return model.image_features(images) @ self._features[task].T

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        return (scale * outputs).softmax(-1)[:, : -len(self.names)].sum(-1)


def test_a_score_may_prepare_and_replace_the_attacked_outputs() -> None:
    sets = [DataSource("shapes:colours", classes="0-5")]
    data = CLIPDataModule(test=sets, unknown=sets, image_size=32, batch_size=12)
    method = ZeroShot()
    names = ("a photo of a dog", "a photo of a tree")
    options: Any = {"scores": Negatives(names), "headline": "negatives", "attack": PGD(eps="4/255", steps=2)}
    detection = OODDetection(**options)
    trainer = quick_trainer(detection)
    trainer.test(method, datamodule=data, verbose=False)
    found = float(trainer.callback_metrics["test/colours/detection/colours_unknown/negatives/auroc"])

    task, expected = data.test_tasks[0], []
    loaders = data.test_dataloader()[0], data.unknown_dataloaders()["colours_unknown"]
    with torch.no_grad():
        classes = method.clip.encode_classes(Task("all", (*task.class_names, *names), task.templates))
        scale = method.clip.logit_scale.double()
        for loader in loaders:
            features = torch.cat([method.clip.encode_image(batch.images) for batch in loader])
            odds = scale * (features @ classes.T).double()
            expected.append(odds[:, :6].logsumexp(1) - odds.logsumexp(1))
    truth = [1] * len(expected[0]) + [0] * len(expected[1])
    assert found == pytest.approx(roc_auc_score(truth, torch.cat(expected)), abs=1e-6)
    assert detection._settings()["own_scores"]["negatives"]["names"] == list(names)


class Unnamed(Score):
    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        return outputs.amax(-1)


class Taken(Unnamed):
    name = "mcm"


class Wide(Score):
    name = "wide"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        return outputs


@pytest.mark.parametrize(
    ("score", "key", "value"),
    [
        ("mpc", "no score 'mpc'", "max_logit"),
        ("no_such_module.Score", "no class", "'no_such_module.Score'"),
        ("robustclip.types.Task", "'robustclip.types.Task'", "robustclip.objectives.scores.Score"),
        (Taken(), "Taken.name", "'mcm'"),
        (Unnamed(), "Unnamed.name", "''"),
    ],
)
def test_classes_other_than_scores_are_refused(score: Any, key: str, value: str) -> None:
    for refuse in (score_of, lambda each: OODDetection(scores=[each], headline="mcm")):
        with pytest.raises(ValueError, match=key) as error:
            refuse(score)
        assert value in str(error.value)


def test_two_scores_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['wide', 'wide'\]"):
        OODDetection(scores=[Wide(), Wide()], headline="wide")


def test_a_score_that_is_not_one_number_per_sample_is_refused() -> None:
    sets = [DataSource("shapes:colours", classes="0-5")]
    data = CLIPDataModule(test=sets, unknown=sets, image_size=32, batch_size=12)
    with pytest.raises(ValueError, match=r"Wide.value .* \(12, 6\)"):
        quick_trainer(OODDetection(scores=[Wide()], headline="wide")).test(ZeroShot(), datamodule=data, verbose=False)


@pytest.mark.parametrize("kind", ["distinct", "ties", "beyond the sigmoid", "one each"])
def test_separation_is_scikit_learns(kind: str) -> None:
    draw = torch.Generator().manual_seed(3)
    known = 1 + torch.randn(173, generator=draw, dtype=torch.float64)
    unknown = torch.randn(89, generator=draw, dtype=torch.float64)
    if kind == "ties":
        known, unknown = (2 * known).round(), (2 * unknown).round()
    elif kind == "beyond the sigmoid":  # in fp32 the sigmoid of each of them is 1
        known, unknown = 50 + known, 50 + unknown
    elif kind == "one each":
        known, unknown = known[:1], unknown[:1]
    truth = np.repeat([1, 0], [len(known), len(unknown)])
    scores = torch.cat([known, unknown]).numpy()
    found = separation(known, unknown)
    # torchmetrics divides in fp32
    assert float(found["auroc"]) == pytest.approx(roc_auc_score(truth, scores), abs=1e-6)
    assert float(found["aupr"]) == pytest.approx(average_precision_score(truth, scores), abs=1e-6)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert float(found["fpr95"]) == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-6)
    assert float(found["aupr_out"]) == pytest.approx(average_precision_score(1 - truth, -scores), abs=1e-6)
    false, true, _ = roc_curve(1 - truth, -scores, drop_intermediate=False)
    assert float(found["fpr95_out"]) == pytest.approx(false[true >= 0.95].min(), abs=1e-6)
    # The error rates at 100,000 thresholds over the range.
    grid = np.linspace(scores.min(), scores.max(), 100_001)
    rejected, accepted = ((known.numpy() < t).mean() for t in grid), ((unknown.numpy() >= t).mean() for t in grid)
    assert float(found["autc"]) == pytest.approx(np.mean([*rejected, *accepted]), abs=2e-4)
    above_unknown, above_known = roc(known, unknown, points=10_000)
    np.testing.assert_allclose(above_unknown, fpr, atol=1e-6)
    np.testing.assert_allclose(above_known, tpr, atol=1e-6)


def test_ties_count_half_and_the_threshold_keeps_95_percent() -> None:
    found = separation(torch.tensor([3.0, 2, 2, 1]), torch.tensor([2.0, 0]))
    assert float(found["auroc"]) == (1 + 1 + 0.5 + 1 + 0.5 + 1 + 0 + 1) / 8
    assert float(found["fpr95"]) == 0.5  # all four must be kept: the threshold is 1
    twenty = torch.arange(1.0, 21)  # 19 must be kept: the threshold is 2, which one unknown sample has
    assert float(separation(twenty, torch.tensor([1.5, 2.0, 5.0]))["fpr95"]) == pytest.approx(2 / 3)


def test_separated_scores_are_perfect_and_reversed_ones_the_worst() -> None:
    low, high = torch.arange(5.0), torch.arange(5.0, 12)
    assert {name: float(value) for name, value in separation(high, low).items()} == {
        "auroc": 1, "aupr": 1, "fpr95": 0, "aupr_out": 1, "fpr95_out": 0, "autc": pytest.approx((1 + (2 - 8) / 11) / 2)
    }  # fmt: skip
    reverse = separation(low, high)
    assert (float(reverse["auroc"]), float(reverse["fpr95"])) == (0, 1)
    assert all(value.isnan() for value in separation(high, low[:0]).values())
    assert all(value.isnan() for value in separation(high[:0], low).values())
    assert all(value.isnan() for value in separation(high, torch.tensor([0.0, torch.nan])).values())


def test_a_thinned_roc_keeps_both_ends() -> None:
    curve = roc(torch.arange(500.0), torch.arange(500.0) - 100, points=20)
    assert [len(side) for side in curve] == [20, 20]
    assert [(float(side[0]), float(side[-1])) for side in curve] == [(0, 1), (0, 1)]
    assert all(bool((side.diff() >= 0).all()) for side in curve)


def test_class_accuracy_is_the_mean_recall_of_the_classes_that_are_present() -> None:
    labels, answers = torch.tensor([0, 0, 0, 0, 2, 2, 5]), torch.tensor([0, 0, 0, 1, 2, 1, 4])  # 1 and 4 are absent
    found = class_accuracy(labels, labels == answers)
    assert float(found) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert float(found) == pytest.approx(recall_score(labels, answers, labels=[0, 2, 5], average="macro"))
    assert class_accuracy(labels[:0], labels[:0].bool()).isnan()


def test_h_is_the_harmonic_mean() -> None:
    a, b, nothing = (torch.tensor(value) for value in (0.8, 0.5, 0.0))
    assert float(harmonic_mean(a, b)) == pytest.approx(2 / (1 / 0.8 + 1 / 0.5))
    assert float(harmonic_mean(nothing, nothing)) == 0
    assert harmonic_mean(a, nothing * torch.nan).isnan()
