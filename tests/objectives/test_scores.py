"""Scores of known classes and what is measured of them, against formulas, scikit-learn and counting."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score, roc_curve
from torch import Tensor

from robustclip.metrics import class_accuracy, harmonic_mean, roc, separation
from robustclip.objectives.scores import SCORES, ScoreName

SCALE = torch.tensor(50.0, dtype=torch.float64)


def logits(*shape: int, seed: int = 0) -> Tensor:
    cosines = 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SCALE * cosines


def by_hand(row: list[float]) -> dict[ScoreName, float]:
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
    }


def test_scores_are_their_formulas() -> None:
    rows = logits(6, 5)
    expected = [by_hand(row.tolist()) for row in rows]
    for name, score in SCORES.items():
        assert score.value(rows, SCALE).tolist() == pytest.approx([each[name] for each in expected], rel=1e-12), name


@pytest.mark.parametrize("name", SCORES)
def test_what_an_attack_pushes_increases_with_the_score(name: ScoreName) -> None:
    rows = logits(500, 4)
    value, evidence = (of(rows, SCALE) for of in SCORES[name])
    assert torch.equal(value.argsort(), evidence.argsort())
    if name in ("mcm", "msp"):  # 1 / (1 + exp(-log-odds)) is increasing
        torch.testing.assert_close(evidence.sigmoid(), value, rtol=1e-12, atol=0)


def test_evidence_has_a_gradient_where_a_softmax_has_none() -> None:
    certain = torch.tensor([[90.0, 0.0, -5.0]], requires_grad=True)
    for of, has_gradient in zip(SCORES["msp"], (False, True), strict=True):
        (gradient,) = torch.autograd.grad(of(certain, SCALE.float()).sum(), certain)
        assert bool(gradient[0, 0] > 0.5) == has_gradient


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
    assert {name: float(value) for name, value in separation(high, low).items()} == {"auroc": 1, "aupr": 1, "fpr95": 0}
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
