"""Random views of images, for defences that compare or average several of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.defences.defence import Defence

NUMBERS = 13  # uniform numbers that a view needs beside its noise
BLUR_REACH = 2  # pixels to each side
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class RandomView:
    """Random change of an image by an affine map and, each with a probability, by colour jitter, blur and noise.

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

    def apply(self, images: Tensor, defence: Defence, *, index: Tensor | None, draw: int, part: int) -> Tensor:
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
        strengths = signed * signed.new_tensor(self.jitter)
        bright, contrast, saturation, hue = (part.view(-1, 1, 1, 1) for part in strengths.unbind(1))
        changed = (images * (1 + bright)).clamp(0, 1)
        mean = _grey(changed).mean((1, 2, 3), keepdim=True)
        changed = (mean + (1 + contrast) * (changed - mean)).clamp(0, 1)
        grey = _grey(changed)
        return (grey + (1 + saturation) * _turned(changed - grey, 2 * math.pi * hue)).clamp(0, 1)

    def _blurred(self, images: Tensor, draws: Tensor) -> Tensor:
        """Blurs by a Gaussian of another width per image."""
        low, high = self.blur
        sigma = (low + (high - low) * draws)[:, None]
        places = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=images.device)
        weights = torch.softmax(-(places**2) / (2 * sigma**2), -1)
        for dim in (2, 3):
            pads = [BLUR_REACH, BLUR_REACH, 0, 0] if dim == 3 else [0, 0, BLUR_REACH, BLUR_REACH]
            padded, side = F.pad(images, pads, mode="replicate"), images.shape[dim]
            parts = [padded.narrow(dim, start, side) for start in range(len(places))]
            zeros = torch.zeros_like(images)
            images = sum((weights[:, [n]].view(-1, 1, 1, 1) * part for n, part in enumerate(parts)), zeros)
        return images


def _grey(images: Tensor) -> Tensor:
    """Computes the luminance ``(B, 1, H, W)`` by the weights of ITU-R BT.601."""
    return (images * images.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _turned(colours: Tensor, angle: Tensor) -> Tensor:
    """Turns colours ``(B, 3, H, W)`` around the grey axis by Rodrigues' formula, ``angle`` ``(B, 1, 1, 1)``."""
    crossed = (colours.roll(1, 1) - colours.roll(-1, 1)) / math.sqrt(3)
    along = colours.mean(1, keepdim=True)
    return angle.cos() * colours + angle.sin() * crossed + (1 - angle.cos()) * along


def _where(is_on: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    return torch.where(is_on.view(-1, 1, 1, 1), changed, images)
