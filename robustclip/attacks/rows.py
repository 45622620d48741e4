"""Selects and replaces samples of a batch, without copies and gradients of the other samples."""

from typing import Any

import torch
from torch import Tensor


def selected(images: Tensor, rows: Tensor, size: int | None = None) -> Tensor:
    """Copies some samples of a batch; gradients flow back to them, and are zero for the others.

    The backward pass of indexing adds up gradients, since an index may occur twice, and is slow on every device.

    Args:
        images: ``(B, 3, H, W)``.
        rows: positions ``(N,)`` of the samples, all different.
        size: number of samples of the result, which repeats the first one, without gradient; None for N.
    """
    missing = 0 if size is None else size - len(rows)
    padded = torch.cat([rows, rows[:1].expand(missing)]) if missing else rows
    copy: Tensor = _Selected.apply(images, padded, len(rows))
    return copy


def replaced(images: Tensor, others: Tensor, where: Tensor) -> Tensor:
    """Replaces some images of a batch by others; CPUs copy these alone, other devices are not waited for.

    Args:
        images, others: ``(B, 3, H, W)``; either may be returned itself.
        where: ``(B,)``, samples to replace.
    """
    if images.device.type != "cpu" or images.dtype != others.dtype:
        return torch.where(where.view(-1, 1, 1, 1), others, images)
    rows = where.nonzero()[:, 0]
    if len(rows) in (0, len(where)):
        return others if len(rows) else images
    return images.index_copy(0, rows, others[rows])


class _Selected(torch.autograd.Function):
    """Rows of a batch, of which only the first ones, all different, have a gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, rows: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.count = images.shape, count
        return images.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (rows,), gradient = ctx.saved_tensors, gradients[0][: ctx.count]
        if ctx.count < ctx.shape[0]:
            gradient = gradient.new_zeros(ctx.shape).index_copy(0, rows[: ctx.count], gradient)
        return gradient, None, None
