"""Metrics that torchmetrics does not have, and the settings of those that it has."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
    binary_roc,
    binary_specificity_at_sensitivity,
)

RANKS = (1, 5, 10)  # of retrieval
KEPT = 0.95  # of the known samples, where unknown ones that pass are counted


class Top1(Metric):
    """Top-1 accuracy as exact counts, summed over batches and processes.

    torchmetrics' accuracies give the ratio alone; results also need the numerator and the denominator.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, is_right: Tensor) -> None:
        """Count answers ``(B,)``, true where correct."""
        self.correct += is_right.sum()
        self.total += is_right.numel()

    def compute(self) -> dict[str, Tensor]:
        """``acc1`` in [0, 1], ``correct`` and ``n``; accuracy of no sample is nan."""
        return {"acc1": self.correct / self.total, "correct": self.correct, "n": self.total}


def class_sums(features: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """Sum the features, their squared norms and their number per class, as ``(C, D + 2)`` in fp64.

    Sums over batches and processes add up.

    Args:
        features: ``(B, D)``.
        labels: ``(B,)``.
        classes: their number ``C``.
    """
    wide = features.double()
    rows = torch.cat([wide, wide.square().sum(1, keepdim=True), torch.ones_like(wide[:, :1])], dim=1)
    return rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows)


def collapse(sums: Tensor) -> Tensor:
    """``tr(S_within) / tr(S_between)`` of `class_sums`; infinite or nan where the classes have one mean."""
    seen = sums[sums[:, -1] > 0]
    totals, squares, n = seen[:, :-2], seen[:, -2].sum(), seen[:, -1]
    around_zero = (totals.square().sum(1) / n).sum()
    return ((squares - around_zero) / (around_zero - totals.sum(0).square().sum() / n.sum())).float()


def similarity(tuned: Tensor, original: Tensor) -> dict[str, Tensor]:
    """Correlate the cosines of all pairs of samples in two models.

    Args:
        tuned: unit features ``(N, D)`` of one model.
        original: unit features ``(N, D)`` of the other.
    """
    above = torch.triu_indices(len(tuned), len(tuned), offset=1, device=tuned.device)
    ours, theirs = ((features @ features.T)[above[0], above[1]] for features in (tuned, original))
    if ours.numel() < 2:
        return dict.fromkeys(("pearson", "spearman"), tuned.new_tensor(torch.nan))
    return {"pearson": pearson_corrcoef(ours, theirs), "spearman": spearman_corrcoef(ours, theirs)}


def recalls(cosines: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """Recall at 1, 5 and 10 of retrieval in both directions.

    Args:
        cosines: ``(N, M)`` of images and captions.
        owner: ``(M,)`` the image of each caption; others are wrong.
    """
    found: dict[str, Tensor] = {}
    own = torch.arange(len(cosines), device=owner.device)
    for name, scores, wanted, truth in (
        ("image_to_text", cosines, lambda places: owner[places], own),
        ("text_to_image", cosines.T, lambda places: places, owner),
    ):
        places = scores.topk(min(max(RANKS), scores.shape[1]), dim=1).indices
        is_right = wanted(places) == truth[:, None]
        found |= {f"{name}_r{rank}": is_right[:, :rank].any(1).float().mean() for rank in RANKS}
    return found


def class_accuracy(labels: Tensor, is_right: Tensor) -> Tensor:
    """Mean over the classes of their accuracies; a class without a sample does not count.

    Args:
        labels: ``(N,)``.
        is_right: ``(N,)``, true where the answer is correct.
    """
    counts = labels.bincount()
    return (labels.bincount(is_right.double(), minlength=len(counts)) / counts)[counts > 0].mean()


def harmonic_mean(a: Tensor, b: Tensor) -> Tensor:
    """``2 a b / (a + b)``, and 0 where both are 0.

    Args:
        a: scalar.
        b: scalar.
    """
    return torch.where(a + b == 0, 0.0, 2 * a * b / (a + b))


def calibration_error(confidence: Tensor, is_right: Tensor, bins: int) -> Tensor:
    """Expected calibration error; nan without samples or of a nan.

    Args:
        confidence: ``(N,)`` in [0, 1].
        is_right: ``(N,)``, true where the answer is correct.
        bins: their number.
    """
    if not len(confidence) or confidence.isnan().any():
        return confidence.new_tensor(torch.nan)
    return binary_calibration_error(confidence, is_right.long(), n_bins=bins)


def separation(known: Tensor, unknown: Tensor) -> dict[str, Tensor]:
    """Measure how well a score separates known samples, the positives, from unknown ones.

    Args:
        known: scores ``(N,)``.
        unknown: scores ``(M,)``.

    Returns:
        ``auroc``: the share of pairs in which the known sample scores higher, ties by half. ``aupr``: average
        precision. ``fpr95``: the share of the unknown samples at or above the highest threshold that at least 95 % of
        the known ones reach. All nan without known or unknown samples, or where a score is.
    """
    if not len(known) or not len(unknown) or torch.cat([known, unknown]).isnan().any():
        return dict.fromkeys(("auroc", "aupr", "fpr95"), known.new_tensor(torch.nan))
    ranks, is_known = _ranked(known, unknown)
    specificity, _ = binary_specificity_at_sensitivity(ranks, is_known, min_sensitivity=KEPT)
    return {
        "auroc": binary_auroc(ranks, is_known),
        "aupr": binary_average_precision(ranks, is_known),
        "fpr95": 1 - specificity,
    }


def roc(known: Tensor, unknown: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Shares of unknown and of known samples above a falling threshold, from (0, 0) to (1, 1).

    Args:
        known: scores ``(N,)``.
        unknown: scores ``(M,)``.
        points: largest number of points, at even distances along the curve.
    """
    above_unknown, above_known, _ = binary_roc(*_ranked(known, unknown))
    chosen = torch.linspace(0, len(above_known) - 1, min(points, len(above_known)), dtype=torch.float64).round().long()
    return above_unknown[chosen], above_known[chosen]


def _ranked(known: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
    """Scores as ranks in [0, 1], which keep order and ties, and which of them are known.

    torchmetrics would take the sigmoid of scores beyond [0, 1], where large ones become ties.
    """
    scores = torch.cat([known, unknown])
    is_known = torch.arange(len(scores), device=scores.device) < len(known)
    return torch.searchsorted(scores.sort().values, scores).double() / len(scores), is_known.long()
