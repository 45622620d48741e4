"""Attacks in pixel space; all have the signature of `Attack`."""

from robustclip.attacks.apgd import APGD
from robustclip.attacks.attack import Attack, Cost, Member
from robustclip.attacks.pgd import PGD
from robustclip.attacks.pixel_units import Radius, pixels
from robustclip.attacks.recipes import Recipe
from robustclip.attacks.sample_losses import cross_entropy
from robustclip.attacks.square import Square
from robustclip.attacks.torchattacks import TorchAttack

__all__ = [
    "APGD",
    "PGD",
    "Attack",
    "Cost",
    "Member",
    "Radius",
    "Recipe",
    "Square",
    "TorchAttack",
    "cross_entropy",
    "pixels",
]
