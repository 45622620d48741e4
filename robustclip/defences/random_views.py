"""Random views of images, for defences that compare or average several of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as T

from robustclip.defences.defence import Defence

NUMBERS = 13  # uniform numbers that a view needs beside its noise
BLUR_TAPS = 5  # pixels of the blur in each direction


@dataclass(frozen=True)
class Views:
    """Strengths of the changes that make a view; each change but the affine map happens with a probability.

    Args:
        degrees: largest rotation.
        shift: largest shift, as a share of the side.
        scale: largest change of the size, as a share.
        jitter: largest changes of brightness, contrast, saturation (as shares) and hue (of the colour circle).
        blur: smallest and largest standard deviation of the blur, in pixels.
        noise: largest standard deviation of the noise.
        probability: probability of each of jitter, blur and noise.
    """

    degrees: float = 5.0
    shift: float = 0.04
    scale: float = 0.08
    jitter: tuple[float, float, float, float] = (0.08, 0.08, 0.08, 0.02)
    blur: tuple[float, float] = (0.5, 1.2)
    noise: float = 0.02
    probability: float = 0.5

    def of(self, images: Tensor, defence: Defence, *, index: Tensor | None, draw: int, part: int) -> Tensor:
        """Makes a view of every image, with gradients.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            defence: defence that draws the numbers.
            index: ``(B,)`` sample ids.
            draw: number of the draw.
            part: number of the view.
        """
        draws = defence.uniform(index, (NUMBERS,), draw=draw, part=part)
        signed = 2 * draws[:, :8] - 1
        is_on = draws[:, 8:11] < self.probability
        view = self._moved(images, signed[:, :4])
        view = _where(is_on[:, 0], self._jittered(view, signed[:, 4:8]), view)
        view = _where(is_on[:, 1], self._blurred(view, draws[:, 11]), view)
        sigma = (self.noise * draws[:, 12]).view(-1, 1, 1, 1)
        noisy = view + sigma * defence.normal(index, tuple(images.shape[1:]), draw=draw, part=part)
        return _where(is_on[:, 2], noisy, view).clamp(0, 1)

    def _moved(self, images: Tensor, signed: Tensor) -> Tensor:
        """Rotates, scales and shifts by four numbers in [-1, 1) per image; pixels from outside repeat the border."""
        angle, zoom = math.radians(self.degrees) * signed[:, 0], 1 + self.scale * signed[:, 1]
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        across, down = (2 * self.shift * signed[:, number] for number in (2, 3))  # the grid's side is 2
        maps = torch.stack([torch.stack([cos, -sin, across], -1), torch.stack([sin, cos, down], -1)], 1)
        grid = F.affine_grid(maps, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _jittered(self, images: Tensor, signed: Tensor) -> Tensor:
        """Changes brightness, contrast, saturation and hue by four numbers in [-1, 1) per image."""
        changed = []
        for image, numbers in zip(images, signed.tolist(), strict=True):
            factors = [strength * number for strength, number in zip(self.jitter, numbers, strict=True)]
            image = T.adjust_brightness(image, 1 + factors[0])
            image = T.adjust_saturation(T.adjust_contrast(image, 1 + factors[1]), 1 + factors[2])
            changed.append(T.adjust_hue(image, factors[3]))
        return torch.stack(changed)

    def _blurred(self, images: Tensor, draws: Tensor) -> Tensor:
        """Blurs by a Gaussian of another width per image."""
        low, high = self.blur
        sigmas = (low + (high - low) * draws).tolist()
        taps = [BLUR_TAPS, BLUR_TAPS]
        return torch.stack(
            [T.gaussian_blur(image, taps, [sigma, sigma]) for image, sigma in zip(images, sigmas, strict=True)]
        )


def _where(is_on: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    return torch.where(is_on.view(-1, 1, 1, 1), changed, images)
