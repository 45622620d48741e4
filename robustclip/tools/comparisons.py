"""Holds the outcome of comparing two tests, and prints it as a table."""

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from robustclip.intervals import Difference

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """One task under one attack, on the samples that both runs have.

    Args:
        task: name of the task.
        attack: name of the attack, or ``clean``.
        n: number of paired samples.
        a: accuracy of run A in [0, 1].
        b: accuracy of run B in [0, 1].
        difference: B minus A, with its interval.
        only_a: number of samples that only A classifies correctly.
        only_b: number of samples that only B classifies correctly.
        p: p-value of McNemar's test.
        adjusted: p-value adjusted by Holm's method over all rows of the comparison.
    """

    task: str
    attack: str
    n: int
    a: float
    b: float
    difference: Difference
    only_a: int
    only_b: int
    p: float
    adjusted: float

    @property
    def is_significant(self) -> bool:
        """Whether the adjusted p-value is at most 5 %."""
        return self.adjusted <= ALPHA


@dataclass(frozen=True)
class Mean:
    """Unweighted mean of one attack over all compared tasks or some of them.

    Args:
        name: name of the mean.
        attack: name of the attack, or ``clean``.
        a: mean accuracy of run A in [0, 1].
        b: mean accuracy of run B in [0, 1].
        difference: B minus A, with its interval.
    """

    name: str
    attack: str
    a: float
    b: float
    difference: Difference


@dataclass(frozen=True)
class Comparisons:
    """Outcome of comparing two runs.

    Args:
        rows: comparisons per task and attack, in the order of run A.
        means: means per attack: averages that both runs take over equal tasks, and the mean of all tasks.
        notes: sentences about parts that were not compared, or only partly.
    """

    rows: list[Comparison]
    means: list[Mean]
    notes: list[str]


def as_table(comparisons: Comparisons) -> Table:
    """Formats the comparison as a table, in percent and percentage points."""
    title = f"top-1 accuracy in percent\n* B differs from A at {ALPHA:.0%} (Holm, {len(comparisons.rows)} tests)"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "attack"):
        table.add_column(name, overflow="fold")
    for name in ("n", "A", "B", "B - A\n95 % interval", "correct only\nin A / B", "p  \nHolm's p  "):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparisons.rows:
        cells = (str(row.n), _percent(row.a), _percent(row.b), _points(row.difference))
        p = f"{row.p:.1g}  \n{row.adjusted:.1g} {'*' if row.is_significant else ' '}"
        table.add_row(row.task, row.attack, *cells, f"{row.only_a} / {row.only_b}", p)
    table.add_section()
    for mean in comparisons.means:
        table.add_row(mean.name, mean.attack, "", _percent(mean.a), _percent(mean.b), _points(mean.difference))
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(difference: Difference) -> str:
    return "{:+.1f}\n{:+.1f} to {:+.1f}".format(*(100 * value for value in difference))
