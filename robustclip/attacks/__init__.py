"""Attacks in pixel space; all share the signature of `Attack`."""

from robustclip.attacks.base import Attack, Radius, cross_entropy, pixels
from robustclip.attacks.pgd import PGD
from robustclip.attacks.torchattacks import TorchAttack

__all__ = ["PGD", "Attack", "Radius", "TorchAttack", "cross_entropy", "pixels"]
