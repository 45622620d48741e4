"""What is counted and measured; everything that torchmetrics has is used from there."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

RANKS = (1, 5, 10)  # of retrieval


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
        """Counts answers ``(B,)``, true where right."""
        self.correct += is_right.sum()
        self.total += is_right.numel()

    def compute(self) -> dict[str, Tensor]:
        """``acc1`` in [0, 1], ``correct`` and ``n``; accuracy of no sample is nan."""
        return {"acc1": self.correct / self.total, "correct": self.correct, "n": self.total}


def class_sums(features: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """Of each class the sum of its features ``(B, D)``, of their squared norms, and their number: ``(C, D + 2)``.

    In fp64, and sums over batches and processes add up.
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
    """Correlations of the cosines of all pairs of samples in two models, each with unit features ``(N, D)``."""
    above = torch.triu_indices(len(tuned), len(tuned), offset=1, device=tuned.device)
    ours, theirs = ((features @ features.T)[above[0], above[1]] for features in (tuned, original))
    if ours.numel() < 2:
        return dict.fromkeys(("pearson", "spearman"), tuned.new_tensor(torch.nan))
    return {"pearson": pearson_corrcoef(ours, theirs), "spearman": spearman_corrcoef(ours, theirs)}


def recalls(cosines: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """How often a right one is among the first 1, 5 and 10, in both directions.

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
