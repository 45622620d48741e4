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
    Target,
    Worst,
    check_own_loss,
    gradient_of,
    restrict_to_correct,
    scaled_count,
)
from robustclip.attacks.pixel_units import Radius, pixels, scaled_radius
from robustclip.attacks.sample_losses import (
    LOSSES,
    LossName,
    margin,
    select_loss,
    targeted_dlr,
    targeted_margin,
    without_label,
)
from robustclip.attacks.searches import DenseSearch, SparseSearch

LARGER_RADII = ((3, 30), (2, 30))  # factors of the radius, and percent of the steps (section 5 of 2103.01208)

Objective = Callable[[Tensor], Tensor]
"""Maps outputs ``(B, C)`` to the loss ``(B,)`` that one run maximises."""


class APGD(Attack):
    """Auto-PGD, untargeted or targeted (APGD-T); all decisions are made per sample.

    Steps start at size 2 eps and have momentum. At checkpoints, which become more frequent, the step size of a sample
    is halved in two cases: its loss rose in at most ``rho`` of the steps since the last checkpoint, or its best loss
    did not rise while the step size was unchanged. The sample then restarts from its best image. The attack returns a
    misclassified image if there was any, and among these, or else among all, the one of the highest loss (targeted: of
    the highest margin).

    In L1 (Croce & Hein, https://arxiv.org/abs/2103.01208) a step changes few pixels, by their share in the best image,
    and there is no momentum. The search begins at three times and twice the radius, 30 percent of the steps each; these
    images do not count.

    From one start the search takes the steps of the authors' code (https://github.com/fra31/auto-attack), in L-infinity
    bit for bit. As there, the first step counts as a rise if its loss is above 0, whatever that of the start is.
    Departures: random starts are drawn by sample id, and in L1 no step is spent on pixels that the valid range holds.

    Args:
        eps: radius of the perturbation set; L-infinity radii in [0, 1] pixel units, such as ``4/255``.
        steps: steps of each run; a run computes one more gradient, that of its start, in L1 three more.
        norm: ``linf``, ``l2`` or ``l1``.
        loss: ``ce``, ``margin`` or ``dlr``; for targeted runs ``margin`` or ``dlr``.
        targets: number of targeted runs, towards the highest wrong classes of the clean image; 0 is untargeted.
        restarts: random starts of each run; misclassified samples keep their image and are not attacked further.
        rho: share of rising steps up to which the step size is halved.
        target: name of the class that images of other classes are moved to, or a class per task by the task's name;
            null for any wrong class. The loss to maximise is minus that of the target.

    Raises:
        ValueError: a radius is not in [0, 1], a count is too small, a targeted run has cross-entropy, or both
            ``targets`` and ``target`` are set.

    Examples:
        >>> import torch
        >>> from robustclip import APGD
        >>> images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
        >>> attack = APGD("4/255", steps=5)
        >>> attacked = attack(images, lambda x: x.mean((2, 3)), labels)  # the mean colour as logits
        >>> bool((attacked - images).abs().max() <= 4 / 255 + 1e-6)
        True
    """

    is_anytime = True
    eps: float

    @property
    def is_wide(self) -> bool:  # type: ignore[override]  # a class attribute for attacks of one kind
        """Whether the search begins outside the perturbation set."""
        return self.norm == "l1"

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
        return Cost(runs * (self.steps + len(self._phases())), int(self.targets > 0))

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
                widest, draw = self._phases()[0][0], perturbation_set.stream(seed, run)
                start = perturbation_set.surface_start(images, widest, self.norm, index, draw)
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

        for eps, steps in self._phases():
            start = start if self.norm != "l1" else perturbation_set.project(start, images, eps, "l1")
            value, gradient, worst = evaluate(start)  # of the last phase, which has the radius of the attack
            kind = SparseSearch if self.norm == "l1" else DenseSearch
            search = kind(images, start, value, gradient, eps=eps, norm=self.norm, steps=steps)
            for step in range(1, steps + 1):
                value, gradient, result = evaluate(search.next_position())
                worst = worst.or_worse(result)
                search.record(value, gradient)
                search.check(step, self.rho)
            start = search.best
        return worst

    def _phases(self) -> list[tuple[float, int]]:
        """Lists radii and their numbers of steps; in L1 the search begins with larger radii."""
        if self.norm != "l1":
            return [(self.eps, self.steps)]
        first = [(factor * self.eps, -(-self.steps * percent // 100)) for factor, percent in LARGER_RADII]
        first = first if self.steps > sum(steps for _, steps in first) else []
        return [*first, (self.eps, self.steps - sum(steps for _, steps in first))]


def _untargeted(loss: Loss, labels: Tensor, outputs: Tensor) -> Tensor:
    return loss(outputs, labels)


def _targeted(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor, targets: Tensor, outputs: Tensor
) -> Tensor:
    return loss(outputs, labels, targets)
