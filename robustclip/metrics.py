"""Metrics of classification, detection, retrieval and feature geometry, beyond those that torchmetrics has."""

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

RANKS = (1, 5, 10)  # ranks of retrieval
SEPARATION = ("auroc", "aupr", "fpr95", "aupr_out", "fpr95_out", "autc")  # keys of `separation`
KEPT = 0.95  # share of the positives that must be kept when the negatives among them are counted


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

    def update(self, is_correct: Tensor) -> None:
        """Counts predictions ``(B,)``, true where correct."""
        self.correct += is_correct.sum()
        self.total += is_correct.numel()

    def compute(self) -> dict[str, Tensor]:
        """Returns ``acc1`` in [0, 1], ``correct`` and ``n``; the accuracy of no sample is nan."""
        return {"acc1": self.correct / self.total, "correct": self.correct, "n": self.total}


def class_sums(features: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """Sums features, squared norms and ones per class, in fp64; the sums of batches and processes can be added.

    Args:
        features: ``(B, D)``.
        labels: ``(B,)`` in [0, C).
        classes: number ``C`` of classes.

    Returns:
        ``(C, D + 2)``: the sum of the class's features, the sum of their squared norms, and their number.
    """
    wide = features.double()
    rows = torch.cat([wide, wide.square().sum(1, keepdim=True), torch.ones_like(wide[:, :1])], dim=1)
    return rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows)


def class_scatter(sums: Tensor) -> Tensor:
    """Computes the class scatter ``tr(S_within) / tr(S_between)`` from `class_sums` ``(C, D + 2)``.

    It is infinite or nan if all classes have the same mean.
    """
    seen = sums[sums[:, -1] > 0]
    totals, squares, n = seen[:, :-2], seen[:, -2].sum(), seen[:, -1]
    around_zero = (totals.square().sum(1) / n).sum()
    return ((squares - around_zero) / (around_zero - totals.sum(0).square().sum() / n.sum())).float()


def similarity(tuned: Tensor, original: Tensor) -> dict[str, Tensor]:
    """Computes how the cosines of all pairs of samples in one model correlate with those in another.

    Args:
        tuned: unit features ``(N, D)``.
        original: unit features ``(N, D)`` of the same samples.

    Returns:
        ``pearson`` and ``spearman`` correlations; nan for fewer than two pairs.
    """
    above = torch.triu_indices(len(tuned), len(tuned), offset=1, device=tuned.device)
    ours, theirs = ((features @ features.T)[above[0], above[1]] for features in (tuned, original))
    if ours.numel() < 2:
        return dict.fromkeys(("pearson", "spearman"), tuned.new_tensor(torch.nan))
    return {"pearson": pearson_corrcoef(ours, theirs), "spearman": spearman_corrcoef(ours, theirs)}


def recalls(cosines: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """Computes the recall at ranks 1, 5 and 10 of image-text retrieval, in both directions.

    A tie counts against the model: a correct entry comes behind all wrong ones with the same cosine, so that equal
    features for all do not score by their order. A nan counts as the highest of wrong cosines, and is never correct.

    Args:
        cosines: ``(N, M)`` of images and captions.
        owner: ``(M,)`` image of each caption.
    """
    is_own = torch.arange(len(cosines), device=owner.device)[:, None] == owner
    rates: dict[str, Tensor] = {}
    for name, scores, is_correct in (("image_to_text", cosines, is_own), ("text_to_image", cosines.T, is_own.T)):
        best = scores.masked_fill(~is_correct, -torch.inf).nan_to_num(-torch.inf, posinf=torch.inf).amax(1)
        before = (~is_correct & ~(scores < best[:, None])).sum(1)
        rates |= {f"{name}_r{rank}": ((before < rank) & best.isfinite()).float().mean() for rank in RANKS}
    return rates


def class_accuracy(labels: Tensor, is_correct: Tensor) -> Tensor:
    """Computes the mean accuracy over the classes that have a sample.

    Args:
        labels: ``(N,)``.
        is_correct: ``(N,)``, whether each sample is classified correctly.
    """
    counts = labels.bincount()
    return (labels.bincount(is_correct.double(), minlength=len(counts)) / counts)[counts > 0].mean()


def harmonic_mean(a: Tensor, b: Tensor) -> Tensor:
    """Computes ``2 a b / (a + b)``, and 0 where both are 0.

    Args:
        a: any shape, at least 0.
        b: same shape, at least 0.
    """
    return torch.where(a + b == 0, 0.0, 2 * a * b / (a + b))


def calibration_error(confidence: Tensor, is_correct: Tensor, bins: int) -> Tensor:
    """Computes the expected calibration error; nan without samples or with a nan confidence.

    Args:
        confidence: ``(N,)`` in [0, 1].
        is_correct: ``(N,)``, whether each sample is classified correctly.
        bins: number of bins of equal width.
    """
    if not len(confidence) or confidence.isnan().any():
        return confidence.new_tensor(torch.nan)
    return binary_calibration_error(confidence, is_correct.long(), n_bins=bins)


def separation(known: Tensor, unknown: Tensor) -> dict[str, Tensor]:
    """Computes how well a score separates known samples from unknown ones, with either as the positives.

    Args:
        known: scores ``(N,)`` of known samples.
        unknown: scores ``(M,)`` of unknown samples.

    Returns:
        ``auroc``: share of pairs in which the known sample has the higher score, ties counting half. ``aupr``: average
        precision, the known samples being the positives (AUPR-IN). ``fpr95``: share of the unknown samples at or above
        the highest threshold that at least 95 % of the known ones reach. ``aupr_out`` and ``fpr95_out``: the same with
        unknown samples as the positives and the negative score, as in OpenOOD and pytorch-ood. ``autc``: see
        `threshold_area`. All are nan without known or unknown samples, or if a score is nan.
    """
    if not len(known) or not len(unknown) or torch.cat([known, unknown]).isnan().any():
        return dict.fromkeys(SEPARATION, known.new_tensor(torch.nan))
    aupr, fpr95 = _at_positives(known, unknown)
    aupr_out, fpr95_out = _at_positives(-unknown, -known)
    values = binary_auroc(*_ranked(known, unknown)), aupr, fpr95, aupr_out, fpr95_out, threshold_area(known, unknown)
    return dict(zip(SEPARATION, values, strict=True))


def threshold_area(known: Tensor, unknown: Tensor) -> Tensor:
    """Computes AUTC, the mean of both error rates over all thresholds (https://arxiv.org/abs/2306.14658).

    Scores are scaled to [0, 1] by their range. The areas are exact: the rejected share of the known samples, over all
    thresholds, is one minus their mean score, and the accepted share of the unknown ones is theirs. 0 is perfect; equal
    scores give a half.

    Args:
        known: scores ``(N,)`` of known samples, not nan.
        unknown: scores ``(M,)`` of unknown samples, not nan.
    """
    low, high = torch.cat([known, unknown]).aminmax()
    return torch.where(high > low, (1 + (unknown.mean() - known.mean()) / (high - low)) / 2, 0.5)


def _at_positives(positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the average precision, and the share of negatives at the threshold that keeps 95 % of the positives."""
    ranks, is_positive = _ranked(positives, negatives)
    specificity, _ = binary_specificity_at_sensitivity(ranks, is_positive, min_sensitivity=KEPT)
    return binary_average_precision(ranks, is_positive), 1 - specificity


def roc(known: Tensor, unknown: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Computes the ROC curve: shares of unknown and of known samples above a falling threshold.

    Args:
        known: scores ``(N,)`` of known samples.
        unknown: scores ``(M,)`` of unknown samples.
        points: maximal number of points, at even distances along the curve.
    """
    above_unknown, above_known, _ = binary_roc(*_ranked(known, unknown))
    chosen = torch.linspace(0, len(above_known) - 1, min(points, len(above_known)), dtype=torch.float64).round().long()
    return above_unknown[chosen], above_known[chosen]


def _ranked(known: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
    """Converts scores to ranks in [0, 1], which keep order and ties, and marks the known ones.

    torchmetrics would apply a sigmoid to scores beyond [0, 1], which makes large ones equal.
    """
    scores = torch.cat([known, unknown])
    is_known = torch.arange(len(scores), device=scores.device) < len(known)
    return torch.searchsorted(scores.sort().values, scores).double() / len(scores), is_known.long()
