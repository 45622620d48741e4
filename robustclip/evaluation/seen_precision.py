"""The precision in which a model computes, whatever the type of its answer."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")  # layers that autocast computes in lower precision


class SeenPrecision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in which precision most numbers of the matrix products and convolutions inside are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers = Counter[torch.dtype]()

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number in this precision; that of fp32 if there was no product."""
        ((dtype, _),) = self._numbers.most_common(1) or [(torch.float32, 0)]
        return torch.finfo(dtype).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and notes the precision of its result."""
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS and result.dtype.is_floating_point:
            self._numbers[result.dtype] += result.numel()
        return result
