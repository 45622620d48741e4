"""Names that come from files and folders, made safe for the places where they are shown."""

import html
import re

# Control characters, line separators, changes of the writing direction, and bytes of a name that is no UTF-8.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters that spreadsheets take for a formula


def plain(text: object, *, keep: str = "") -> str:
    r"""Writes control characters as their escapes: ``\x1b`` in place of the start of a terminal's command.

    Args:
        text: any value.
        keep: control characters that stay.
    """
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], str(text))


def csv_cell(name: object) -> str:
    """Marks a name that a spreadsheet would compute as text, by an apostrophe."""
    text = str(name)
    return plain(f"'{text}" if text.startswith(FORMULA) else text)


def markdown(text: object) -> str:
    """Escapes all that Markdown or HTML would take for more than text, on one line."""
    return re.sub(
        r"([\\`*|\[\]])", r"\\\1", html.escape(plain(re.sub(r"[ \t\r\n]+", " ", str(text)).strip()), quote=False)
    )
