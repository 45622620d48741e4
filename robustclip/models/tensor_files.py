"""Files of tensors: read without running code, checked before use, and identified by their content."""

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

DIGEST = "digest"  # key of the content's digest in our files
# Errors of torch, safetensors, zipfile and open_clip for files that are damaged or belong to another model.
LOADING_ERRORS = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, StopIteration),
    *(pickle.UnpicklingError, EOFError, OSError, MemoryError, SafetensorError, struct.error, zlib.error),
    zipfile.BadZipFile,
)


def read_file(path: Path) -> Any:
    """Reads a file of tensors and plain values, without running code that it may contain.

    Checks the checksums that PyTorch stores with each record, which `torch.load` does not do, and the digest that we
    write into the metadata of safetensors.

    Raises:
        ValueError: the file may contain code, or is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (record := archive.testzip()) is not None:
                    raise ValueError(f"the record {record} has another checksum")
        with torch.serialization.safe_globals(_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"calls for {name[1]}" if name else "may contain code or is damaged"
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
        raise ValueError("the digest differs")
    return state


def checked_state(state: Any, where: str) -> dict[str, Tensor]:
    """Checks that a state maps names to dense, real and finite tensors, and returns it as a dict.

    Args:
        state: mapping to check.
        where: file or key, for messages.

    Raises:
        ValueError: the state is anything else; the message has the first wrong name.
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
    """Checks that tensors have the sizes and kinds of those that they replace.

    Args:
        state: tensors by name; ``own`` has each name.
        own: tensors of the model.
        where: file or key, for messages.

    Raises:
        ValueError: a size differs, or integers stand in for real numbers or the reverse.
    """
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} of {where} has size {size(tensor)}, the model takes {size(own[name])}")
        if not is_of_kind(tensor, own[name]):
            raise ValueError(f"{name} of {where} holds {tensor.dtype}, the model takes {own[name].dtype}")


def is_of_kind(tensor: Tensor, own: Tensor) -> bool:
    """Checks that both tensors are real or both integer; a scalar counter may be replaced by a real number.

    Args:
        tensor: new tensor.
        own: tensor that it replaces.
    """
    return tensor.is_floating_point() == own.is_floating_point() or (own.ndim == 0 and not own.is_floating_point())


def is_plain(tensor: Tensor) -> bool:
    """Checks that a tensor is dense, real and in memory."""
    is_odd = tensor.is_quantized or tensor.is_meta or tensor.is_complex() or tensor.is_nested
    return tensor.layout == torch.strided and not is_odd


def is_finite(tensor: Tensor) -> bool:
    """Checks that a tensor has neither infinities nor nan."""
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # torch sums no 8-bit floats
        tensor = tensor.float()
    # A sum is 200 times faster than a test of every number, and finite only if all numbers are.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def digest(content: Any) -> str:
    """Computes the SHA-256 of tensors and plain values, at any depth of mappings and sequences."""
    sha = hashlib.sha256()
    _update(sha, content)
    return sha.hexdigest()


def size(tensor: Tensor) -> str:
    """Formats the shape of a tensor, such as 3x224x224."""
    return "x".join(map(str, tensor.shape)) or "1"


def one_line(error: BaseException) -> str:
    """Shortens an error's message to one line."""
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
    """Lists the NumPy types of floats, since TeCoA's authors store their best accuracy as one."""
    scalar = np.float64(0).__reduce__()[0]
    # Files written by NumPy 1 use the former name of the function.
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
