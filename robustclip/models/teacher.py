"""The pre-trained image tower, kept as a frozen copy beside the tower in training."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from robustclip.models.clip import CLIPModel
from robustclip.models.compilation import compile_image_tower


class ImageTeacher(nn.Module):
    """A frozen copy of an image tower: without gradients, in eval mode, and not saved in checkpoints.

    Args:
        clip: newly constructed model with its pre-trained weights; the text tower is not copied.

    Raises:
        ValueError: the model has random weights: they contain no knowledge, and a resumed run could not restore them.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        if clip.pretrained is None:
            raise ValueError("a teacher needs a pre-trained model, got pretrained null; set model.pretrained")
        parts = [*clip.net.named_children(), *clip.net.named_parameters(recurse=False)]
        of_text = [clip.tokenizer, *(part for name, part in parts if name != "visual")]
        # A deep copy whose memo maps the text tower's parts to None, so that they are left out.
        self.clip = copy.deepcopy(clip, {id(part): None for part in of_text}).requires_grad_(False).eval()
        if clip.compiled_by is not None:  # a copy is not compiled
            compile_image_tower(self.clip, backend=clip.compiled_by)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds images ``(B, 3, H, W)`` in [0, 1] as ``(B, D)``, not normalised."""
        with torch.no_grad():
            return self.clip.embed_image(images)

    def encode_image(self, images: Tensor) -> Tensor:
        """Encodes images ``(B, 3, H, W)`` in [0, 1] as unit features ``(B, D)``, in fp32 at least."""
        with torch.no_grad():
            return self.clip.encode_image(images)

    def train(self, mode: bool = True) -> "ImageTeacher":
        """Keeps the eval mode, whatever the mode."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Returns no entries, since a run that loads a checkpoint has the pre-trained model."""
        return {} if destination is None else destination
