"""The methods; each file holds what its paper adds to `RobustMethod`."""

from robustclip.methods.adversarial_training import AdversarialTraining
from robustclip.methods.arf import ARF
from robustclip.methods.base import RobustMethod
from robustclip.methods.clean_fine_tuning import CleanFineTuning
from robustclip.methods.fare import FARE
from robustclip.methods.fine_tuning import FineTuning
from robustclip.methods.flyp import FLYP
from robustclip.methods.img_coadv import ImgCoAdv
from robustclip.methods.pmg_aft import PMGAFT
from robustclip.methods.tecoa import TeCoA
from robustclip.methods.trades import TRADES
from robustclip.methods.zero_shot import ZeroShot

__all__ = [
    "ARF",
    "FARE",
    "FLYP",
    "PMGAFT",
    "TRADES",
    "AdversarialTraining",
    "CleanFineTuning",
    "FineTuning",
    "ImgCoAdv",
    "RobustMethod",
    "TeCoA",
    "ZeroShot",
]
