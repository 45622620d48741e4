"""Defines the building blocks of a report: content without layout, each rendered by the macro of its name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup


class Cell(NamedTuple):
    """One cell of a table; ``note`` is smaller text below, ``is_best`` marks the best run of its row or column."""

    text: str
    note: str = ""
    is_best: bool = False


class Entry(NamedTuple):
    """One entry of a legend: style and text of its sign (empty for a patch of colour), and its label."""

    style: str
    sign: str
    text: str


class Text(NamedTuple):
    """A paragraph; ``style`` is a class of the style sheet."""

    text: str
    style: str = ""


class Heading(NamedTuple):
    """A heading inside a section."""

    text: str


class Table(NamedTuple):
    """Rows of cells under headings; with ``has_total`` the last row sums up the others."""

    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    has_total: bool = False


class Tables(NamedTuple):
    """Tables side by side where the page is wide enough."""

    parts: Sequence[Table]


class Legend(NamedTuple):
    """Colours and markers with their meaning."""

    name: str
    entries: Sequence[Entry]


class Picture(NamedTuple):
    """A drawing of `svg.draw`, its caption, and the run that it shows if it shows one alone."""

    svg: Markup
    caption: str
    entry: Entry | None = None


class Pictures(NamedTuple):
    """Pictures side by side where the page is wide enough."""

    parts: Sequence[Picture]


class Fold(NamedTuple):
    """Blocks that a click on the summary unfolds."""

    summary: str
    blocks: Sequence["Block"]
    note: str = ""
    warning: str = ""
    is_open: bool = False


class Notice(NamedTuple):
    """A box with lines, each a text and its smaller addition."""

    title: str
    text: str
    lines: Sequence[tuple[str, str]]
    is_bad: bool = False


class Facts(NamedTuple):
    """Names and values."""

    pairs: Mapping[str, str]


class Check(NamedTuple):
    """One audit check and its finding."""

    status: str
    status_text: str
    name: str
    finding: str
    reason: str


class Checks(NamedTuple):
    """The audit of a run."""

    entry: Entry
    number: int
    grade: str
    parts: Sequence[Check]


class Axis(NamedTuple):
    """One axis of a protocol; each value follows the names of the runs and attacks that have it."""

    name: str
    meaning: str
    owned_values: Sequence[tuple[str, str]]
    is_unlike: bool


class Axes(NamedTuple):
    """The protocol of a task."""

    caption: str
    parts: Sequence[Axis]


class Shot(NamedTuple):
    """One image of a card, as a data URL; ``prediction`` is empty where nothing was predicted."""

    url: str
    title: str
    prediction: str = ""
    is_correct: bool = False


class Card(NamedTuple):
    """A clean image, its perturbation and the attacked image."""

    shots: Sequence[Shot]
    label: str
    facts: str


class Cards(NamedTuple):
    """Adversarial examples of one task."""

    title: str
    parts: Sequence[Card]


Block = Text | Heading | Table | Tables | Legend | Pictures | Fold | Notice | Facts | Checks | Axes | Cards


def tables_of(blocks: Sequence[Block]) -> Iterator[Table]:
    """Yields the tables among the blocks that are not folded away."""
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Tables):
            yield from block.parts
