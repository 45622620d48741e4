"""The pre-trained towers, kept as frozen copies beside the towers in training."""

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
        # A deep copy whose memo maps these parts to None, so that they are left out.
        omitted = [clip.tokenizer, *self._omitted(clip.net)]
        self.clip = copy.deepcopy(clip, {id(part): None for part in omitted}).requires_grad_(False).eval()
        if clip.compiled_by is not None:  # a copy is not compiled
            compile_image_tower(self.clip, backend=clip.compiled_by)

    def _omitted(self, net: Any) -> list[Any]:
        """Lists the parts of the text tower."""
        parts = [*net.named_children(), *net.named_parameters(recurse=False)]
        return [part for name, part in parts if name != "visual"]

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


class Teacher(ImageTeacher):
    """A frozen copy of both towers.

    Args:
        clip: newly constructed model with its pre-trained weights.

    Raises:
        ValueError: the model has random weights.
    """

    def _omitted(self, net: Any) -> list[Any]:
        return []

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encodes tokens ``(N, L)`` on the model's device as unit features ``(N, D)``."""
        with torch.no_grad():
            return self.clip.encode_tokens(tokens)
