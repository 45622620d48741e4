"""The terminal: the only place that prints names with rich, which takes brackets for markup."""

from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.text import Text

from robustclip.names import plain

Item = TypeVar("Item")


class _PlainConsole(Console):
    """Prints strings as they are, without control characters; styles are given by `Text` alone."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Makes control characters visible."""
        return super().render_str(plain(text, keep="\n"), **options)

    def on_broken_pipe(self) -> NoReturn:
        """Leaves the exit status to the command line; rich would exit with 1."""
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """Makes a console that takes nothing in a string for markup, emoji or numbers to colour."""
    return _PlainConsole(markup=False, emoji=False, highlight=False, stderr=stderr)


def label(text: object) -> str:
    """Escapes the text of a progress bar, where rich always reads markup."""
    return escape(plain(text))


def progress(items: Iterable[Item], text: object, total: int | None = None) -> Iterable[Item]:
    """Iterates under a progress bar on stderr.

    Args:
        items: what to iterate over.
        text: stands before the bar.
        total: number of items, where they have no length.
    """
    return track(items, label(text), total=total, console=console(stderr=True))
