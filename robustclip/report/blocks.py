"""Defines the building blocks of a report: content without layout, each rendered by the macro of its name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from robustclip.report.view import View, percent


class Cell(NamedTuple):
    """One cell of a table.

    Attributes:
        text: main text.
        note: smaller text below.
        is_best: whether the cell is marked as the best run of its row or column.
    """

    text: str
    note: str = ""
    is_best: bool = False


class Entry(NamedTuple):
    """One entry of a legend.

    Attributes:
        style: classes of the style sheet for the sign.
        sign: character of the sign; empty for a patch of colour.
        text: label of the entry.
    """

    style: str
    sign: str
    text: str


class Text(NamedTuple):
    """A paragraph of the page.

    Attributes:
        text: content of the paragraph.
        style: class of the style sheet.
    """

    text: str
    style: str = ""


class Heading(NamedTuple):
    """A heading inside a section."""

    text: str


class Table(NamedTuple):
    """Rows of cells under headings.

    Attributes:
        caption: title of the table.
        corner: heading of the first column.
        columns: headings of the other columns.
        rows: name and cells of every row.
        has_total: whether the last row sums up the others.
    """

    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    has_total: bool = False


class Tables(NamedTuple):
    """Tables side by side where the page is wide enough."""

    parts: Sequence[Table]


class Legend(NamedTuple):
    """Colours and markers with their meaning.

    Attributes:
        name: description for screen readers.
        entries: entries in order.
    """

    name: str
    entries: Sequence[Entry]


class Picture(NamedTuple):
    """A drawing of `svg.draw` with its caption.

    Attributes:
        svg: the drawing.
        caption: text above the drawing.
        entry: legend entry of the run, if the drawing shows only one.
    """

    svg: Markup
    caption: str
    entry: Entry | None = None


class Pictures(NamedTuple):
    """Pictures side by side where the page is wide enough."""

    parts: Sequence[Picture]


class Fold(NamedTuple):
    """Blocks that a click on the summary unfolds.

    Attributes:
        summary: text that is always visible.
        blocks: content that is folded away.
        note: smaller text after the summary.
        warning: warning after the summary.
        is_open: whether the content is visible at first.
    """

    summary: str
    blocks: Sequence["Block"]
    note: str = ""
    warning: str = ""
    is_open: bool = False


class Notice(NamedTuple):
    """A box with lines of text.

    Attributes:
        title: heading of the box.
        text: paragraph before the lines.
        lines: text and smaller addition of every line.
        is_bad: whether the box reports an error.
    """

    title: str
    text: str
    lines: Sequence[tuple[str, str]]
    is_bad: bool = False


class Facts(NamedTuple):
    """A list of names and values."""

    pairs: Mapping[str, str]


class Checks(NamedTuple):
    """All audit checks of a run.

    Attributes:
        entry: legend entry of the run.
        number: number of the run, from 0.
        grade: grade of the audit.
        parts: checks of the result, in order.
    """

    entry: Entry
    number: int
    grade: str
    parts: Sequence[Mapping[str, Any]]


class Axis(NamedTuple):
    """One axis of a protocol.

    Attributes:
        name: name of the axis.
        meaning: explanation of the axis.
        owned_values: owners and value: runs and attacks, and the value that they have.
        is_unlike: whether the runs have different values.
    """

    name: str
    meaning: str
    owned_values: Sequence[tuple[str, str]]
    is_unlike: bool


class Axes(NamedTuple):
    """The protocol of a task.

    Attributes:
        caption: title of the table.
        parts: axes in order.
    """

    caption: str
    parts: Sequence[Axis]


class Shot(NamedTuple):
    """One image of a card.

    Attributes:
        url: data URL of the image.
        title: text below the image.
        prediction: predicted class; empty if nothing was predicted.
        is_correct: whether the prediction is the label.
    """

    url: str
    title: str
    prediction: str = ""
    is_correct: bool = False


class Card(NamedTuple):
    """A clean image, its perturbation and the attacked image.

    Attributes:
        shots: the images in order.
        label: correct class.
        facts: attack, radius and outcome.
    """

    shots: Sequence[Shot]
    label: str
    facts: str


class Cards(NamedTuple):
    """Adversarial examples of one task.

    Attributes:
        title: name of the task.
        parts: cards in order.
    """

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


def table_of_measures(
    caption: str,
    corner: str,
    views: Sequence[View],
    rows: Mapping[str, Sequence[float | None]],
    text: Callable[[float | None], str] = percent,
) -> Table:
    """Builds a table with a column per run, without the rows for which no run has a number.

    Args:
        caption: title of the table.
        corner: heading of the first column.
        views: runs of the report.
        rows: by name, a number per run.
        text: formats a number.
    """
    cells = [
        (name, [Cell(text(value)) for value in values])
        for name, values in rows.items()
        if any(value is not None for value in values)
    ]
    return Table(caption, corner, [view.label for view in views], cells)
