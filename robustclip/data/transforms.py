"""From a decoded image to a tensor in [0, 1]."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

RESIZE_RATIO = 256 / 224  # the short side before the centre crop, as in CLIP's and TeCoA's evaluation


class ToPixels:
    """From an image to ``(3, H, W)`` float32 in [0, 1]: RGB, short side resized (bilinear), centre crop.

    Args:
        size: side of the crop in pixels; None keeps the image's own size.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        if size is not None:
            self._resize = Resize(round(size * RESIZE_RATIO), InterpolationMode.BILINEAR)
            self._crop = CenterCrop(size)

    @property
    def description(self) -> str:
        """The same in words, for the protocol of a result."""
        if self.size is None:
            return "RGB, own size"
        return f"RGB, short side {round(self.size * RESIZE_RATIO)} bilinear antialiased, centre crop {self.size}"

    def __call__(self, image: Image.Image) -> Tensor:
        """One image."""
        image = image.convert("RGB")
        if self.size is not None:
            image = self._crop(self._resize(image))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
