"""TF32, in which GPUs multiply fp32 numbers with 10 bits of the fraction: allowed or forbidden for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: tuple[Any, ...] = (
    *(torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),  # type: ignore[attr-defined]
    *(torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv),  # type: ignore[attr-defined]
)


@contextmanager
def tf32(is_allowed: bool) -> Iterator[None]:
    """Allows or forbids TF32 inside the context, on all devices, and restores PyTorch's flags afterwards.

    PyTorch allows it in convolutions by default. The flags also hold for backward passes inside the context.
    """
    saved, legacy = [backend.fp32_precision for backend in _BACKENDS], _legacy_flags()
    _set(is_allowed)
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy[0])
            torch.backends.cudnn.allow_tf32 = legacy[1]
        for backend, precision in zip(_BACKENDS, saved, strict=True):
            backend.fp32_precision = precision


def _set(is_allowed: bool) -> None:
    """Sets both of PyTorch's interfaces, since it refuses to read one that contradicts the other."""
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    torch.backends.cudnn.allow_tf32 = is_allowed
    for backend in _BACKENDS:
        is_of_cpu = backend in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]
        backend.fp32_precision = "tf32" if is_allowed and not is_of_cpu else "ieee"


def _legacy_flags() -> tuple[str, bool] | None:
    """Reads the flags of PyTorch's older interface; None where the newer one contradicts it."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None
