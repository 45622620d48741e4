"""The contract of the audit's checks: each grades one property of a finished test from the ledgers' columns."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robustclip.evaluation.evidence import Evidence
from robustclip.intervals import upper_bound, wilson

Status = Literal["pass", "not_measured", "warn", "fail"]
GRADES: dict[Status, str] = {"pass": "A", "not_measured": "B", "warn": "C", "fail": "F"}
ORDER = list(GRADES)  # from the best to the worst

# Probes bound a share by 95 % confidence: 59 without a fault leave 5 %, 29 leave 10 %, 8 leave 31 %.
STRICT, ENOUGH = 0.05, 29


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
      ``of_share(share, limits, measurement)`` from limits of warning and failure, by
      ``of_count(count, total, limits, fault)`` from the lower end of the share's 95 % interval, or by ``of_probes``,
      which passes on enough probes alone.
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

    def worst(self, checks: Sequence[Check], missing: str) -> Check:
        """Returns the worst of several answers.

        Args:
            checks: answers, such as one per attack.
            missing: measurement of the answer ``not_measured`` where there is none.
        """
        return max(checks, key=lambda check: ORDER.index(check.status), default=self.answer("not_measured", missing))

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

    def of_probes(
        self, count: int, total: int, limits: tuple[float, float], fault: str, *, is_complete: bool, weight: float = 1
    ) -> Check:
        """Grades as `of_count` does, but passes only on probes enough to exclude a large share.

        Args:
            count: number of probed cases with the fault.
            total: number of probed cases; 0 is ``not_measured``.
            limits: see `of_share`.
            fault: description of the fault, which follows the two numbers.
            is_complete: whether every case was probed, so that the share is a fact.
            weight: factor from the share of the cases to the share that the limits are meant for.
        """
        if not total:
            return self.answer("not_measured", f"0 of 0 {fault}")
        bound = upper_bound(count, total) * weight
        text = f"{count:,} of {total:,} {fault}"
        text += "" if is_complete else f"; at most {bound:.1%} by 95 % confidence"
        check = self.of_share(wilson(count, total)[0] * weight, limits, text)
        is_enough = is_complete or bound <= STRICT or (count == 0 and total >= ENOUGH)
        return check if is_enough or check.status != "pass" else self.answer("not_measured", text)


class ProbedCheck(AuditCheck):
    """Grades values that probes measured; a subclass sets `columns` and defines `of_values`.

    - ``columns``: columns of the ledger; a sample counts if the first has a number and the others finite ones.
    - ``of_values(*values)``: returns a `Check` from one array ``(n,)`` per column, ``n`` at least 1.
    """

    columns: Sequence[str] = ()

    def grade(self, evidence: Evidence) -> Check:
        """Grades the values; ``not_measured`` where no sample was probed."""
        first, *others = (evidence.clean(column) for column in self.columns)
        probed = np.logical_and.reduce([~np.isnan(first), *map(np.isfinite, others)])
        if not probed.any():
            return self.answer("not_measured", "no sample was probed")
        return self.of_values(*(values[probed] for values in (first, *others)))

    @abstractmethod
    def of_values(self, *values: NDArray[Any]) -> Check:
        """Grades the measured values.

        Args:
            values: ``(n,)`` per column.
        """
