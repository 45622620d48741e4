"""Random numbers that depend on ``(seed, sample id)`` alone: counter-based, equal on every device."""

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def _mix(words: Tensor) -> Tensor:
    """Applies MurmurHash3's 32-bit finaliser to 32-bit words in int64 tensors (A. Appleby, public domain)."""
    words = words ^ (words >> 16)
    words = (words * 0x85EBCA6B) & WORD
    words = words ^ (words >> 13)
    words = (words * 0xC2B2AE35) & WORD
    return words ^ (words >> 16)


def uniform(index: Tensor, shape: torch.Size | tuple[int, ...], *, seed: int) -> Tensor:
    """Draws from [0, 1) on a grid of 2**-24.

    Args:
        index: ``(B,)`` int64 sample ids.
        shape: shape of one sample.
        seed: another seed gives an independent draw.

    Returns:
        ``(B, *shape)`` float32 on the device of ``index``.
    """
    counter = torch.arange(math.prod(shape), device=index.device)
    # Filled on the device: copying a number from the host would wait for all pending work of the device.
    start = _mix(torch.full((), seed & WORD, device=index.device))
    key = _mix(_mix(start ^ (index & WORD)) ^ (index >> 32))
    words = _mix(_mix(counter)[None, :] ^ key[:, None])
    return ((words >> 8).float() / 2**24).view(len(index), *shape)


def normal(index: Tensor, shape: torch.Size | tuple[int, ...], *, seed: int) -> Tensor:
    """Draws standard normal numbers by the Box-Muller transform.

    Args:
        index: ``(B,)`` int64 sample ids.
        shape: shape of one sample.
        seed: another seed gives an independent draw.

    Returns:
        ``(B, *shape)`` float32 on the device of ``index``.
    """
    pair = uniform(index, (2, *shape), seed=seed)
    return (-2 * (1 - pair[:, 0]).log()).sqrt() * (2 * math.pi * pair[:, 1]).cos()
