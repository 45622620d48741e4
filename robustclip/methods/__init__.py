"""The methods; each file holds what its paper adds to `RobustMethod`."""

from robustclip.methods.adversarial_training import AdversarialTraining
from robustclip.methods.agft import AGFT
from robustclip.methods.apt import APT
from robustclip.methods.arf import ARF
from robustclip.methods.base import RobustMethod
from robustclip.methods.caw import CAW
from robustclip.methods.clean_fine_tuning import CleanFineTuning
from robustclip.methods.clip_adapter import CLIPAdapter
from robustclip.methods.coop import CoOp
from robustclip.methods.croft import CRoFT
from robustclip.methods.dance import DANCE
from robustclip.methods.dive import DiVE
from robustclip.methods.fap import FAP
from robustclip.methods.fare import FARE
from robustclip.methods.fine_tuning import FineTuning
from robustclip.methods.flyp import FLYP, FLYPCE
from robustclip.methods.img_coadv import ImgCoAdv
from robustclip.methods.pmg_aft import PMGAFT
from robustclip.methods.pouf import POUF
from robustclip.methods.tecoa import TeCoA
from robustclip.methods.tip_adapter import TipAdapter
from robustclip.methods.trades import TRADES
from robustclip.methods.ucat import UCAT
from robustclip.methods.ueo import UEO
from robustclip.methods.upl import UPL
from robustclip.methods.zero_shot import ZeroShot

__all__ = [
    "AGFT",
    "APT",
    "ARF",
    "CAW",
    "DANCE",
    "FAP",
    "FARE",
    "FLYP",
    "FLYPCE",
    "PMGAFT",
    "POUF",
    "TRADES",
    "UCAT",
    "UEO",
    "UPL",
    "AdversarialTraining",
    "CLIPAdapter",
    "CRoFT",
    "CleanFineTuning",
    "CoOp",
    "DiVE",
    "FineTuning",
    "ImgCoAdv",
    "RobustMethod",
    "TeCoA",
    "TipAdapter",
    "ZeroShot",
]
