"""The precision in which a model computes, whatever the type of its answer."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")  # layers that autocast computes in lower precision


class SeenPrecision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the coarsest precision of the matrix products and convolutions that run inside.

    Attributes:
        eps: distance from 1 to the next number in this precision; that of fp32 if there were none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = torch.finfo(torch.float32).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and notes the precision of its result."""
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS and result.dtype.is_floating_point:
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        return result
