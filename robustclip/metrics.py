"""What is counted; everything that torchmetrics has is used from there."""

import torch
from torch import Tensor
from torchmetrics import Metric


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
