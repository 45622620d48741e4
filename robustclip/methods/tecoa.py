"""TeCoA: text-guided contrastive adversarial training."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks import PGD, Attack
from robustclip.methods.base import RobustMethod
from robustclip.types import Batch


class TeCoA(RobustMethod):
    """TeCoA (Mao et al., ICLR 2023, https://arxiv.org/abs/2212.07016).

    Minimises ``-log softmax(s cos(f(x'), t))_y`` over the class prompts ``t`` of the training set, where ``s`` is the
    frozen logit scale and ``x'`` maximises the same loss in the ball (PGD, last iterate).

    Departures from the authors' code, none of which the paper asks for: the attack leaves no gradient behind, is
    driven by the summed loss, and the text tower runs once instead of at every step.

    Args:
        last_blocks: train only the last N blocks of the image tower and its closing norm; null trains all of it.
        attack: training attack.
        optimizer: the paper's is SGD with momentum 0.9 and no weight decay.
        warmup_steps: steps of linear warm-up before the cosine.
        kwargs: arguments of `RobustMethod`.

    Raises:
        ValueError: ``last_blocks`` is not between 1 and the tower's number of blocks.
    """

    def __init__(
        self,
        last_blocks: int | None = None,
        attack: Attack = PGD(eps="1/255", alpha="1/255", steps=2),
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1e-5, momentum=0.9),
        warmup_steps: int = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(attack=attack, optimizer=optimizer, warmup_steps=warmup_steps, **kwargs)
        self.last_blocks = last_blocks
        if last_blocks is not None and not 1 <= last_blocks <= len(self.clip.image_blocks()):
            available = len(self.clip.image_blocks())
            raise ValueError(f"last_blocks must be in [1, {available}], got {last_blocks}; null trains the whole tower")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The image tower, or its last blocks."""
        if self.last_blocks is None:
            return super().parameter_groups()
        blocks = self.clip.image_blocks()[-self.last_blocks :]
        return [{"params": [parameter for block in blocks for parameter in block.parameters()]}]

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the class prompts, on attacked images."""
        return {"adversarial_ce": F.cross_entropy(self.logits(self.perturb(batch)).float(), batch.labels)}
