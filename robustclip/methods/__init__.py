"""The methods; each file holds what its paper adds to `RobustMethod`."""

from robustclip.methods.base import RobustMethod
from robustclip.methods.tecoa import TeCoA
from robustclip.methods.zero_shot import ZeroShot

__all__ = ["RobustMethod", "TeCoA", "ZeroShot"]
