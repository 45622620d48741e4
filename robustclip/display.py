"""Output to the terminal with rich, which would otherwise interpret brackets in names as markup."""

from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.text import Text

from robustclip.names import plain

Item = TypeVar("Item")


class _PlainConsole(Console):
    """Prints strings unchanged, but without control characters; only `Text` has styles."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Replaces control characters by visible escapes."""
        return super().render_str(plain(text, keep="\n"), **options)

    def on_broken_pipe(self) -> NoReturn:
        """Raises an error, so that the command line sets the exit status; rich would exit with 1."""
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """Makes a console that interprets no markup or emoji and colours no numbers."""
    return _PlainConsole(markup=False, emoji=False, highlight=False, stderr=stderr)


def label(text: object) -> str:
    """Escapes the text of a progress bar, where rich always reads markup."""
    return escape(plain(text))


def progress(items: Iterable[Item], text: object, total: int | None = None) -> Iterable[Item]:
    """Iterates and shows a progress bar on stderr.

    Args:
        items: items to iterate over.
        text: label before the bar.
        total: number of items, if they have no length.
    """
    return track(items, label(text), total=total, console=console(stderr=True))
