"""Can a robust accuracy be trusted? What a ledger tells of the attack, of the model, and of both together."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustclip.attacks.attack import BOX_TOLERANCE
from robustclip.evaluation.checks import GRADES, Check, Status, counted, graded
from robustclip.evaluation.probes import Evidence
from robustclip.intervals import wilson

# Limits of warning and of failure, for shares. What is compared is the lower end of the share's 95 % interval, so that
# chance on a small set blames nobody.
DEAD_GRADIENTS = (0.001, 0.01)  # each is a step that the attack did not take
FALLING_LOSS = (0.01, 0.1)  # noise and wrong labels lower it for a third and more
NEAR_CLEAN = (0.01, 0.1)  # each is a sample that counts as robust against a radius that it has not seen
PROBES_RESISTED = (0.02, 0.25)  # 1 of 1 warns, 2 of 2 fail
BLACK_BOX_WINS = (0.002, 0.02)  # a sound search leaves random search next to nothing
BASELINE_ROBUST = (0.1, 0.3)  # of the mean over tasks; CLIP keeps a few per cent at 1/255 (arXiv:2212.07016)
# An 8-bit image cannot show less than half a grey level. A quarter of the range (l2: in every pixel of 32 x 32) is
# several times RobustBench's largest radii, 8/255 and 3; radii in grey levels are above.
RADII = {"linf": (0.5 / 255, 0.25), "l2": (0.5 / 255, 14.0)}
OUTSIDE = 0.5  # of the range of pixels; bicubic resizing overshoots by a tenth, a second normalisation by more than 1
ONE_CLASS = 0.95  # of all predictions; labels that are as uneven are left alone
REPEAT_TOLERANCE = 1e-3  # of the largest logit; kernels differ with the size of a batch
SMALLEST_TASK = 20  # samples, for statements about one task


def audit(evidence: Evidence) -> dict[str, Any]:
    """Grade and checks: A all passed, B something was not measured, C a warning, F a failure."""
    checks = [check(evidence) for check in CHECKS]
    worst = max((check.status for check in checks), key=list(GRADES).index)
    return {"grade": GRADES[worst], "checks": [asdict(check) for check in checks]}


def _baseline(evidence: Evidence) -> Check:
    why = "an attack that leaves the undefended model standing says nothing about a defence"
    shares = evidence.undefended()
    if isinstance(shares, str):
        return Check("baseline", "not_measured", shares, why)
    name, share = max(shares.items(), key=lambda item: item[1])
    return graded("baseline", share, BASELINE_ROBUST, f"undefended: {share:.1%} right under {name}", why)


def _radius(evidence: Evidence) -> Check:
    why = "a radius in grey levels, or divided by 255 twice, is another threat model than the one that is meant"
    radii = {
        (member.attack.eps, member.attack.norm)
        for members in evidence.members.values()
        for member in members
        if member.attack.eps and member.attack.norm in RADII
    }
    if not radii:
        return Check("radius", "not_measured", "no attack with a radius", why)
    odd = [f"{norm} {eps:.3g}" for eps, norm in sorted(radii) if not RADII[norm][0] <= eps <= RADII[norm][1]]
    return Check("radius", "warn" if odd else "pass", f"out of the ordinary: {', '.join(odd) or 'none'}", why)


def _pixel_gradients(evidence: Evidence) -> Check:
    why = "a gradient that is zero in every pixel, or was never taken, lets the sample pass unattacked"
    steps = faults = 0
    for key, columns in evidence.attacked.items():
        held = columns["by"] == ""  # an attack that has broken a sample may rest
        # Others than anytime attacks may break a survivor, rest, and return another image (CW of torchattacks).
        may_rest = not all(member.attack.is_anytime for member in evidence.members[key])
        dead = columns["dead"] * (not may_rest or (columns["dead"] == columns["steps"]).all())
        steps, faults = steps + int(columns["steps"][held].sum()), faults + int(dead[held].sum())
        if any(member.attack.is_anytime and not member.attack.is_black_box for member in evidence.members[key]):
            missing = int((columns["steps"][held] == 0).sum())
            steps, faults = steps + missing, faults + missing
    if not steps and evidence.total("steps").sum():
        return Check("pixel_gradients", "pass", "nothing survived", why)
    return counted("pixel_gradients", faults, steps, DEAD_GRADIENTS, "survivors' gradients are zero or missing", why)


def _loss_rises(evidence: Evidence) -> Check:
    why = "an attack that lowers the loss has a wrong sign, wrong labels, or is noise"
    loss, clean = evidence.total("loss"), evidence.total("clean_loss")
    falls = loss < 0.99 * clean - 1e-6  # of tiny losses fp32 keeps 1e-7
    what = "attacked samples end with a lower loss than clean"
    return counted("loss_rises", int(falls.sum()), falls.size, FALLING_LOSS, what, why)


def _uses_radius(evidence: Evidence) -> Check:
    """Of survivors alone: what broke inside a smaller radius is broken all the same."""
    why = "a sample that survived near its clean image was tried at a smaller radius than the result tells"
    name, near, survivors, attacked = "uses_radius", 0, 0, 0
    for (task, attack), columns in evidence.attacked.items():
        members = [member.attack for member in evidence.members[task, attack]]
        if all(member.eps for member in members):
            used = columns["distance"] / max(member.eps or 0 for member in members)
            held = columns["by"] == ""
            # Minimum-norm attacks give the clean image back where they fail, but not everywhere.
            is_near = used < 0.5 if all(member.is_anytime for member in members) else used.max(initial=0) < 0.01
            near, survivors, attacked = near + int((held & is_near).sum()), survivors + held.sum(), attacked + used.size
    if attacked and not survivors:
        return Check(name, "pass", "nothing survived", why)
    return counted(name, near, int(survivors), NEAR_CLEAN, "survivors lie within half the radius", why)


def _ball_and_box(evidence: Evidence) -> Check:
    excess = evidence.total("excess")
    found = f"largest excess {excess.max(initial=0):.2g}"
    why = "images outside of ball or box were tried; they do not count, but the attack is not the one that is named"
    status: Status = "fail" if excess.max(initial=0) > BOX_TOLERANCE else "pass" if excess.size else "not_measured"
    return Check("ball_and_box", status, found, why)


def _finite(evidence: Evidence) -> Check:
    clean = sum(int((~np.isfinite(columns["largest_logit"])).sum()) for columns in evidence.samples.values())
    under_attack = ~np.isfinite(evidence.total("distance")) | (evidence.total("nans") > 0)
    count = int(under_attack.sum())
    found = f"{clean:,} clean and {count:,} attacked samples are not"
    return Check("finite", "fail" if clean + count else "pass", found, "NaN compares as it likes")


def _repeatable(evidence: Evidence) -> Check:
    why = "a model whose answer depends on chance or on the rest of the batch (dropout, BatchNorm) blinds the attack"
    difference, largest = evidence.clean("repeat"), evidence.clean("largest_logit")
    probed = np.isfinite(difference) & np.isfinite(largest)
    if not probed.any():
        return Check("repeatable", "not_measured", "no sample was probed", why)
    is_same = bool((difference[probed] <= REPEAT_TOLERANCE * np.maximum(1, largest[probed])).all())
    found = f"largest difference of a logit {difference[probed].max():.2g}, {probed.sum()} samples"
    return Check("repeatable", "pass" if is_same else "fail", found, why)


def _probe(name: str, column: str, is_of_survivors: bool, why: str) -> Callable[[Evidence], Check]:
    """A check that a stronger version of an attack's first member breaks what it broke, or what it could not."""

    def check(evidence: Evidence) -> Check:
        held = [
            columns[column][
                (columns["by"] == ("" if is_of_survivors else evidence.members[key][0].name))
                & ~np.isnan(columns[column])
            ]
            == 0
            for key, columns in evidence.attacked.items()
        ]
        count, total = sum(int(each.sum()) for each in held), sum(each.size for each in held)
        if is_of_survivors and not total and evidence.total("by").size:
            share = float((evidence.total("by") == "").mean())
            if share <= BASELINE_ROBUST[0]:
                return Check(name, "pass", f"{share:.1%} survive, none of them was probed", why)
        return counted(name, count, total, PROBES_RESISTED, "probed samples hold", why)

    return check


def _black_box(evidence: Evidence) -> Check:
    why = "what gradients miss and random search finds points to masked gradients"
    won, samples = Counter[str](), Counter[str]()
    for (task, attack), columns in evidence.attacked.items():
        members = evidence.members[task, attack]
        blind = [member.name for member in members if member.attack.is_black_box]
        if 0 < len(blind) < len(members):
            won[attack] += int(np.isin(columns["by"], blind).sum())
            samples[attack] += len(evidence.samples[task]["id"])
    checks = [
        counted("black_box", won[name], samples[name], BLACK_BOX_WINS, f"broken by it alone, {name}", why)
        for name in samples
    ]
    if not checks:
        found = "no black-box attack after others; the recipes cascade and autoattack have one"
        return Check("black_box", "not_measured", found, why)
    return max(checks, key=lambda check: list(GRADES).index(check.status))


def _normalised_once(evidence: Evidence) -> Check:
    why = "pixels far outside of a normalised image's range were normalised twice, or are grey levels"
    outside = evidence.clean("outside")
    outside = outside[np.isfinite(outside)]
    if not outside.size:
        return Check("normalised_once", "not_measured", "no sample was probed", why)
    found = f"the tower sees pixels {outside.max():.0%} of the range outside of it"
    return Check("normalised_once", "warn" if outside.max() > OUTSIDE else "pass", found, why)


def _logit_scale(evidence: Evidence) -> Check:
    why = "logits that are bare cosines lack the temperature: attacks on them are weak, and so is the softmax"
    logits = evidence.clean("largest_logit")
    largest = logits[np.isfinite(logits)].max(initial=0)
    status: Status = "pass" if largest > 1.01 else "warn" if logits.size else "not_measured"
    return Check("logit_scale", status, f"largest logit {largest:.3g}", why)


def _better_than_chance(evidence: Evidence) -> Check:
    guessing = []
    for task, columns in evidence.samples.items():
        n, correct = len(columns["id"]), int((columns["clean"] == columns["label"]).sum())
        if n >= SMALLEST_TASK and wilson(correct, n)[0] <= 1 / evidence.class_counts[task]:
            guessing.append(task)
    why = "a model that guesses has nothing to lose: look for normalisation done twice, or class names in another order"
    found = f"clean accuracy at chance: {', '.join(guessing) or 'no task'}"
    return Check("better_than_chance", "warn" if guessing else "pass", found, why)


def _predictions_vary(evidence: Evidence) -> Check:
    stuck = [
        task
        for task, columns in evidence.samples.items()
        if len(columns["id"]) >= SMALLEST_TASK
        and _commonest(columns["clean"]) >= ONE_CLASS > _commonest(columns["label"])
    ]
    why = "a model that gives one answer to everything cannot be attacked; its accuracy is no robustness"
    found = f"one class for nearly all: {', '.join(stuck) or 'no task'}"
    return Check("predictions_vary", "warn" if stuck else "pass", found, why)


def _commonest(classes: NDArray[Any]) -> float:
    """Share of the most frequent class."""
    return float(np.unique(classes, return_counts=True)[1].max() / classes.size)


CHECKS: Sequence[Callable[[Evidence], Check]] = (
    _baseline,
    _radius,
    _pixel_gradients,
    _loss_rises,
    _uses_radius,
    _ball_and_box,
    _finite,
    _repeatable,
    _probe("larger_radius", "wider", False, "a larger radius must not help the model; if it does, gradients mislead"),
    _probe("any_radius", "wider", True, "half the pixel range erases an image; who survives it hides its gradients"),
    _probe("more_steps", "longer", False, "more steps must not help the model; if they do, gradients mislead"),
    _black_box,
    _normalised_once,
    _logit_scale,
    _better_than_chance,
    _predictions_vary,
)
