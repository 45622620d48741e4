"""The pre-trained model without training, the baseline that every method is compared with."""

from typing import Any

from torch import Tensor

from robustclip.methods.base import RobustMethod
from robustclip.types import Batch


class ZeroShot(RobustMethod):
    """The pre-trained model without training (CLIP, https://arxiv.org/abs/2103.00020).

    Examples:
        >>> import torch
        >>> from robustclip import Task, ZeroShot
        >>> model = ZeroShot(pretrained="shapes")
        >>> model.prepare([Task("colours", ("red", "blue"), ("a {} shape",))])
        >>> model.logits(torch.rand(2, 3, 32, 32), "colours").shape
        torch.Size([2, 2])
    """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns no parameters, so that everything is frozen."""
        return []

    def setup(self, stage: str) -> None:
        """Refuses the stage ``fit``, before anything runs.

        Raises:
            ValueError: the stage is ``fit``.
        """
        if stage == "fit":
            raise ValueError("ZeroShot has nothing to fit; use `robustclip test`, or a method such as TeCoA")
        super().setup(stage)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns no terms, since nothing is trained."""
        return {}
