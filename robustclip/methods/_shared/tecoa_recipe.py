"""TeCoARecipe, the base class of the methods that train on attacked images with TeCoA's settings."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from robustclip.arguments import CountOrZero
from robustclip.attacks import PGD, Attack
from robustclip.methods.base import RobustMethod


class TeCoARecipe(RobustMethod):
    """Base of methods with the training attack, optimiser and warm-up of TeCoA (https://arxiv.org/abs/2212.07016).

    Args:
        attack: training attack.
        optimizer: the paper's is SGD with momentum 0.9 and no weight decay.
        warmup_steps: steps of linear warm-up before the cosine.
        kwargs: arguments of `RobustMethod`.
    """

    def __init__(
        self,
        attack: Attack = PGD(eps="1/255", alpha="1/255", steps=2),
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1e-5, momentum=0.9),
        warmup_steps: CountOrZero = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(attack=attack, optimizer=optimizer, warmup_steps=warmup_steps, **kwargs)
