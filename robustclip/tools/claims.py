"""``robustclip claims`` prints what papers claim about a method, beside what was measured here, and checks a run."""

import csv
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table

from robustclip import display
from robustclip.data.catalog import named, plain
from robustclip.results.run import Run

MEAN = "mean of "  # start of the name of an average over several sets
BACKBONES = {"ViT-B-32": "ViT-B/32", "ViT-B-16": "ViT-B/16", "ViT-L-14": "ViT-L/14"}  # open_clip's name to the papers'
DIFFERENCES = (
    "Measured here: photographs by a small model at 96 px, one epoch on 4,599 images, attacked at 0.5/255; or drawn"
    " shapes by the shapes model, attacked at 5/255. Papers: OpenAI's CLIP at 224 px, full training sets, 1/255 and"
    " more. Only the order of methods can be compared, not the numbers."
)


Row = TypeVar("Row")


@dataclass(frozen=True)
class Claim:
    """A figure that a paper, a README or a re-run by others prints; nothing of it was measured here.

    Attributes:
        method: name in the source.
        set: name of the data set, or of an average.
        metric: ``clean``, or the attack.
        value: accuracy in percent.
        backbone: model that was trained or tested.
        trained: training set and attack.
        eps: radius of the attack in L-infinity.
        source: place where the figure stands.
    """

    method: str
    set: str
    metric: str
    value: str
    backbone: str
    trained: str
    eps: str
    source: str


@dataclass(frozen=True)
class Measured(Claim):
    """A figure that was measured with this package.

    Attributes:
        images: number of images.
        seed: seed of the training.
        commit: commit of this package.
    """

    images: str
    seed: str
    commit: str


def claims(method: str = "", /, *, check: Path | None = None) -> None:
    """Prints what papers claim about a method, under which protocol, beside what was measured here.

    Claims of different sources stand together, also where they contradict each other. With ``--check``, every claim
    whose set and attack a run has measured is compared with the run's interval.

    Args:
        method: name of a method, such as TeCoA; empty for all.
        check: folder that ``robustclip test`` wrote, of a model that was trained by the method.

    Raises:
        ValueError: there is no figure for such a method, or a run is given without a method of a paper.
    """
    everything = read("claims.csv", Claim)
    chosen = [claim for claim in everything if not method or is_same(claim.method, method)]
    measured = [row for row in read("measured.csv", Measured) if not method or is_same(row.method, method)]
    if not chosen and (check is not None or not measured):
        names = ", ".join(dict.fromkeys(claim.method for claim in everything))
        raise ValueError(f"method: there are no claims about {method!r}; there are some about {names}")
    if check is not None:
        if not method:
            raise ValueError("check: give the method whose claims the run is compared with")
        display.console().print(_checked(chosen, Run.open(check).result))
        return
    conditions = list(dict.fromkeys(map(_conditions, chosen)))
    display.console().print(_table(chosen, conditions) if chosen else f"no claims of papers about {method} are listed")
    for number, condition in enumerate(conditions, 1):
        sys.stdout.write(f"[{number}] {condition}\n")
    if measured:
        display.console().print(_measured_table(measured))
        sys.stdout.write(f"{DIFFERENCES}\n")


def _conditions(claim: Claim) -> str:
    """Describes the training, the model and the source of a claim."""
    return f"{claim.backbone}; training: {claim.trained}; {claim.source}"


def read(name: str, kind: Callable[..., Row]) -> list[Row]:
    """Reads a table of the package.

    Args:
        name: name of the file.
        kind: class of the rows, with the columns of the file.
    """
    text = resources.files("robustclip.data").joinpath("assets", name).read_text(encoding="utf-8")
    return [kind(**row) for row in csv.DictReader(io.StringIO(text))]


def is_same(name: str, other: str) -> bool:
    """Compares names of methods: ``PMGAFT`` is ``PMG-AFT``.

    Args:
        name: name of a method.
        other: another spelling, such as the name of its class.
    """
    return plain(name).replace(" ", "") == plain(other).replace(" ", "")


def _group(claim: Claim) -> tuple[str, ...]:
    """Returns all fields of a claim that are equal for the sets of one table of its source."""
    is_mean = claim.set.startswith(MEAN)
    return (claim.method, claim.metric, claim.eps, _conditions(claim), claim.set * is_mean)


def _table(claims: Sequence[Claim], conditions: Sequence[str]) -> Table:
    """Makes a table with one row per method, attack and source: the mean over the sets and their range."""
    table = Table(title="claims of papers, accuracy in percent; not measured here", box=SIMPLE_HEAD)
    for title in ("method", "attack", "eps", "sets"):
        table.add_column(title, overflow="fold")
    for title in ("mean", "range", "source"):
        table.add_column(title, justify="right", no_wrap=True)
    for _, group in groupby(sorted(claims, key=_group), key=_group):
        rows = list(group)
        first, values = rows[0], [float(row.value) for row in rows]
        sets = first.set if len(rows) == 1 else f"{len(rows)} sets"
        spread = "" if len(rows) == 1 else f"{min(values):.1f}-{max(values):.1f}"
        mean, number = f"{sum(values) / len(values):.2f}", f"[{1 + conditions.index(_conditions(first))}]"
        table.add_row(first.method, first.metric, first.eps, sets, mean, spread, number)
    return table


def _measured_table(rows: Sequence[Measured]) -> Table:
    table = Table(title="measured with this package, accuracy in percent", box=SIMPLE_HEAD)
    for title in ("method", "attack", "eps", "sets", "trained on"):
        table.add_column(title, overflow="fold")
    for title in ("value", "images", "seed"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.method, row.metric, row.eps, row.set, row.trained, row.value, row.images, row.seed)
    places = {f"{row.backbone}, commit {row.commit}, benchmarks/README.md: {row.source}" for row in rows}
    table.caption = "; ".join(sorted(places))
    return table


class Comparison(NamedTuple):
    """A claim beside the same measurement of a run.

    Attributes:
        claim: figure of a source.
        measured: accuracy of the run in percent.
        interval: 95 % interval of the run in percent.
        images: number of images of the run.
        differences: other conditions of the run, beside set, attack and radius.
    """

    claim: Claim
    measured: float
    interval: tuple[float, float]
    images: int
    differences: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """States whether the claim lies in the run's interval; runs under other conditions decide nothing."""
        if self.differences:
            return f"not comparable: {'; '.join(self.differences)}"
        return "confirmed" if self.interval[0] <= float(self.claim.value) <= self.interval[1] else "not confirmed"


def comparisons(claims: Sequence[Claim], result: Mapping[str, Any]) -> Iterator[Comparison]:
    """Yields the claims whose set, attack and radius a run has measured.

    Args:
        claims: claims about one method.
        result: content of ``result.json``.
    """
    for claim in claims:
        entry = named(claim.set.lower()) or named(claim.set.lower().replace("-", ""))
        values = result["tasks"].get(entry.name if entry else "", {})
        for kind, accuracy in values.items():
            if not isinstance(accuracy, dict) or "interval" not in accuracy or entry is None:
                continue
            axes = result["protocol"][entry.name][kind]["axes"]
            if _attack(kind, axes) == (claim.metric, _radius(claim.eps)):
                low, high = accuracy["interval"]
                interval = (100 * low, 100 * high)
                differences = tuple(_differences(claim, values["n"], entry.images, result))
                yield Comparison(claim, 100 * accuracy["acc1"], interval, values["n"], differences)


def _attack(kind: str, axes: Mapping[str, Any]) -> tuple[str, float | None]:
    """Names a run's attack as the papers do, such as ``PGD-100``, with its radius."""
    if kind == "clean":
        return "clean", 0.0
    norm, _, eps = str(axes.get("eps")).partition(" ")
    members = axes.get("steps") or {}
    radius = float(eps) if norm == "linf" and eps else None
    if len(members) == 1:
        (settings,) = members.values()
        word = {"ce": "PGD", "margin": "CW"}.get(axes.get("loss", ""), "") if settings.get("attack") == "PGD" else ""
        return f"{word}-{settings.get('steps')}", radius
    attacks = sorted(settings.get("attack", "") for settings in members.values())
    return "AutoAttack" if {"Square", "FAB"} <= {*attacks} or attacks.count("APGD") >= 2 else "", radius


def _radius(eps: str) -> float | None:
    """Converts a radius of the table, such as ``1/255``; None if the source does not state it."""
    try:
        return float(Fraction(eps))
    except ValueError:
        return None


def _differences(claim: Claim, images: int, all_images: int, result: Mapping[str, Any]) -> Iterator[str]:
    """Yields the conditions in which a run differs from a claim."""
    arch = str(result["model"].get("arch"))
    backbone = next((title for name, title in BACKBONES.items() if arch.startswith(name)), arch)
    if not claim.backbone.startswith(backbone):
        yield f"model {backbone} against {claim.backbone}"
    if images < all_images:
        yield f"{images:,} of {all_images:,} images"


def _checked(claims: Sequence[Claim], result: Mapping[str, Any]) -> Table:
    """Makes the table of `comparisons`.

    Raises:
        ValueError: the run has measured none of the claims.
    """
    table = Table(title=f"claims about {claims[0].method} against a run, accuracy in percent", box=SIMPLE_HEAD)
    for title in ("set", "attack", "eps"):
        table.add_column(title)
    for title in ("claimed", "measured", "interval"):
        table.add_column(title, justify="right")
    table.add_column("verdict", overflow="fold")
    for comparison in comparisons(claims, result):
        claim, interval = comparison.claim, "{:.1f}-{:.1f}".format(*comparison.interval)
        numbers = claim.value, f"{comparison.measured:.2f}", interval
        table.add_row(claim.set, claim.metric, claim.eps, *numbers, comparison.verdict)
    if not table.rows:
        metrics = ", ".join(sorted({f"{claim.metric} at {claim.eps}" for claim in claims}))
        raise ValueError(f"check: the run has no set and attack of a claim; claims are about {metrics}")
    return table
