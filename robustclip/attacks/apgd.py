"""Auto-PGD (Croce & Hein, https://arxiv.org/abs/2003.01690): PGD with an adaptive step size."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from robustclip.arguments import Count, CountOrZero, Share
from robustclip.attacks import perturbation_set
from robustclip.attacks.attack import (
    Attack,
    Cost,
    Forward,
    Loss,
    Member,
    Radius,
    Target,
    Worst,
    check_own_loss,
    gradient_of,
    pixels,
    restrict_to_correct,
    scaled_count,
    scaled_radius,
)
from robustclip.attacks.rows import replaced
from robustclip.attacks.sample_losses import (
    LOSSES,
    LossName,
    margin,
    select_loss,
    targeted_dlr,
    targeted_margin,
    without_label,
)

MOMENTUM = 0.75  # the paper's alpha: the share of the new step
FIRST_WINDOW, WINDOW_SHRINKS_BY, SMALLEST_WINDOW = 22, 3, 6  # in percent of the steps; the paper's section 3.3

Objective = Callable[[Tensor], Tensor]
"""Maps outputs ``(B, C)`` to the loss ``(B,)`` that one run maximises."""


class APGD(Attack):
    """Auto-PGD, untargeted or targeted (APGD-T); all decisions are made per sample.

    Steps start at size 2 eps and have momentum. At checkpoints, which become more frequent, the step size of a sample
    is halved in two cases: its loss rose in at most ``rho`` of the steps since the last checkpoint, or its best loss
    did not rise while the step size was unchanged. The sample then restarts from its best image. The attack returns a
    misclassified image if there was any, and among these, or else among all, the one of the highest loss (targeted: of
    the highest margin).

    Departures from the authors' code: the first checkpoint compares the first step with the start instead of with 0;
    random starts are drawn by sample id.

    Args:
        eps: radius of the perturbation set; L-infinity radii in [0, 1] pixel units, such as ``4/255``.
        steps: steps of each run; a run computes one more gradient, that of its start.
        norm: ``linf`` or ``l2``.
        loss: ``ce``, ``margin`` or ``dlr``; for targeted runs ``margin`` or ``dlr``.
        targets: number of targeted runs, towards the highest wrong classes of the clean image; 0 is untargeted.
        restarts: random starts of each run; misclassified samples keep their image and are not attacked further.
        rho: share of rising steps up to which the step size is halved.
        target: name of the class that images of other classes are moved to, or a class per task by the task's name;
            null for any wrong class. The loss to maximise is minus that of the target.

    Raises:
        ValueError: a radius is not in [0, 1], a count is too small, a targeted run has cross-entropy, or both
            ``targets`` and ``target`` are set.
    """

    is_anytime = True
    eps: float

    def __init__(
        self,
        eps: Radius = "4/255",
        steps: Count = 100,
        norm: perturbation_set.Norm = "linf",
        loss: LossName = "ce",
        targets: CountOrZero = 0,
        restarts: Count = 1,
        rho: Share = 0.75,
        target: Target = None,
    ) -> None:
        if targets and target is not None:
            raise ValueError(f"targets must be 0 where target is set, got {targets}; it runs towards several classes")
        if targets and loss == "ce":
            raise ValueError("loss must be 'dlr' or 'margin' where targets > 0, got 'ce'")
        self.eps, self.norm = pixels(eps, name="eps", limit=1.0 if norm == "linf" else None), norm
        self.steps, self.loss, self.targets, self.restarts, self.rho = steps, loss, targets, restarts, rho
        self._set_target(target)

    def members(self, classes: int) -> list[Member]:
        """Returns the attack itself, with the margin as its loss where DLR has too few classes."""
        loss, note = select_loss(self.loss, classes, is_targeted=self.targets > 0)
        return [Member("apgd", self._changed(loss=loss) if note else self, note)]

    def cost(self, classes: int) -> Cost:
        """Passes per image by the settings."""
        runs = self.restarts * max(1, min(self.targets, classes - 1))
        return Cost(runs * (self.steps + 1), int(self.targets > 0))

    def scaled(self, *, radius: float = 1.0, steps: float = 1.0) -> "APGD":
        """Returns a copy with radius and number of steps multiplied; the step size follows the radius."""
        return self._changed(eps=scaled_radius(self.eps, radius, self.norm), steps=scaled_count(self.steps, steps))

    def perturb(
        self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, *, index: Tensor | None, seed: int
    ) -> Tensor:
        """Runs every restart and target; a sample keeps the first misclassified image."""
        check_own_loss(self, loss)
        worst, run = Worst.clean(images), 0
        objectives = self._objectives(images, forward, targets)
        for _ in range(self.restarts):
            for objective in objectives:
                start = perturbation_set.surface_start(
                    images, self.eps, self.norm, index, perturbation_set.stream(seed, run)
                )
                model = restrict_to_correct(forward, worst.is_misclassified)
                result = self._run(images, start, model, targets, objective)
                worst, run = worst.or_worse(result, where=~worst.is_misclassified), run + 1
                if bool(worst.is_misclassified.all()):
                    return worst.images
        return worst.images

    def _objectives(self, images: Tensor, forward: Forward, labels: Tensor) -> list[Objective]:
        if not self.targets:
            return [partial(_untargeted, self.directed(LOSSES[self.loss]), labels)]
        with torch.no_grad():
            outputs = forward(images).float()
        number = min(self.targets, outputs.shape[1] - 1)
        towards = without_label(outputs, labels).topk(number).indices
        measure = targeted_dlr if self.loss == "dlr" else targeted_margin
        return [partial(_targeted, measure, labels, column) for column in towards.unbind(1)]

    def _run(self, images: Tensor, start: Tensor, forward: Forward, labels: Tensor, objective: Objective) -> Worst:
        def evaluate(attacked: Tensor) -> tuple[Tensor, Tensor, Worst]:
            attacked = attacked.detach().requires_grad_()
            outputs = forward(attacked)
            value = objective(outputs)
            gradient, outputs, attacked = gradient_of(value, attacked), outputs.detach(), attacked.detach()
            rank = margin(outputs, labels) if self.targets else value.detach()
            return value.detach(), gradient, Worst(attacked, rank, self.is_success(outputs, labels))

        value, gradient, worst = evaluate(start)
        search = _Search(images, start, value, gradient, eps=self.eps, norm=self.norm)
        last_checkpoint, checks = 0, set(checkpoints(self.steps))
        for step in range(1, self.steps + 1):
            value, gradient, result = evaluate(search.next_position(1.0 if step == 1 else MOMENTUM))
            worst = worst.or_worse(result)
            search.record(value, gradient)
            if step in checks:
                search.check(self.rho * (step - last_checkpoint))
                last_checkpoint = step
        return worst


class _Search:
    """State of one run: positions ``(B, 3, H, W)`` and a step size ``(B, 1, 1, 1)`` per sample."""

    def __init__(
        self, images: Tensor, start: Tensor, value: Tensor, gradient: Tensor, *, eps: float, norm: str
    ) -> None:
        self.project, self.norm = perturbation_set.projection(images, eps, norm), norm
        self.position, self.before, self.gradient, self.value = start, start, gradient, value
        self.best, self.best_gradient, self.best_value = start, gradient, value
        self.step_size = torch.full_like(value, 2 * eps).view(-1, 1, 1, 1)
        self.rises = torch.zeros_like(value)
        self.was_halved, self.best_at_check = torch.ones_like(value, dtype=torch.bool), value

    def next_position(self, momentum: float) -> Tensor:
        """Moves along the gradient and adds the momentum of the last move."""
        stepped = self.position + self.step_size * perturbation_set.direction(self.gradient, self.norm)
        stepped = self.project(stepped)
        mixed = self.position + momentum * (stepped - self.position) + (1 - momentum) * (self.position - self.before)
        self.before = self.position
        self.position = self.project(mixed)
        return self.position

    def record(self, value: Tensor, gradient: Tensor) -> None:
        """Records the loss and gradient of the present position."""
        self.rises = self.rises + (value > self.value)
        self.value, self.gradient = value, gradient
        is_better = value > self.best_value
        self.best_value = torch.where(is_better, value, self.best_value)
        self.best = replaced(self.best, self.position, is_better)
        self.best_gradient = replaced(self.best_gradient, gradient, is_better)

    def check(self, enough_rises: float) -> None:
        """Halves the step size of samples without progress and returns these to their best images."""
        stands_still = ~self.was_halved & (self.best_value <= self.best_at_check)
        is_halved = (self.rises <= enough_rises) | stands_still
        self.was_halved, self.best_at_check = is_halved, self.best_value
        self.rises = torch.zeros_like(self.rises)
        self.step_size = torch.where(is_halved.view(-1, 1, 1, 1), self.step_size / 2, self.step_size)
        self.position = replaced(self.position, self.best, is_halved)
        self.gradient = replaced(self.gradient, self.best_gradient, is_halved)


def checkpoints(steps: int) -> list[int]:
    """Lists the steps after which step sizes are adapted: at 22%, then after windows 3% shorter each, 6% at least."""
    percents, window = [FIRST_WINDOW], FIRST_WINDOW
    while percents[-1] < 100:
        window = max(window - WINDOW_SHRINKS_BY, SMALLEST_WINDOW)
        percents.append(percents[-1] + window)
    rounded_up = [-(-percent * steps // 100) for percent in percents]
    return sorted({step for step in rounded_up if step <= steps})


def _untargeted(loss: Loss, labels: Tensor, outputs: Tensor) -> Tensor:
    return loss(outputs, labels)


def _targeted(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor, targets: Tensor, outputs: Tensor
) -> Tensor:
    return loss(outputs, labels, targets)
