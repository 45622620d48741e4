"""Precisions in which the attacks of a test run, from the cheapest to fp32, which decides every verdict."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from robustclip.attacks.attack import Forward
from robustclip.evaluation.engine import Rung, StopRule
from robustclip.models.tf32 import tf32

AttackPrecision = Literal["fp32", "tf32", "bf16"]
CheapPrecision = Literal["tf32", "bf16"]
LADDER: tuple[CheapPrecision, ...] = ("bf16", "tf32")


def rungs(precision: AttackPrecision, device: str, stop: StopRule = "worst") -> list[CheapPrecision]:
    """Lists the precisions below fp32 in which attacks run first.

    Args:
        precision: the cheapest one.
        device: type of the device; TF32 exists on ``cuda`` alone.
        stop: stop rule; under ``last``, attacks run once.
    """
    cheaper = [] if precision == "fp32" else LADDER[LADDER.index(precision) :]
    available: list[CheapPrecision] = [name for name in cheaper if name != "tf32" or device == "cuda"]
    return available[:1] if stop == "last" else available


def description(precision: AttackPrecision, device: str, stop: StopRule) -> str:
    """Describes the precisions of attack and verdict for the protocol of a result.

    Args:
        precision: the cheapest one.
        device: type of the device.
        stop: stop rule of the evaluation.
    """
    cheaper: list[str] = [*rungs(precision, device, stop)]
    attack = " then ".join(cheaper if cheaper and stop == "last" else [*cheaper, "fp32"])
    skipped = f" (tf32 skipped: it does not exist on {device})" if precision != "fp32" and device != "cuda" else ""
    return f"attack {attack}{skipped}, verdict fp32"


def exact(forward: Forward) -> Forward:
    """Wraps a function of images, so that it computes without TF32, also inside an attack with TF32."""

    def exact_forward(images: Tensor) -> Tensor:
        with tf32(is_allowed=False):
            return forward(images)

    return exact_forward


def ladder(forward: Forward, precisions: Sequence[CheapPrecision], device: str) -> list[Rung]:
    """Makes the model in each precision below fp32.

    Args:
        forward: function from images to logits ``(B, C)``.
        precisions: result of `rungs`.
        device: type of the device.
    """

    def in_bfloat16(images: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return forward(images)

    known = {"bf16": Rung(in_bfloat16), "tf32": Rung(forward, partial(tf32, is_allowed=True))}
    return [known[precision] for precision in precisions]
