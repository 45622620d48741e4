"""Projected gradient ascent (Madry et al., https://arxiv.org/abs/1706.06083)."""

from typing import Literal

import torch
from torch import Tensor

from robustclip.attacks import noise
from robustclip.attacks.base import Attack, Forward, Loss, Radius, pixels

SMALLEST_NORM = 1e-10  # keeps a zero gradient a zero step


class PGD(Attack):
    """Projected gradient ascent on the summed loss, with a random start.

    The defaults are TeCoA's training attack. Per step: ``x <- project(x + alpha * direction(gradient))`` where the
    direction is the sign (L-infinity) or the unit gradient (L2), and the projection is onto ball and box.

    Args:
        eps: radius of the ball; L-infinity radii in [0, 1] pixel units, such as ``1/255``.
        alpha: step size, in the same units.
        steps: number of gradient steps.
        norm: ``linf`` or ``l2``.
        random_start: start at a random point of the ball (uniform; for L2 a random direction and length).
        keep: ``last`` iterate, as the papers do, or each sample's ``best``, that of the highest loss.

    Raises:
        ValueError: a radius that is no length in [0, 1], or a negative number of steps.
    """

    def __init__(
        self,
        eps: Radius = "1/255",
        alpha: Radius = "1/255",
        steps: int = 2,
        norm: Literal["linf", "l2"] = "linf",
        random_start: bool = True,
        keep: Literal["last", "best"] = "last",
    ) -> None:
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        limit = 1.0 if norm == "linf" else None
        self.eps, self.alpha = pixels(eps, name="eps", limit=limit), pixels(alpha, name="alpha", limit=limit)
        self.steps, self.norm, self.random_start, self.keep = steps, norm, random_start, keep

    def perturb(
        self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, *, index: Tensor | None, seed: int
    ) -> Tensor:
        """Start, then `steps` projected steps."""
        attacked = self._start(images, index, seed) if self.random_start else images.clone()
        best, best_loss = attacked, images.new_full((len(images),), -torch.inf, dtype=torch.float32)
        for _ in range(self.steps):
            attacked.requires_grad_()
            value = loss(forward(attacked), targets)
            (gradient,) = torch.autograd.grad(value.sum(), attacked)
            attacked = attacked.detach()
            if self.keep == "best":
                best, best_loss = _better(best, best_loss, attacked, value.detach())
            attacked = self._project(attacked + self.alpha * self._direction(gradient), images)
        if self.keep == "last":
            return attacked
        with torch.no_grad():
            return _better(best, best_loss, attacked, loss(forward(attacked), targets))[0]

    def _start(self, images: Tensor, index: Tensor | None, seed: int) -> Tensor:
        if self.norm == "linf":
            draw = torch.rand_like(images) if index is None else noise.uniform(index, images.shape[1:], seed=seed)
            return self._project(images + self.eps * (2 * draw - 1), images)
        if index is None:
            direction, length = torch.randn_like(images), torch.rand(len(images), device=images.device)
        else:
            direction = noise.normal(index, images.shape[1:], seed=seed)
            length = noise.uniform(index, (1,), seed=~seed)[:, 0]
        return self._project(images + self.eps * length.view(-1, 1, 1, 1) * _unit(direction), images)

    def _direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign() if self.norm == "linf" else _unit(gradient)

    def _project(self, attacked: Tensor, images: Tensor) -> Tensor:
        if self.norm == "linf":
            return attacked.clamp((images - self.eps).clamp(min=0), (images + self.eps).clamp(max=1))
        delta = attacked - images
        delta = delta * (self.eps / _norm(delta)).clamp(max=1)
        return (images + delta).clamp(0, 1)


def _norm(vectors: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=(1, 2, 3), keepdim=True).clamp(min=SMALLEST_NORM)
    return norm


def _unit(vectors: Tensor) -> Tensor:
    return vectors / _norm(vectors)


def _better(best: Tensor, best_loss: Tensor, images: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Per sample, whichever has the higher loss: images ``(B, 3, H, W)`` and loss ``(B,)``."""
    is_better = value > best_loss
    return torch.where(is_better.view(-1, 1, 1, 1), images, best), torch.where(is_better, value, best_loss)
