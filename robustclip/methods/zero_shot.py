"""The baseline that every method is compared with."""

from typing import Any

from torch import Tensor

from robustclip.methods.base import RobustMethod
from robustclip.types import Batch


class ZeroShot(RobustMethod):
    """The pre-trained model as it is (CLIP, https://arxiv.org/abs/2103.00020); nothing learns."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """None."""
        return []

    def setup(self, stage: str) -> None:
        """Refuses to fit before anything runs.

        Raises:
            ValueError: for the stage ``fit``.
        """
        if stage == "fit":
            raise ValueError("ZeroShot has nothing to fit; use `robustclip test`, or a method such as TeCoA")
        super().setup(stage)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """There is none."""
        return {}
