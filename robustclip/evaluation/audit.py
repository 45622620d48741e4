"""Grades whether a robust accuracy can be trusted, from the ledgers' columns about attack and model."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robustclip.arguments import class_at
from robustclip.attacks.attack import BOX_TOLERANCE
from robustclip.evaluation.probes import Evidence
from robustclip.intervals import wilson

Status = Literal["pass", "not_measured", "warn", "fail"]
GRADES: dict[Status, str] = {"pass": "A", "not_measured": "B", "warn": "C", "fail": "F"}
ORDER = list(GRADES)  # from the best to the worst

# Limits of warning and of failure, for shares. The lower end of a share's 95 % interval is compared with them, so that
# a small set does not fail by chance.
DEAD_GRADIENTS = (0.001, 0.01)  # a dead gradient is a step that the attack did not take
FALLING_LOSS = (0.01, 0.1)  # noise and wrong labels lower the loss of a third of the samples and more
NEAR_CLEAN = (0.01, 0.1)  # a sample near its clean image counts as robust against a radius that was not tried
PROBES_RESISTED = (0.02, 0.25)  # 1 sample of 1 is a warning, 2 of 2 a failure
NOT_IN_FP32 = (0.001, 0.01)  # every sample is either attacked in fp32 or misclassified in fp32
BLACK_BOX_WINS = (0.002, 0.02)  # random search finds next to nothing after a sound gradient search
BASELINE_ROBUST = (0.1, 0.3)  # limits of the mean over tasks; CLIP keeps a few per cent at 1/255 (arXiv:2212.07016)
# An 8-bit image cannot show less than half a grey level. A quarter of the range (l2: in every pixel of 32 x 32) is
# several times RobustBench's largest radii, 8/255 and 3; radii in grey levels are above.
RADII = {"linf": (0.5 / 255, 0.25), "l2": (0.5 / 255, 14.0)}
OUTSIDE = 0.5  # share of the pixel range; bicubic resizing overshoots by 0.1, a second normalisation by more than 1
ONE_CLASS = 0.95  # share of all predictions; tasks with equally uneven labels are not graded
REPEAT_TOLERANCE = 1e-3  # share of the largest logit; kernels differ with the batch size
SMALLEST_TASK = 20  # number of samples from which on a single task is graded


@dataclass(frozen=True)
class Check:
    """The answer of one audit check.

    Attributes:
        name: name of the check.
        status: ``pass``, ``not_measured``, ``warn`` or ``fail``.
        measurement: numbers behind the status.
        why: meaning of a bad answer.
    """

    name: str
    status: Status
    measurement: str
    why: str


class AuditCheck(ABC):
    """Grades one property of a finished test; a subclass sets `name` and `why` and defines `grade`.

    - ``name``: key in the result.
    - ``why``: one sentence on what a bad answer means.
    - ``grade(evidence)``: returns a `Check`, made by ``answer(status, measurement)`` from a status, by
      ``of_share(share, limits, measurement)`` from limits of warning and failure, or by
      ``of_count(count, total, limits, fault)`` from the lower end of the share's 95 % interval.
    """

    name: str = ""
    why: str = ""

    @abstractmethod
    def grade(self, evidence: Evidence) -> Check:
        """Grades the columns of the ledgers; ``not_measured`` where they do not suffice."""

    def answer(self, status: Status, measurement: str) -> Check:
        """Returns the check's answer.

        Args:
            status: ``pass``, ``not_measured``, ``warn`` or ``fail``.
            measurement: numbers behind the status.
        """
        return Check(self.name, status, measurement, self.why)

    def of_share(self, share: float, limits: tuple[float, float], measurement: str) -> Check:
        """Grades a share.

        Args:
            share: in [0, 1].
            limits: shares above which the answer is a warning and a failure.
            measurement: numbers behind the share.
        """
        return self.answer("fail" if share > limits[1] else "warn" if share > limits[0] else "pass", measurement)

    def of_count(self, count: int, total: int, limits: tuple[float, float], fault: str) -> Check:
        """Grades the lower end of the 95 % interval of a share.

        Args:
            count: number of cases with the fault.
            total: number of examined cases; 0 is ``not_measured``.
            limits: see `of_share`.
            fault: description of the fault, which follows the two numbers.
        """
        if not total:
            return self.answer("not_measured", f"0 of 0 {fault}")
        return self.of_share(wilson(count, total)[0], limits, f"{count:,} of {total:,} {fault}")


def audit(evidence: Evidence, further: Sequence[AuditCheck] = ()) -> dict[str, Any]:
    """Grades a test: A all checks passed, B something was not measured, C a warning, F a failure.

    Args:
        evidence: measurements of a finished test.
        further: checks of the user, which follow the package's and count as much.
    """
    checks = [check.grade(evidence) for check in (*CHECKS, *further)]
    worst = max((check.status for check in checks), key=ORDER.index)
    answers = [{"name": c.name, "status": c.status, "found": c.measurement, "why": c.why} for c in checks]
    return {"grade": GRADES[worst], "checks": answers}


def checks_at(paths: Iterable[str]) -> list[AuditCheck]:
    """Makes the user's checks from the paths of their classes.

    Args:
        paths: class paths such as ``my_module.MyCheck``.

    Raises:
        ValueError: no such class, one that is not complete, or one whose name is taken.
    """
    checks: list[AuditCheck] = []
    for path in paths:
        cls = class_at(path, AuditCheck, "results.checks")
        missing = [name for name in ("name", "why", "grade") if getattr(cls, name) is getattr(AuditCheck, name)]
        if missing:
            raise ValueError(f"results.checks: {path!r} must define {', '.join(missing)}")
        if cls.name in {check.name for check in (*CHECKS, *checks)}:
            raise ValueError(f"results.checks: the name {cls.name!r} of {path!r} is taken; choose another one")
        checks.append(cls())
    return checks


class _Baseline(AuditCheck):
    name = "baseline"
    why = "an attack that the undefended model survives says nothing about a defence"

    def grade(self, evidence: Evidence) -> Check:
        shares = evidence.undefended()
        if isinstance(shares, str):
            return self.answer("not_measured", shares)
        name, share = max(shares.items(), key=lambda item: item[1])
        return self.of_share(share, BASELINE_ROBUST, f"undefended: {share:.1%} correct under {name}")


class _Radius(AuditCheck):
    name = "radius"
    why = "a radius in grey levels, or divided by 255 twice, is another threat model than the one that is meant"

    def grade(self, evidence: Evidence) -> Check:
        radii = {
            (member.attack.eps, member.attack.norm)
            for members in evidence.members.values()
            for member in members
            if member.attack.eps and member.attack.norm in RADII
        }
        if not radii:
            return self.answer("not_measured", "no attack with a radius")
        odd = [f"{norm} {eps:.3g}" for eps, norm in sorted(radii) if not RADII[norm][0] <= eps <= RADII[norm][1]]
        return self.answer("warn" if odd else "pass", f"unusual radii: {', '.join(odd) or 'none'}")


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


class _LossRises(AuditCheck):
    name = "loss_rises"
    why = "an attack that lowers the loss has a wrong sign, wrong labels, or is noise"

    def grade(self, evidence: Evidence) -> Check:
        loss, clean = evidence.total("loss"), evidence.total("clean_loss")
        falls = loss < 0.99 * clean - 1e-6  # of tiny losses fp32 keeps 1e-7
        fault = "attacked samples end with a lower loss than clean"
        return self.of_count(int(falls.sum()), falls.size, FALLING_LOSS, fault)


class _UsesRadius(AuditCheck):
    name = "uses_radius"
    why = "a sample that survived near its clean image was tried at a smaller radius than the result states"

    def grade(self, evidence: Evidence) -> Check:
        near = survivors = attacked = 0
        for key, columns in evidence.attacked.items():
            members = [member.attack for member in evidence.members[key]]
            if all(member.eps for member in members):
                used = columns["distance"] / max(member.eps or 0 for member in members)
                held = columns["by"] == ""  # misclassified inside a smaller radius is misclassified all the same
                # Minimum-norm attacks give the clean image back where they fail, but not everywhere.
                is_near = used < 0.5 if all(member.is_anytime for member in members) else used.max(initial=0) < 0.01
                near, survivors = near + int((held & is_near).sum()), survivors + int(held.sum())
                attacked += used.size
        if attacked and not survivors:
            return self.answer("pass", "nothing survived")
        return self.of_count(near, survivors, NEAR_CLEAN, "survivors lie within half the radius")


class _InsideSet(AuditCheck):
    name = "ball_and_box"
    why = "images outside the perturbation set or the valid pixel range do not count, and the attack is misnamed"

    def grade(self, evidence: Evidence) -> Check:
        excess = evidence.total("excess")
        measurement = f"largest excess {excess.max(initial=0):.2g}"
        status: Status = "fail" if excess.max(initial=0) > BOX_TOLERANCE else "pass" if excess.size else "not_measured"
        return self.answer(status, measurement)


class _Finite(AuditCheck):
    name = "finite"
    why = "comparisons with NaN have no meaning, so neither attack nor accuracy can be trusted"

    def grade(self, evidence: Evidence) -> Check:
        clean = sum(int((~np.isfinite(columns["largest_logit"])).sum()) for columns in evidence.samples.values())
        under_attack = ~np.isfinite(evidence.total("distance")) | (evidence.total("nans") > 0)
        count = int(under_attack.sum())
        measurement = f"{clean:,} clean and {count:,} attacked samples are not finite"
        return self.answer("fail" if clean + count else "pass", measurement)


class _Fp32Verdict(AuditCheck):
    name = "fp32_verdict"
    why = "an attack or a prediction in lower precision decides other samples than the model in fp32 would"

    def grade(self, evidence: Evidence) -> Check:
        exact, change, loss = (evidence.total(column) for column in ("exact", "again", "loss"))
        probed = np.isfinite(change) & np.isfinite(loss)
        if (change[probed] > REPEAT_TOLERANCE * np.maximum(1, loss[probed])).any():
            return self.answer("fail", f"in fp32, an attacked image's loss differs by {change[probed].max():.2g}")
        return self.of_count(int((exact == 0).sum()), exact.size, NOT_IN_FP32, "attacked samples decided without fp32")


class _Repeatable(AuditCheck):
    name = "repeatable"
    why = "a model whose answer depends on chance or on the rest of the batch (dropout, BatchNorm) blinds the attack"

    def grade(self, evidence: Evidence) -> Check:
        difference, largest = evidence.clean("repeat"), evidence.clean("largest_logit")
        probed = np.isfinite(difference) & np.isfinite(largest)
        if not probed.any():
            return self.answer("not_measured", "no sample was probed")
        is_same = bool((difference[probed] <= REPEAT_TOLERANCE * np.maximum(1, largest[probed])).all())
        measurement = f"largest difference of a logit {difference[probed].max():.2g}, {probed.sum()} samples"
        return self.answer("pass" if is_same else "fail", measurement)


class _StrongerAttack(AuditCheck):
    """Grades whether a stronger version of an attack's first member also succeeds.

    Args:
        name: of the check.
        column: column of the ledger, with 1 where the stronger version succeeded and 0 where it failed.
        is_of_survivors: try samples that survived the attack; else samples on which its first member succeeded.
        why: see `AuditCheck`.
    """

    def __init__(self, name: str, column: str, is_of_survivors: bool, why: str) -> None:
        self.name, self.column, self.is_of_survivors, self.why = name, column, is_of_survivors, why

    def grade(self, evidence: Evidence) -> Check:
        count = total = 0
        for key, columns in evidence.attacked.items():
            by = "" if self.is_of_survivors else evidence.members[key][0].name
            results = columns[self.column][(columns["by"] == by) & ~np.isnan(columns[self.column])]
            count, total = count + int((results == 0).sum()), total + results.size
        if self.is_of_survivors and not total and evidence.total("by").size:
            share = float((evidence.total("by") == "").mean())
            if share <= BASELINE_ROBUST[0]:
                return self.answer("pass", f"{share:.1%} survive, none of them was probed")
        return self.of_count(count, total, PROBES_RESISTED, "probed samples hold")


class _BlackBox(AuditCheck):
    name = "black_box"
    why = "successes of random search on samples that survived gradients point to masked gradients"

    def grade(self, evidence: Evidence) -> Check:
        won, samples = Counter[str](), Counter[str]()
        for (task, attack), columns in evidence.attacked.items():
            members = evidence.members[task, attack]
            blind = [member.name for member in members if member.attack.is_black_box]
            if 0 < len(blind) < len(members):
                won[attack] += int(np.isin(columns["by"], blind).sum())
                samples[attack] += len(evidence.samples[task]["id"])
        checks = [
            self.of_count(won[name], samples[name], BLACK_BOX_WINS, f"misclassified by it alone, {name}")
            for name in samples
        ]
        if not checks:
            measurement = "no black-box attack after others; the recipes cascade and autoattack have one"
            return self.answer("not_measured", measurement)
        return max(checks, key=lambda check: ORDER.index(check.status))


class _NormalisedOnce(AuditCheck):
    name = "normalised_once"
    why = "pixels far outside a normalised image's range were normalised twice, or are grey levels"

    def grade(self, evidence: Evidence) -> Check:
        outside = evidence.clean("outside")
        outside = outside[np.isfinite(outside)]
        if not outside.size:
            return self.answer("not_measured", "no sample was probed")
        measurement = f"the tower receives pixels {outside.max():.0%} of the range outside of it"
        return self.answer("warn" if outside.max() > OUTSIDE else "pass", measurement)


class _LogitScale(AuditCheck):
    name = "logit_scale"
    why = "logits without the temperature are mere cosines, on which attacks are weak"

    def grade(self, evidence: Evidence) -> Check:
        logits = evidence.clean("largest_logit")
        largest = logits[np.isfinite(logits)].max(initial=0)
        status: Status = "pass" if largest > 1.01 else "warn" if logits.size else "not_measured"
        return self.answer(status, f"largest logit {largest:.3g}")


class _BetterThanChance(AuditCheck):
    name = "better_than_chance"
    why = "a model at chance has nothing to lose; look for a second normalisation, or class names in another order"

    def grade(self, evidence: Evidence) -> Check:
        guessing = []
        for task, columns in evidence.samples.items():
            n, correct = len(columns["id"]), int((columns["clean"] == columns["label"]).sum())
            if n >= SMALLEST_TASK and wilson(correct, n)[0] <= 1 / evidence.class_counts[task]:
                guessing.append(task)
        measurement = f"clean accuracy at chance: {', '.join(guessing) or 'no task'}"
        return self.answer("warn" if guessing else "pass", measurement)


class _PredictionsVary(AuditCheck):
    name = "predictions_vary"
    why = "a model that always predicts one class cannot be attacked; its accuracy is no robustness"

    def grade(self, evidence: Evidence) -> Check:
        stuck = [
            task
            for task, columns in evidence.samples.items()
            if len(columns["id"]) >= SMALLEST_TASK
            and _commonest(columns["clean"]) >= ONE_CLASS > _commonest(columns["label"])
        ]
        measurement = f"one class for nearly all: {', '.join(stuck) or 'no task'}"
        return self.answer("warn" if stuck else "pass", measurement)


def _commonest(classes: NDArray[Any]) -> float:
    """Computes the share of the most frequent class."""
    return float(np.unique(classes, return_counts=True)[1].max() / classes.size)


CHECKS: Sequence[AuditCheck] = (
    _Baseline(),
    _Radius(),
    _PixelGradients(),
    _LossRises(),
    _UsesRadius(),
    _InsideSet(),
    _Finite(),
    _Fp32Verdict(),
    _Repeatable(),
    _StrongerAttack(
        "larger_radius", "wider", False, "a larger radius must not help the model; if it does, gradients mislead"
    ),
    _StrongerAttack(
        "any_radius",
        "wider",
        True,
        "half the pixel range erases an image; a model that survives it hides its gradients",
    ),
    _StrongerAttack("more_steps", "longer", False, "more steps must not help the model; if they do, gradients mislead"),
    _BlackBox(),
    _NormalisedOnce(),
    _LogitScale(),
    _BetterThanChance(),
    _PredictionsVary(),
)
