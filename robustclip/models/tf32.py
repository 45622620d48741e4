"""Context in which TF32, the GPUs' multiplication of fp32 numbers with 10 bits of the fraction, is allowed or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch

OF_GPU, OF_CPU = ("cuda.matmul", "cudnn.conv", "cudnn.rnn"), ("mkldnn.matmul", "mkldnn.conv")


def _with_precision(name: str) -> bool:
    """Checks whether a backend has the attribute ``fp32_precision``, which PyTorch 2.6 lacks."""
    try:
        return hasattr(attrgetter(name)(torch.backends), "fp32_precision")
    except AttributeError:
        return False


_BACKENDS = {name: attrgetter(name)(torch.backends) for name in (*OF_GPU, *OF_CPU) if _with_precision(name)}


@contextmanager
def tf32(is_allowed: bool) -> Iterator[None]:
    """Allows or forbids TF32 inside the context, on all devices, and restores PyTorch's flags afterwards.

    PyTorch allows it in convolutions by default. The flags also hold for backward passes inside the context.
    """
    saved = {name: backend.fp32_precision for name, backend in _BACKENDS.items()}
    legacy = _legacy_flags()
    _set(is_allowed)
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy[0])
            torch.backends.cudnn.allow_tf32 = legacy[1]
        for name, precision in saved.items():
            _BACKENDS[name].fp32_precision = precision


def _set(is_allowed: bool) -> None:
    """Sets both of PyTorch's interfaces, since it refuses to read one that contradicts the other."""
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    torch.backends.cudnn.allow_tf32 = is_allowed
    for name, backend in _BACKENDS.items():
        backend.fp32_precision = "tf32" if is_allowed and name in OF_GPU else "ieee"


def _legacy_flags() -> tuple[str, bool] | None:
    """Reads the flags of PyTorch's older interface; None where the newer one contradicts it."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None
