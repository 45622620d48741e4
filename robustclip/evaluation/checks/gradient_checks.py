"""Checks of the gradients: whether they exist, repeat, predict the loss, and use the whole image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustclip.attacks import Attack
from robustclip.evaluation.audit import AuditCheck, Check, ProbedCheck
from robustclip.evaluation.checks.model_checks import REPEATED
from robustclip.evaluation.evidence import Evidence

# Limits of warning and of failure, for shares. The lower end of a share's 95 % interval is compared with them, so that
# a small set does not fail by chance.
DEAD_GRADIENTS = (0.001, 0.01)  # a dead gradient is a step that the attack did not take

UNFAITHFUL = (0.05, 0.25)  # share of samples whose gradient does not predict the loss; none on sound models
# Median over the samples: 0.64 for Gaussian gradients, 0.35 to 0.46 for CLIP, 0.05 for an image clipped to [0.3, 0.7].
FEW_PIXELS = (0.02, 0.002)
ALL_ALIKE = 0.95  # of a constant image
# Median over the samples: 0.75 and more for CLIP, 0.3 for features through tanh(200 f), 0.16 through tanh(300 f).
JUMPS = (0.2, 0.02)
# Median over the samples: 0.48 and more for honest models of shapes and photographs, 0.03 for logits with ripples. The
# cosine of two gradients at this distance does not tell them apart: it is 0.15 for an honest model of photographs.
RISES = (0.2, 0.05)
# Of all samples. Cross-entropy is 0 in fp32 if the label's logit is 17 above all others: none for eight honest models.
SATURATED = (0.02, 1.0)


class _PixelGradients(AuditCheck):
    name = "pixel_gradients"
    why = "a gradient that is zero in every pixel, or was never taken, lets the sample pass unattacked"

    def grade(self, evidence: Evidence) -> Check:
        steps = faults = 0
        for key, columns in evidence.attacked.items():
            held = columns["by"] == ""  # after its success an attack may rest
            # Others than anytime attacks may succeed, rest, and yet return another image (CW of torchattacks).
            may_rest = not all(member.attack.is_anytime for member in evidence.members[key])
            dead = columns["dead"] * (not may_rest or (columns["dead"] == columns["steps"]).all())
            steps, faults = steps + int(columns["steps"][held].sum()), faults + int(dead[held].sum())
            if any(member.attack.is_anytime and not member.attack.is_black_box for member in evidence.members[key]):
                missing = int((columns["steps"][held] == 0).sum())
                steps, faults = steps + missing, faults + missing
        if not steps and evidence.total("steps").sum():
            return self.answer("pass", "nothing survived")
        return self.of_count(faults, steps, DEAD_GRADIENTS, "survivors' gradients are zero or missing")


CUT = "declared as cut, so that the other ways stand in for it"


class _GradientFidelity(AuditCheck):
    name = "gradient_fidelity"
    why = "a gradient that does not predict how the loss changes along it leads the attack astray"

    def grade(self, evidence: Evidence) -> Check:
        if evidence.is_declared_cut:
            return self.answer("pass", CUT)
        faithful = evidence.clean("faithful")
        probed = faithful[~np.isnan(faithful)]
        is_complete = probed.size == faithful.size
        fault = "samples' gradients do not predict the loss"
        return self.of_probes(int((probed == 0).sum()), probed.size, UNFAITHFUL, fault, is_complete=is_complete)


class _UncutCheck(ProbedCheck):
    """Grades a property of the gradient, unless a defence declares that it is cut."""

    def grade(self, evidence: Evidence) -> Check:
        return self.answer("pass", CUT) if evidence.is_declared_cut else super().grade(evidence)


class _GradientRepeats(_UncutCheck):
    name = "gradient_repeats"
    why = "two gradients of one image must be equal; else the attack needs the mean over many"
    columns = ("regrad",)

    def of_values(self, *values: NDArray[Any]) -> Check:
        (difference,) = values
        measurement = f"two gradients differ by up to {difference.max():.2g} of their length, {difference.size} samples"
        return self.answer("fail" if difference.max() > REPEATED else "pass", measurement)


class _GradientSpread(_UncutCheck):
    name = "gradient_spread"
    why = "a gradient of few pixels, or alike in all, is correct and useless: the attack moves as if blind"
    columns = ("spread",)

    def of_values(self, *values: NDArray[Any]) -> Check:
        median, size = float(np.median(values[0])), values[0].size
        warns = median < FEW_PIXELS[0] or median > ALL_ALIKE
        measurement = f"spread of the gradient {median:.2g}, median of {size} samples; 0.64 for Gaussian ones"
        return self.answer("fail" if median < FEW_PIXELS[1] else "warn" if warns else "pass", measurement)


class _GradientSteadiness(_UncutCheck):
    name = "gradient_steadiness"
    why = (
        "a gradient that vanishes within one step (saturation) or turns at once (ripples) is correct and leads nowhere"
    )
    columns = ("steady", "rise", "clean", "label")

    def of_values(self, *values: NDArray[Any]) -> Check:
        steady, rise, clean, label = values
        is_attacked = clean == label
        if not is_attacked.any():
            return self.answer("not_measured", "no probed sample is correctly classified")
        size, share = float(np.median(steady[is_attacked])), float(np.median(rise[is_attacked]))
        measurement = (
            f"the gradient keeps {size:.2g} of its size within one step of the attack, and the loss shows {share:.2g}"
            f" of the promised rise within an eighth of a grey level; medians of {is_attacked.sum()} samples"
        )
        fails, warns = (size < jump or share < least for jump, least in zip(JUMPS[::-1], RISES[::-1], strict=True))
        return self.answer("fail" if fails else "warn" if warns else "pass", measurement)


class _SaturatedLoss(AuditCheck):
    name = "saturated_loss"
    why = "where the cross-entropy rounds to 0, its gradient lacks the label's logit; the losses margin and dlr do not"

    def grade(self, evidence: Evidence) -> Check:
        checks = [self._of_attack(evidence, attack) for attack in dict.fromkeys(name for _, name in evidence.attacked)]
        return self.worst(checks, "no attack ran")

    def _of_attack(self, evidence: Evidence, attack: str) -> Check:
        keys = [key for key in evidence.attacked if key[1] == attack]
        members = [member.attack for key in keys for member in evidence.members[key]]
        if not all(member.eps and _is_by_cross_entropy(member) for member in members):
            return self.answer("pass", f"{attack} does not follow the label's cross-entropy alone")
        samples = sum(len(evidence.samples[task]["id"]) for task, _ in keys)
        columns = [evidence.attacked[key] for key in keys]
        count = sum(int(((part["by"] == "") & (part["loss"] == 0)).sum()) for part in columns)
        return self.of_count(count, samples, SATURATED, f"samples survive {attack} with a cross-entropy of 0 in fp32")


def _is_by_cross_entropy(attack: Attack) -> bool:
    """Returns whether the attack raises the cross-entropy of the label; null is the caller's loss, which that is."""
    return getattr(attack, "loss", "its own") in (None, "ce") and getattr(attack, "target", None) is None


GRADIENT_CHECKS: Sequence[AuditCheck] = (
    _PixelGradients(),
    _GradientFidelity(),
    _GradientRepeats(),
    _GradientSpread(),
    _GradientSteadiness(),
    _SaturatedLoss(),
)
