"""Random resizing and padding of the image before it is classified."""

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Positive
from robustclip.defences.defence import Defence, Model


class ResizeAndPad(Defence):
    """Enlarges the image to a random side and pads it at a random place (Xie et al., arXiv:1711.01991).

    The side is uniform in ``[H, largest H]``; the rest of the canvas is black. Departure from the paper: the canvas is
    resized to ``H`` again (bicubic), so that any model accepts it. The paper's largest side is 331 of 299 pixels.

    Args:
        largest: side of the canvas divided by the side of the image, at least 1.

    Raises:
        ValueError: the canvas is smaller than the image.
    """

    is_random = True

    def __init__(self, largest: Positive = 1.1) -> None:
        super().__init__()
        if largest < 1:
            raise ValueError(f"ResizeAndPad: largest must be at least 1, got {largest:g}")
        self.largest = largest

    def purify(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the padded images in their own size."""
        side = images.shape[-1]
        canvas = round(self.largest * side)
        draws = self.uniform(index, (3,), draw=draw).tolist()
        placed = [_placed(image, canvas, *numbers) for image, numbers in zip(images, draws, strict=True)]
        return F.interpolate(torch.stack(placed), images.shape[-2:], mode="bicubic", align_corners=False)


def _placed(image: Tensor, canvas: int, size: float, down: float, across: float) -> Tensor:
    """Resizes an image ``(3, H, W)`` and pads it to a square canvas, by three numbers in [0, 1)."""
    side = image.shape[-1] + int(size * (canvas - image.shape[-1] + 1))
    resized = F.interpolate(image[None], (side, side), mode="bilinear", align_corners=False)[0]
    top, left = (int(number * (canvas - side + 1)) for number in (down, across))
    return F.pad(resized, (left, canvas - side - left, top, canvas - side - top))
