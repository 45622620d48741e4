"""Lengths in [0, 1] pixel units, and the range of the pixels that attacks take."""

from fractions import Fraction

import torch
from torch import Tensor

from robustclip.arguments import fitted

Radius = float | str
"""Type of a length in [0, 1] pixel units: ``0.0157`` or ``"4/255"``."""

LARGEST_RADIUS = 1e9  # larger than any image in any norm, and a number that float32 can multiply
BOX_TOLERANCE = 1e-6  # rounding of decoders and resizers; values further out mean that images are normalised


def pixels(value: Radius, *, name: str, limit: float | None = 1.0) -> float:
    """Converts ``0.0157``, ``"4/255"`` or ``"0.5/255"`` to a float.

    Args:
        value: length in [0, 1] pixel units.
        name: name of the argument, for the error message.
        limit: largest sensible value; None for norms that grow with the number of pixels, which end at 1e9.

    Raises:
        ValueError: the value is no number, negative, or above the limit, as grey levels would be.
    """
    try:
        value = fitted(value, Radius)
        parts = [Fraction(part.strip()) for part in value.split("/")] if isinstance(value, str) else [Fraction(value)]
        number = float(parts[0] / parts[1]) if len(parts) == 2 else float(parts[0])
        if len(parts) > 2:
            raise ValueError
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{name} must be a number or a fraction such as '4/255', got {value!r}") from None
    if limit is None and number < 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    if limit is None and number > LARGEST_RADIUS:
        raise ValueError(f"{name} must be at most {LARGEST_RADIUS:g}, got {value!r}; no image is that far from another")
    if limit is not None and not 0 <= number <= limit:
        grey = f"; write '{number:g}/255' for grey levels" if number > 0 and "/" not in str(value) else ""
        raise ValueError(f"{name} is measured in [0, 1] pixel units, got {value!r}{grey}")
    return number


def check_range(images: Tensor) -> None:
    """Refuses images outside [0, 1], without waiting for an accelerator, and images in half precision.

    Raises:
        ValueError: another type, or values outside on the CPU; for those on other devices an assertion fails.
    """
    if images.dtype not in (torch.float32, torch.float64):
        kind = str(images.dtype).removeprefix("torch.")
        reason = "a radius does not hold in less" if images.is_floating_point() else "pixels are in [0, 1]"
        raise ValueError(f"attacks work on images of float32 or float64, since {reason}, got {kind}; convert them")
    if images.numel() == 0:
        return
    low, high = torch.aminmax(images)
    if images.device.type != "cpu":
        torch._assert_async((low >= -BOX_TOLERANCE) & (high <= 1 + BOX_TOLERANCE), "attacks work on images in [0, 1]")
    elif not (float(low) >= -BOX_TOLERANCE and float(high) <= 1 + BOX_TOLERANCE):
        span = f"[{float(low):.4g}, {float(high):.4g}]"
        raise ValueError(f"attacks work on images in [0, 1], got {span}; normalisation belongs in the model")


def scaled_radius(eps: float, factor: float, norm: str) -> float:
    """Multiplies a radius; L-infinity radii are at most 1.

    Args:
        eps: radius.
        factor: factor of the radius.
        norm: ``linf``, ``l2`` or ``l1``.
    """
    return min(eps * factor, 1.0) if norm == "linf" else eps * factor
