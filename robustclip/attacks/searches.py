"""The states of Auto-PGD's searches: positions and step sizes per sample, for dense and for sparse steps."""

import torch
from torch import Tensor

from robustclip.attacks import l1_ball, perturbation_set
from robustclip.attacks.rows import replaced

MOMENTUM = 0.75  # the share of the new step, alpha of https://arxiv.org/abs/2003.01690
WINDOWS = (22, 3, 6)  # first window, by how much windows shrink, smallest one; percent of the steps, section 3.3 there
# Of https://arxiv.org/abs/2103.01208, section 4: changed pixels per pixel of a step, the fall of their number that
# counts as progress, the divisor of the step size without progress, its smallest share of the radius, and the time
# between two checks in percent of the steps.
SPARSER_BY, PROGRESS, SHRINKS_BY, SMALLEST_STEP, SPARSE_WINDOW = 1.5, 0.95, 1.5, 0.1, 4


class Search:
    """State of one run: positions ``(B, 3, H, W)``, of which the best is kept, and a step size per sample.

    Args:
        images: ``(B, 3, H, W)``, centres of the balls.
        start: ``(B, 3, H, W)``, first positions.
        value: ``(B,)``, loss of the first positions.
        gradient: ``(B, 3, H, W)``, its gradient.
        eps: radius.
        norm: ``linf``, ``l2`` or ``l1``.
        steps: number of steps of the run.
    """

    def __init__(
        self, images: Tensor, start: Tensor, value: Tensor, gradient: Tensor, *, eps: float, norm: str, steps: int
    ) -> None:
        self.images, self.eps, self.norm, self.steps = images, eps, norm, steps
        self.project = perturbation_set.projection(images, eps, norm)
        self.position, self.gradient, self.value = start, gradient, value
        self.best, self.best_gradient, self.best_value = start, gradient, value
        self.prepare()

    def prepare(self) -> None:
        """Sets the step sizes and the state that a kind of search has beside the positions."""

    def record(self, value: Tensor, gradient: Tensor) -> None:
        """Records the loss and gradient of the present position.

        Args:
            value: loss ``(B,)``.
            gradient: ``(B, 3, H, W)``.
        """
        self.value, self.gradient = value, gradient
        is_better = value > self.best_value
        self.best_value = torch.where(is_better, value, self.best_value)
        self.best = replaced(self.best, self.position, is_better)
        self.best_gradient = replaced(self.best_gradient, gradient, is_better)

    def restart(self, where: Tensor) -> None:
        """Returns some samples ``(B,)`` to their best images."""
        self.position = replaced(self.position, self.best, where)
        self.gradient = replaced(self.gradient, self.best_gradient, where)


class DenseSearch(Search):
    """Search in L-infinity and L2: steps along the gradient with momentum, whose size is halved without progress."""

    def prepare(self) -> None:
        """Starts at twice the radius, without momentum."""
        self.before, self.momentum = self.position, 1.0
        self.step_size = torch.full_like(self.value, 2 * self.eps).view(-1, 1, 1, 1)
        self.rises, self.last_check = torch.zeros_like(self.value), 0
        self.was_halved, self.best_at_check = torch.ones_like(self.value, dtype=torch.bool), self.value
        self.value = torch.zeros_like(self.value)  # with which the first step is compared, as in the authors' code
        self.checkpoints = set(checkpoints(self.steps))

    def next_position(self) -> Tensor:
        """Moves along the gradient and adds the momentum of the last move."""
        stepped = self.position + self.step_size * perturbation_set.direction(self.gradient, self.position, self.norm)
        moved, inertia = self.project(stepped) - self.position, self.position - self.before
        mixed = self.position + self.momentum * moved + (1 - self.momentum) * inertia
        self.before, self.momentum = self.position, MOMENTUM
        self.position = self.project(mixed)
        return self.position

    def record(self, value: Tensor, gradient: Tensor) -> None:
        """Records the loss and gradient of the present position, and whether the loss rose.

        Args:
            value: loss ``(B,)``.
            gradient: ``(B, 3, H, W)``.
        """
        self.rises = self.rises + (value > self.value)
        super().record(value, gradient)

    def check(self, step: int, rho: float) -> None:
        """Halves at a checkpoint the step size of samples without progress, and returns these to their best images.

        Args:
            step: number of steps taken.
            rho: share of rising steps up to which the step size is halved.
        """
        if step not in self.checkpoints:
            return
        stands_still = ~self.was_halved & (self.best_value <= self.best_at_check)
        is_halved = (self.rises <= rho * (step - self.last_check)) | stands_still
        self.was_halved, self.best_at_check, self.last_check = is_halved, self.best_value, step
        self.rises = torch.zeros_like(self.rises)
        self.step_size = torch.where(is_halved.view(-1, 1, 1, 1), self.step_size / 2, self.step_size)
        self.restart(is_halved)


class SparseSearch(Search):
    """Search in L1: steps that change few pixels, ever fewer as the best image changes fewer."""

    def prepare(self) -> None:
        """Starts at the radius, with two thirds of the pixels that the start changes."""
        self.step_size = torch.full_like(self.value, self.eps).view(-1, 1, 1, 1)
        self.changed = self._changed_pixels()
        self.window = max(SPARSE_WINDOW * self.steps // 100, 1)

    def next_position(self) -> Tensor:
        """Moves along the signs of the largest entries of the gradient."""
        share = self.changed / SPARSER_BY / self.images[0].numel()
        gradient = l1_ball.movable(self.gradient, self.position)
        step = self.step_size * l1_ball.sparse_direction(gradient, share)
        self.position = self.project(self.position + step)
        return self.position

    def check(self, step: int, rho: float) -> None:
        """Renews the step size of samples whose best image became sparser; the others take smaller steps.

        Args:
            step: number of steps taken.
            rho: not used.
        """
        if step % self.window:
            return
        changed = self._changed_pixels()
        is_sparser = changed < PROGRESS * self.changed
        shrunk = (self.step_size / SHRINKS_BY).clamp(min=SMALLEST_STEP * self.eps)
        self.step_size = torch.where(is_sparser.view(-1, 1, 1, 1), self.eps, shrunk)
        self.changed = changed
        self.restart(is_sparser)

    def _changed_pixels(self) -> Tensor:
        return (self.best != self.images).flatten(1).sum(1).float()


def checkpoints(steps: int) -> list[int]:
    """Lists the steps after which step sizes are adapted: at 22%, then after windows 3% shorter each, 6% at least.

    Each length is rounded down to steps, at least one, as in the authors' code.
    """
    window, shorter, smallest = (max(percent * steps // 100, 1) for percent in WINDOWS)
    listed = [window]
    while listed[-1] < steps:
        window = max(window - shorter, smallest)
        listed.append(listed[-1] + window)
    return [step for step in listed if step <= steps]
