"""JPEG compression of the image before it is classified."""

from typing import Annotated

import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from robustclip.arguments import Interval
from robustclip.defences.defence import Defence, Model

GREY_LEVELS = 255


class JPEG(Defence):
    """Compresses and decompresses the image (Dziugaite et al., arXiv:1608.00853; Guo et al., arXiv:1711.00117).

    Rounding to 8 bits and quantisation have no gradient.

    Args:
        quality: quality of the encoder, from 1 to 100.
    """

    backward = "none"

    def __init__(self, quality: Annotated[int, Interval(1, 100)] = 75) -> None:
        super().__init__()
        self.quality = quality

    @torch.no_grad()
    def purify(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the decoded images, in steps of 1/255."""
        pixels = (images.clamp(0, 1) * GREY_LEVELS).round().to(torch.uint8).cpu()
        decoded = [decode_jpeg(encode_jpeg(image, self.quality)) for image in pixels]
        return torch.stack(decoded).to(images) / GREY_LEVELS
