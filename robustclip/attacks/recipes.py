"""Standard evaluations by name: lists of attacks, each applied to the samples that withstood the earlier ones."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from robustclip.arguments import Positive
from robustclip.attacks.apgd import APGD
from robustclip.attacks.attack import Attack, Cost, Forward, Loss, Member, Worst, check_own_loss
from robustclip.attacks.perturbation_set import Norm
from robustclip.attacks.pgd import PGD
from robustclip.attacks.pixel_units import Radius, pixels, scaled_radius
from robustclip.attacks.sample_losses import margin
from robustclip.attacks.square import Square
from robustclip.attacks.torchattacks import TorchAttack

RecipeName = Literal["pgd10", "pgd100", "cascade", "autoattack"]
Build = Callable[[float, Norm, int], Attack]
"""Maps radius, norm and number of classes to an attack."""

TARGETS = 9  # number of AutoAttack's targets, for any number of classes (https://arxiv.org/abs/2003.01690)


def _fab_t(eps: float, norm: Norm, classes: int) -> Attack:
    spelled = {"linf": "Linf", "l2": "L2"}[norm]
    kwargs = {"norm": spelled, "steps": 100, "n_restarts": 1, "multi_targeted": True}
    return TorchAttack("FAB", eps, {**kwargs, "n_classes": min(classes, TARGETS + 1)})


ATTACKS: dict[str, Build] = {
    "pgd10": lambda eps, norm, _: PGD(eps, eps / 4, 10, norm),
    "pgd100": lambda eps, norm, _: PGD(eps, eps, 100, norm),
    "pgd_ce": lambda eps, norm, _: PGD(eps, eps / 4, 10, norm, loss="ce"),
    "pgd_margin": lambda eps, norm, _: PGD(eps, eps / 4, 10, norm, loss="margin"),
    "apgd_ce": lambda eps, norm, _: APGD(eps, 100, norm, "ce"),
    "apgd_t": lambda eps, norm, _: APGD(eps, 100, norm, "dlr", TARGETS),
    "fab_t": _fab_t,
    "square": lambda eps, norm, _: Square(eps, 5000, norm),
}

RECIPES: dict[RecipeName, tuple[str, ...]] = {
    "pgd10": ("pgd10",),
    "pgd100": ("pgd100",),
    "cascade": ("pgd_ce", "pgd_margin", "apgd_ce", "apgd_t", "square"),
    "autoattack": ("apgd_ce", "apgd_t", "fab_t", "square"),
}


class Recipe(Attack):
    """A standard evaluation: members run in order, each on the samples that the earlier ones left correct.

    ``pgd10``: 10 steps of eps/4. ``pgd100``: the papers' test attack, 100 steps of eps, last iterate. ``cascade``:
    from cheap to strong, PGD-10 with cross-entropy and with the margin, APGD-CE, APGD-T with DLR, Square.
    ``autoattack``: the standard four of Croce & Hein (https://arxiv.org/abs/2003.01690), APGD-CE, APGD-T, FAB-T and
    Square. Only the cascade has L1: its APGD and Square are then those of https://arxiv.org/abs/2103.01208, and its PGD
    takes sparse steps.

    Args:
        name: name of the recipe.
        eps: radius of the perturbation set; L-infinity radii in [0, 1] pixel units, such as ``4/255``.
        norm: ``linf``, ``l2``, or ``l1`` for ``cascade``.
        budget: factor of all steps and queries, for tests and quick evaluations.

    Raises:
        ValueError: there is no such recipe, or not in this norm, the radius is not in [0, 1], or the budget is not
            positive.

    Examples:
        >>> from robustclip import Recipe
        >>> [member.name for member in Recipe("cascade", "4/255").members(classes=10)]
        ['pgd_ce', 'pgd_margin', 'apgd_ce', 'apgd_t', 'square']
    """

    eps: float
    norm: Norm

    def __init__(self, name: RecipeName, eps: Radius = "4/255", norm: Norm = "linf", budget: Positive = 1.0) -> None:
        if norm == "l1" and name != "cascade":
            reason = "FAB of torchattacks fails in it" if name == "autoattack" else "its paper does not define it"
            raise ValueError(f"norm: {name} has no l1, since {reason}; take cascade, or PGD or APGD with norm l1")
        self.name, self.norm, self.budget = name, norm, budget
        self.eps = pixels(eps, name="eps", limit=1.0 if norm == "linf" else None)

    def members(self, classes: int) -> list[Member]:
        """Lists the recipe's attacks in order, adapted to the number of classes."""
        members = []
        for name in RECIPES[self.name]:
            attack = ATTACKS[name](self.eps, self.norm, classes).scaled(steps=self.budget)
            if attack is None:
                raise ValueError(f"{name} cannot scale its steps by {self.budget}")
            members += [member._replace(name=name) for member in attack.members(classes)]
        return members

    def cost(self, classes: int) -> Cost | None:
        """Passes per image by the settings."""
        costs = [member.attack.cost(classes) for member in self.members(classes)]
        known = [cost for cost in costs if cost is not None]
        return Cost(*map(sum, zip(*known, strict=True))) if len(known) == len(costs) else None

    def scaled(self, *, radius: float = 1.0, steps: float = 1.0) -> "Recipe":
        """Returns the recipe with every member's radius, step size and number of steps multiplied."""
        return self._changed(eps=scaled_radius(self.eps, radius, self.norm), budget=self.budget * steps)

    def perturb(
        self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, *, index: Tensor | None, seed: int
    ) -> Tensor:
        """Returns each sample's first misclassified image, else the image of the highest margin."""
        check_own_loss(self, loss)
        with torch.no_grad():
            outputs = forward(images)
        worst = Worst(images, margin(outputs, targets), self.is_success(outputs, targets))
        for member in self.members(outputs.shape[1]):
            rows = (~worst.is_misclassified).nonzero()[:, 0]
            if len(rows) == 0:
                break
            ids = None if index is None else index[rows]
            attacked = member.attack(images[rows], forward, targets[rows], index=ids, seed=seed)
            with torch.no_grad():
                outputs = forward(attacked)
            result = Worst(attacked, margin(outputs, targets[rows]), self.is_success(outputs, targets[rows]))
            result = Worst(*(part[rows] for part in worst)).or_worse(result)
            worst = Worst(*(part.index_put((rows,), new) for part, new in zip(worst, result, strict=True)))
        return worst.images


Attacks = dict[str, Attack] | RecipeName | list[RecipeName]


def by_name(attacks: Attacks) -> dict[str, Attack]:
    """Attacks by name; the name of a recipe stands for that recipe at its default radius."""
    if isinstance(attacks, dict):
        return attacks
    names: list[RecipeName] = [attacks] if isinstance(attacks, str) else attacks
    return {name: Recipe(name) for name in names}
