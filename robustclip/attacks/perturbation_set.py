"""Perturbation sets: norm balls around images ``(B, 3, H, W)``, intersected with the valid pixel range [0, 1]."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from robustclip.attacks import l1_ball, noise

Norm = Literal["linf", "l2", "l1"]

ORDERS: dict[str, float] = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
SPARSITY = 0.01  # share of the pixel values that a step in L1 changes, as in SLIDE
SMALLEST_NORM = 1e-10  # keeps the step of a zero gradient zero
GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: spreads small numbers over all 32-bit seeds (Knuth)


def norm(vectors: Tensor) -> Tensor:
    """Computes L2 norms ``(B, 1, 1, 1)``, never 0."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=(1, 2, 3), keepdim=True).clamp(min=SMALLEST_NORM)
    return length


def unit(vectors: Tensor) -> Tensor:
    """Scales vectors to L2 norm 1; zero vectors remain zero."""
    return vectors / norm(vectors)


def direction(gradient: Tensor, position: Tensor, ball: str) -> Tensor:
    """Computes the direction of a step: the sign for ``linf``, the unit gradient for ``l2``.

    For ``l1`` it is the sign of the largest entries that the valid pixel range lets move, of L1 norm 1; steepest ascent
    would change a single value (Tramer & Boneh, https://arxiv.org/abs/1904.13000).

    Args:
        gradient: ``(B, 3, H, W)``.
        position: ``(B, 3, H, W)``, the images at which the step begins.
        ball: ``linf``, ``l2`` or ``l1``.
    """
    if ball == "l1":
        share = torch.full((len(gradient),), SPARSITY, device=gradient.device)
        return l1_ball.sparse_direction(l1_ball.movable(gradient, position), share)
    return gradient.sign() if ball == "linf" else unit(gradient)


def project(attacked: Tensor, images: Tensor, eps: float, ball: str) -> Tensor:
    """Projects onto perturbation set and valid pixel range: exactly for ``linf`` and ``l1``, up to rounding for ``l2``.

    Args:
        attacked: ``(B, 3, H, W)``; for ``l2``, the difference from the images is scaled and the result clipped.
        images: centres of the balls, in [0, 1].
        eps: radius.
        ball: ``linf``, ``l2`` or ``l1``.
    """
    return projection(images, eps, ball)(attacked)


def projection(images: Tensor, eps: float, ball: str) -> Callable[[Tensor], Tensor]:
    """Makes the function `project` onto one perturbation set; what does not depend on the point is computed once.

    Args:
        images: centres of the balls, in [0, 1].
        eps: radius.
        ball: ``linf``, ``l2`` or ``l1``.
    """
    if ball == "linf":
        low, high = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
        return lambda attacked: attacked.clamp(low, high)
    return partial(l1_ball.project if ball == "l1" else _project_l2, images, eps)


def _project_l2(images: Tensor, eps: float, attacked: Tensor) -> Tensor:
    delta = attacked - images
    delta = delta * (eps / norm(delta)).clamp(max=1)
    return (images + delta).clamp(0, 1)


def start(images: Tensor, eps: float, ball: str, index: Tensor | None, seed: int) -> Tensor:
    """Draws random points of the perturbation set: uniform for ``linf``, a random direction and length for others.

    Args:
        images: centres of the balls, in [0, 1].
        eps: radius.
        ball: ``linf``, ``l2`` or ``l1``.
        index: ``(B,)`` sample ids that determine the draw; None draws from torch's generator.
        seed: selects another draw for the same ids.
    """
    if ball == "linf":
        return project(images + eps * (2 * uniform(images, images.shape[1:], index, seed) - 1), images, eps, ball)
    if ball == "l1":
        towards = l1_ball.laplace(uniform(images, images.shape[1:], index, seed))
        towards = towards / towards.abs().sum((1, 2, 3), keepdim=True)
    else:
        towards = unit(normal(images, index, seed))
    length = uniform(images, (1,), index, ~seed)  # the inverted seed makes the length independent of the direction
    return project(images + eps * length.view(-1, 1, 1, 1) * towards, images, eps, ball)


def surface_start(images: Tensor, eps: float, ball: str, index: Tensor | None, seed: int) -> Tensor:
    """Draws random points of the ball's surface, clipped to [0, 1], as Auto-PGD starts; for ``l1`` sparse ones.

    Args:
        images: centres of the balls, in [0, 1].
        eps: radius.
        ball: ``linf``, ``l2`` or ``l1``.
        index: ``(B,)`` sample ids that determine the draw; None draws from torch's generator.
        seed: selects another draw for the same ids.
    """
    if ball == "l1":
        return project(images + normal(images, index, seed), images, eps, ball)
    if ball == "linf":
        cube = 2 * uniform(images, images.shape[1:], index, seed) - 1
        towards = cube / cube.abs().amax((1, 2, 3), keepdim=True).clamp(min=SMALLEST_NORM)
    else:
        towards = unit(normal(images, index, seed))
    return project(images + eps * towards, images, eps, ball)


def uniform(images: Tensor, shape: torch.Size | tuple[int, ...], index: Tensor | None, seed: int) -> Tensor:
    """Draws ``(B, *shape)`` from [0, 1), by sample id or from torch's generator.

    Args:
        images: ``(B, 3, H, W)``; the device, and without ids the type, are theirs.
        shape: shape of one sample's draw.
        index: ``(B,)`` sample ids, or None.
        seed: selects another draw for the same ids.
    """
    if index is None:
        is_image = tuple(shape) == images.shape[1:]
        return torch.rand_like(images) if is_image else torch.rand((len(images), *shape), device=images.device)
    return noise.uniform(index, shape, seed=seed)


def normal(images: Tensor, index: Tensor | None, seed: int) -> Tensor:
    """Draws standard normal numbers of the images' shape, by sample id or from torch's generator.

    Args:
        images: ``(B, 3, H, W)``.
        index: ``(B,)`` sample ids, or None.
        seed: selects another draw for the same ids.
    """
    return torch.randn_like(images) if index is None else noise.normal(index, images.shape[1:], seed=seed)


def stream(seed: int, number: int) -> int:
    """Computes the seed of a numbered run or block of an attack; number 0 has the given seed.

    Args:
        seed: seed of the attack.
        number: number of the run or block, from 0.
    """
    return seed + GOLDEN * number


def distance(images: Tensor, others: Tensor, ball: str) -> Tensor:
    """Computes distances ``(B,)`` in the norm of the ball.

    Args:
        images, others: ``(B, 3, H, W)``.
        ball: ``linf``, ``l2`` or ``l1``.
    """
    difference = (images - others).flatten(1)
    if ball == "linf":
        return difference.abs().amax(1)  # seven times faster on CPUs than the norm, with the same bits
    length: Tensor = torch.linalg.vector_norm(difference, ord=ORDERS[ball], dim=1)
    return length
