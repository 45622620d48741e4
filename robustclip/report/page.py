"""Renders the page and its Markdown version from the blocks of all sections."""

from collections.abc import Mapping, Sequence

from robustclip.arguments import class_at
from robustclip.names import markdown as escape
from robustclip.report.accuracy import Accuracy, summary, warning_lines
from robustclip.report.blocks import Block, Cell, Table, Text, tables_of
from robustclip.report.corrupted import Corrupted
from robustclip.report.defended import Defended
from robustclip.report.feature_geometry import Geometry
from robustclip.report.gallery import Images
from robustclip.report.misclassified import Misclassified
from robustclip.report.plots import Interpolation, TradeOff
from robustclip.report.section import Section
from robustclip.report.templating import environment
from robustclip.report.trust import Audit, Protocol, Runs
from robustclip.report.unknown_classes import UnknownClasses
from robustclip.report.view import View

SECTIONS: tuple[type[Section], ...] = (
    TradeOff,
    Accuracy,
    Defended,
    Corrupted,
    Misclassified,
    Images,
    Interpolation,
    UnknownClasses,
    Geometry,
    Audit,
    Protocol,
    Runs,
)
SUMMARY = "Summary"
Content = Mapping[str, Sequence[Block]]


def content(views: Sequence[View], class_paths: Sequence[str] = ()) -> Content:
    """Collects the blocks by the title of their section, without empty sections.

    Args:
        views: runs of the report.
        class_paths: further sections, placed before the audit.

    Raises:
        ValueError: a class path names no section.
    """
    own = [class_at(path, Section, "sections") for path in class_paths]
    place = SECTIONS.index(Audit)
    sections = [*SECTIONS[:place], *own, *SECTIONS[place:]]
    filled = {SUMMARY: summary(views), **{section.title: section().blocks(views) for section in sections}}
    return {title: blocks for title, blocks in filled.items() if blocks}


def html(views: Sequence[View], content: Content) -> str:
    """Renders the whole page; equal runs give equal bytes.

    Args:
        views: runs of the report.
        content: blocks of every section, from `content`.
    """
    title = f"Robustness of {', '.join(view.name for view in views)}"
    anchors = {name: name.lower().replace(" ", "-") for name in content}
    return environment().get_template("page.html.j2").render(title=title, content=content, anchors=anchors)


def markdown(views: Sequence[View], content: Content) -> str:
    """Renders summary, warnings and all tables that are not folded away, as Markdown.

    Args:
        views: runs of the report.
        content: blocks of every section, from `content`.
    """
    texts = [block.text for block in content[SUMMARY] if isinstance(block, Text)]
    parts = ["# Robustness report\n", *(f"{escape(line)}\n" for line in [*texts, *warning_lines(views)])]
    for blocks in content.values():
        parts += [f"## {escape(table.caption)}\n\n{_rows(table)}" for table in tables_of(blocks)]
    return "\n".join(parts)


def _rows(table: Table) -> str:
    lines = [[escape(name) for name in (table.corner, *table.columns)], ["---", *["--:"] * len(table.columns)]]
    lines += [[escape(name), *map(_cell, cells)] for name, cells in table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(cell: Cell) -> str:
    number = f"**{escape(cell.text)}** ▲" if cell.is_best else escape(cell.text)
    return f"{number} ({escape(cell.note)})" if cell.note else number
