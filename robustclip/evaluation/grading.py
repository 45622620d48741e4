"""Grades whether a robust accuracy can be trusted, by all checks of the audit."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from robustclip.arguments import class_at
from robustclip.evaluation.audit import GRADES, ORDER, AuditCheck, Check
from robustclip.evaluation.checks import CHECKS
from robustclip.evaluation.evidence import Evidence

SOUND = (
    *("gradient_fidelity", "gradient_spread", "gradient_steadiness", "gradient_repeats", "pixel_gradients"),
    *("loss_rises", "uses_radius"),
)
OTHERS = (
    "black_box",
    "transfer",
    "borrowed_gradients",
    "other_attack",
    "any_radius",
    "ball_and_box",
    "larger_radius",
    "more_steps",
)

# Checks of a defence's own gradient; the other ways through it do not need that.
OF_OWN_GRADIENT = (
    *("gradient_fidelity", "gradient_spread", "gradient_steadiness", "gradient_repeats", "pixel_gradients"),
    *("ways", "black_box"),
)


def audit(evidence: Evidence, further: Sequence[AuditCheck] = ()) -> dict[str, Any]:
    """Grades a test: A all checks passed, B something was not measured, C a warning, F a failure.

    Args:
        evidence: measurements of a finished test.
        further: checks of the user, which follow the package's and count as much.
    """
    checks = _with_open_baseline([check.grade(evidence) for check in (*CHECKS, *further)], evidence)
    checks = _with_all_ways(checks, evidence)
    worst = max((check.status for check in checks), key=ORDER.index)
    answers = [{"name": c.name, "status": c.status, "found": c.measurement, "why": c.why} for c in checks]
    return {"grade": GRADES[worst], "checks": answers}


def _with_open_baseline(checks: list[Check], evidence: Evidence) -> list[Check]:
    """Turns a failing baseline into a warning where the gradients are sound: then the weights may just be robust."""
    statuses = {check.name: check.status for check in checks}
    is_sound = all(statuses[name] == "pass" for name in SOUND) and not {statuses[name] for name in OTHERS} & {
        "warn",
        "fail",
    }
    if not (evidence.is_undefended and statuses["baseline"] == "fail" and is_sound):
        return checks
    reading = "the attack is weak, or the weights are robust: then set model.is_robust and results.baseline"
    return [
        replace(check, status="warn", measurement=f"{check.measurement}; {reading}")
        if check.name == "baseline"
        else check
        for check in checks
    ]


def _with_all_ways(checks: list[Check], evidence: Evidence) -> list[Check]:
    """Turns failing checks of a defence's own gradient into warnings where all other ways through it were tried."""
    if evidence.defence is None or evidence.omitted_ways:
        return checks
    text = "all ways were tried, so that the number is an upper bound found by other means"
    return [
        replace(check, status="warn", measurement=f"{check.measurement}; {text}")
        if check.name in OF_OWN_GRADIENT and check.status == "fail"
        else check
        for check in checks
    ]


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
