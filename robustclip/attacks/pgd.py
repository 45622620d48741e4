"""Projected gradient ascent (Madry et al., https://arxiv.org/abs/1706.06083)."""

from typing import Literal

import torch
from torch import Tensor

from robustclip.arguments import CountOrZero
from robustclip.attacks import perturbation_set
from robustclip.attacks.attack import Attack, Cost, Forward, Loss, Member, Target, gradient_of, scaled_count
from robustclip.attacks.pixel_units import Radius, pixels, scaled_radius
from robustclip.attacks.rows import replaced
from robustclip.attacks.sample_losses import LOSSES, LossName, select_loss


class PGD(Attack):
    """Projected gradient ascent on the summed loss, with a random start.

    The defaults are TeCoA's training attack. Each step is ``x <- project(x + alpha * direction(gradient))``. The
    direction is the sign (L-infinity) or the unit gradient (L2), and the projection is onto the perturbation set and
    the valid pixel range.

    Args:
        eps: radius of the perturbation set; L-infinity radii in [0, 1] pixel units, such as ``1/255``.
        alpha: step size, in the same units.
        steps: number of gradient steps.
        norm: ``linf``, ``l2`` or ``l1``.
        random_start: start at a random point of the set (uniform; for L2 a random direction and length).
        keep: ``last`` iterate, as the papers do, or each sample's ``best``, that of the highest loss.
        loss: ``ce``, ``margin`` or ``dlr``; null uses the caller's, which is cross-entropy in evaluation.
        target: name of the class that images of other classes are moved to, or a class per task by the task's name;
            null for any wrong class. The loss to maximise is minus that of the target.

    Raises:
        ValueError: a radius is not in [0, 1], or the number of steps is negative.

    Examples:
        >>> import torch
        >>> from robustclip import PGD
        >>> images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
        >>> attack = PGD("4/255", alpha="1/255", steps=5)
        >>> attacked = attack(images, lambda x: x.mean((2, 3)), labels)  # the mean colour as logits
        >>> bool((attacked - images).abs().max() <= 4 / 255 + 1e-6)
        True
    """

    is_anytime = True
    eps: float

    def __init__(
        self,
        eps: Radius = "1/255",
        alpha: Radius = "1/255",
        steps: CountOrZero = 2,
        norm: perturbation_set.Norm = "linf",
        random_start: bool = True,
        keep: Literal["last", "best"] = "last",
        loss: LossName | None = None,
        target: Target = None,
    ) -> None:
        limit = 1.0 if norm == "linf" else None
        self.eps, self.alpha = pixels(eps, name="eps", limit=limit), pixels(alpha, name="alpha", limit=limit)
        self.steps, self.norm, self.random_start, self.keep, self.loss = steps, norm, random_start, keep, loss
        self._set_target(target)

    def members(self, classes: int) -> list[Member]:
        """Returns the attack itself, with the margin as its loss where DLR has too few classes."""
        loss, note = (None, "") if self.loss is None else select_loss(self.loss, classes)
        return [Member("pgd", self._changed(loss=loss) if note else self, note)]

    def cost(self, classes: int) -> Cost:
        """Passes per image by the settings."""
        return Cost(self.steps, int(self.keep == "best"))

    def scaled(self, *, radius: float = 1.0, steps: float = 1.0) -> "PGD":
        """Returns a copy with radius, step size and number of steps multiplied."""
        eps, alpha = (scaled_radius(length, radius, self.norm) for length in (self.eps, self.alpha))
        return self._changed(eps=eps, alpha=alpha, steps=scaled_count(self.steps, steps))

    def perturb(
        self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, *, index: Tensor | None, seed: int
    ) -> Tensor:
        """Starts, and takes `steps` projected steps."""
        loss = self.directed(loss if self.loss is None else LOSSES[self.loss])
        attacked = (
            perturbation_set.start(images, self.eps, self.norm, index, seed) if self.random_start else images.clone()
        )
        best, best_loss = attacked, images.new_full((len(images),), -torch.inf, dtype=torch.float32)
        project = perturbation_set.projection(images, self.eps, self.norm)
        for _ in range(self.steps):
            attacked.requires_grad_()
            value = loss(forward(attacked), targets)
            gradient = gradient_of(value, attacked)
            attacked = attacked.detach()
            if self.keep == "best":
                best, best_loss = _better(best, best_loss, attacked, value.detach())
            attacked = project(attacked + self.alpha * perturbation_set.direction(gradient, attacked, self.norm))
        if self.keep == "last":
            return attacked
        with torch.no_grad():
            return _better(best, best_loss, attacked, loss(forward(attacked), targets))[0]


def _better(best: Tensor, best_loss: Tensor, images: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Selects the image ``(B, 3, H, W)`` of the higher loss ``(B,)`` per sample."""
    is_better = value > best_loss
    return replaced(best, images, is_better), torch.where(is_better, value, best_loss)
