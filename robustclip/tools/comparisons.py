"""What a comparison of two tests found, and how it is shown."""

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from robustclip.intervals import Difference

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """One task under one attack, on the samples that both runs have.

    Args:
        task: its name.
        attack: its name, or ``clean``.
        n: pairs.
        a: accuracy of run A in [0, 1].
        b: the same of B.
        difference: B minus A, with its interval.
        only_a: samples right in A alone.
        only_b: samples right in B alone.
        p: of McNemar's test.
        adjusted: Holm's, over all rows of the comparison.
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
        """At 5 %, after the adjustment."""
        return self.adjusted <= ALPHA


@dataclass(frozen=True)
class Mean:
    """Unweighted mean of one attack over all compared tasks or some of them; other meanings as in `Comparison`."""

    name: str
    attack: str
    a: float
    b: float
    difference: Difference


@dataclass(frozen=True)
class Comparisons:
    """What `pair` found.

    Args:
        rows: per task and attack, in the order of run A.
        means: per attack, of the averages that both runs have taken over the same tasks, and of all tasks.
        notes: sentences on what was not compared, or only in part.
    """

    rows: list[Comparison]
    means: list[Mean]
    notes: list[str]


def shown(found: Comparisons) -> Table:
    """The comparison as a table, in percent and points."""
    title = f"top-1 accuracy in percent\n* B differs from A at {ALPHA:.0%} (Holm, {len(found.rows)} tests)"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("task", "attack"):
        table.add_column(name, overflow="fold")
    for name in ("n", "A", "B", "B - A\n95 % interval", "right only\nA / B", "p  \nHolm's p  "):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        cells = (str(row.n), _percent(row.a), _percent(row.b), _points(row.difference))
        p = f"{row.p:.1g}  \n{row.adjusted:.1g} {'*' if row.is_significant else ' '}"
        table.add_row(row.task, row.attack, *cells, f"{row.only_a} / {row.only_b}", p)
    table.add_section()
    for mean in found.means:
        table.add_row(mean.name, mean.attack, "", _percent(mean.a), _percent(mean.b), _points(mean.difference))
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(difference: Difference) -> str:
    return "{:+.1f}\n{:+.1f} to {:+.1f}".format(*(100 * value for value in difference))
