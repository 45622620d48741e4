"""Test-time defences; all have the signature of `Defence`."""

from robustclip.defences.clipure import CLIPure
from robustclip.defences.dbd import DBD
from robustclip.defences.defence import Defence
from robustclip.defences.et3 import ET3
from robustclip.defences.gaussian_noise import GaussianNoise
from robustclip.defences.jpeg import JPEG
from robustclip.defences.mac import MAC
from robustclip.defences.r_tpt import RTPT
from robustclip.defences.resize_and_pad import ResizeAndPad
from robustclip.defences.ttc import TTC

__all__ = [
    "DBD",
    "ET3",
    "JPEG",
    "MAC",
    "RTPT",
    "TTC",
    "CLIPure",
    "Defence",
    "GaussianNoise",
    "ResizeAndPad",
]
