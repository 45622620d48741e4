"""Safe display of names that come from files and folders, in terminals, CSV, Markdown and HTML."""

import html
import re
from collections.abc import Sequence

# Control characters, line separators, direction marks, and surrogates, which stand for bytes that are not UTF-8.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TASK_NAME = re.compile(r"[a-z0-9_]+")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters that make spreadsheets compute a formula


def plain(text: object, *, keep: str = "") -> str:
    r"""Replaces control characters by their escapes, such as ``\x1b`` at the start of a terminal command.

    Args:
        text: any value.
        keep: control characters that are not replaced.
    """
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], str(text))


def csv_cell(name: object) -> str:
    """Prefixes a name with an apostrophe if a spreadsheet would compute it as a formula."""
    text = str(name)
    return plain(f"'{text}" if text.startswith(FORMULA) else text)


def markdown(text: object) -> str:
    """Escapes the special characters of Markdown and HTML, on one line."""
    return re.sub(
        r"([\\`*|\[\]])", r"\\\1", html.escape(plain(re.sub(r"[ \t\r\n]+", " ", str(text)).strip()), quote=False)
    )


def excerpt(names: Sequence[str], count: int = 3) -> str:
    """Lists the first names and the number of the others, for a message.

    Args:
        names: names to list.
        count: number of names that are written.
    """
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more
