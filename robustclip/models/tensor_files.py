"""Tensors in files: read without running code, checked before use, and identified by their content."""

import hashlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

DIGEST = "digest"  # key under which our files hold the digest of their content
# Errors of torch, safetensors, zipfile and open_clip for files that are damaged or belong to another model.
LOADING_ERRORS = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, StopIteration),
    *(pickle.UnpicklingError, EOFError, OSError, MemoryError, SafetensorError, struct.error, zlib.error),
    zipfile.BadZipFile,
)


def read_file(path: Path) -> Any:
    """Reads a file of tensors and plain values; code that may be in it does not run.

    The sums that PyTorch stores with each record of a file are checked, which `torch.load` does not do, and the digest
    that we write into the metadata of safetensors.

    Raises:
        ValueError: the file may hold code, or is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (record := archive.testzip()) is not None:
                    raise ValueError(f"its record {record} has another checksum")
        with torch.serialization.safe_globals(_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"calls for {name[1]}" if name else "may hold code or is damaged"
        raise ValueError(
            f"{path} {reason}, so it was not opened; only tensors and plain values are read, best as .safetensors"
        ) from error
    except LOADING_ERRORS as error:
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript program; save its state_dict() in a file") from error
        raise ValueError(f"{path} is cut short or damaged ({one_line(error)}); copy it again") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    state = load_file(path)
    with safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get(DIGEST)
    if written is not None and written != digest(dict(sorted(state.items()))):
        raise ValueError("its digest differs")
    return state


def checked_state(state: Any, where: str) -> dict[str, Tensor]:
    """A mapping from names to dense, real and finite tensors.

    Args:
        state: what should be such a mapping.
        where: file or key, for messages.

    Raises:
        ValueError: it is something else, with the first name that is wrong.
    """
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{where} must map names to tensors, got {_kind(state)}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{where} must map names to tensors, got {_kind(tensor)} for {name!r}")
        if not is_plain(tensor):
            raise ValueError(f"{name} of {where} must be a dense, real tensor, got {_kind(tensor)}; convert it first")
        if not is_finite(tensor):
            raise ValueError(f"{name} of {where} is not finite; the file is damaged or its training diverged")
    return dict(state)


def check_fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Compares sizes and kinds of tensors with those that they are to replace.

    Args:
        state: tensors by name, each of which ``own`` has.
        own: of the model.
        where: file or key, for messages.

    Raises:
        ValueError: another size, or whole numbers in place of real ones or the reverse.
    """
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} of {where} has size {size(tensor)}, the model takes {size(own[name])}")
        if not is_of_kind(tensor, own[name]):
            raise ValueError(f"{name} of {where} holds {tensor.dtype}, the model takes {own[name].dtype}")


def is_of_kind(tensor: Tensor, own: Tensor) -> bool:
    """Whether both hold real or both hold whole numbers; a counter, a scalar, may be given as a real number."""
    return tensor.is_floating_point() == own.is_floating_point() or (own.ndim == 0 and not own.is_floating_point())


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, real and in memory."""
    is_odd = tensor.is_quantized or tensor.is_meta or tensor.is_complex() or tensor.is_nested
    return tensor.layout == torch.strided and not is_odd


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither infinities nor nan."""
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # torch sums no 8-bit floats
        tensor = tensor.float()
    # A sum is 200 times faster than a test of every number, and finite only if all numbers are.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def digest(content: Any) -> str:
    """SHA-256 over tensors and plain values, at any depth of mappings and sequences."""
    sha = hashlib.sha256()
    _update(sha, content)
    return sha.hexdigest()


def size(tensor: Tensor) -> str:
    """Sides with an x between them."""
    return "x".join(map(str, tensor.shape)) or "1"


def one_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300] or type(error).__name__


def _update(sha: Any, content: Any) -> None:
    if isinstance(content, Tensor):
        sha.update(f"{content.dtype}{tuple(content.shape)}".encode())
        if is_plain(content):
            sha.update(content.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(content, Mapping):
        sha.update(f"mapping {len(content)}".encode())
        for key, value in content.items():
            _update(sha, key)
            _update(sha, value)
    elif isinstance(content, Sequence | set | frozenset) and not isinstance(content, str | bytes):
        sha.update(f"sequence {len(content)}".encode())
        for value in content:
            _update(sha, value)
    else:
        sha.update(f"{type(content).__name__} {content!r}".encode())


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"an empty {type(value).__name__}" if value in ({}, [], ()) else type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {str(value.layout).removeprefix('torch.')} on {value.device}"


def _numbers() -> list[Any]:
    """NumPy's floats: the authors of TeCoA store their best accuracy as one."""
    scalar = np.float64(0).__reduce__()[0]
    # Files of NumPy 1 call it by its former name.
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
