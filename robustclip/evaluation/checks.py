"""One question to a run and its answer."""

from dataclasses import dataclass
from typing import Literal

from robustclip.intervals import wilson

Status = Literal["pass", "not_measured", "warn", "fail"]
GRADES: dict[Status, str] = {"pass": "A", "not_measured": "B", "warn": "C", "fail": "F"}


@dataclass(frozen=True)
class Check:
    """One question to a run.

    Attributes:
        name: of the question.
        status: answer.
        found: what was measured.
        why: what a bad answer would mean.
    """

    name: str
    status: Status
    found: str
    why: str


def graded(name: str, share: float, limits: tuple[float, float], found: str, why: str) -> Check:
    """Grades a share by the limits of warning and of failure."""
    status: Status = "fail" if share > limits[1] else "warn" if share > limits[0] else "pass"
    return Check(name, status, found, why)


def counted(name: str, count: int, total: int, limits: tuple[float, float], what: str, why: str) -> Check:
    """Grades ``count`` of ``total`` by the least share that they speak for."""
    if not total:
        return Check(name, "not_measured", f"0 of 0 {what}", why)
    return graded(name, wilson(count, total)[0], limits, f"{count:,} of {total:,} {what}", why)
