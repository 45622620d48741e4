"""Fine-tuning on clean images, the baseline of every robust method."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import CountOrZero
from robustclip.methods.base import RobustMethod
from robustclip.types import Batch


class CleanFineTuning(RobustMethod):
    """Fine-tuning on clean images with TeCoA's recipe (Mao et al., ICLR 2023, https://arxiv.org/abs/2212.07016).

    Minimises ``-log softmax(s cos(f(x), t))_y`` over the class prompts ``t`` of the training set, where ``s`` is the
    frozen logit scale.

    Args:
        optimizer: default of TeCoA, SGD with momentum 0.9 and no weight decay.
        warmup_steps: steps of linear warm-up before the cosine.
        kwargs: arguments of `RobustMethod`.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1e-5, momentum=0.9),
        warmup_steps: CountOrZero = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, warmup_steps=warmup_steps, **kwargs)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy over the class prompts, on clean images."""
        return {"clean_ce": F.cross_entropy(self.logits(batch.images), batch.labels)}
