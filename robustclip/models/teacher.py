"""The pre-trained image tower, kept beside the one that learns."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from robustclip.models.clip import CLIPModel


class ImageTeacher(nn.Module):
    """A frozen copy of an image tower: without gradients, in eval mode, and in no checkpoint.

    Args:
        clip: a model with its pre-trained weights, as constructed; the text tower is not copied.

    Raises:
        ValueError: a model with random weights, which teach nothing, and which no resumed run could find again.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        if clip.pretrained is None:
            raise ValueError("a teacher needs a pre-trained model, got pretrained null; set model.pretrained")
        parts = [*clip.net.named_children(), *clip.net.named_parameters(recurse=False)]
        of_text = [clip.tokenizer, *(part for name, part in parts if name != "visual")]
        self.clip = copy.deepcopy(clip, {id(part): None for part in of_text}).requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to embeddings ``(B, D)``, not normalised."""
        with torch.no_grad():
            return self.clip.embed_image(images)

    def train(self, mode: bool = True) -> "ImageTeacher":
        """Stays in eval mode."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Nothing: whoever loads a checkpoint has the pre-trained model."""
        return {} if destination is None else destination
