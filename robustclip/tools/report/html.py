"""HTML in strings: what comes from files passes through `escape`, nothing else does."""

import html

from robustclip.names import plain

LEVEL = "95\N{NO-BREAK SPACE}%"
VOID = ("img", "meta")


def escape(value: object) -> str:
    """Any value as text, safe in elements and in quoted attributes."""
    return html.escape(plain(value, keep="\n"), quote=True)


def tag(name: str, /, *content: str, **attributes: str) -> str:
    """An element around HTML.

    Args:
        name: of the element.
        content: HTML; text has passed `escape`.
        attributes: text, escaped here; ``class_`` is ``class`` and ``aria_label`` is ``aria-label``. An empty
            string gives an attribute without a value.
    """
    words = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        words.append(f'{attribute}="{escape(value)}"' if value else attribute)
    return f"<{' '.join(words)}>" + ("" if name in VOID else f"{''.join(content)}</{name}>\n")


def disclosure(summary: str, *content: str, is_open: bool = False) -> str:
    """A part that opens at a click; ``summary`` and ``content`` are HTML."""
    opened = {"open": ""} if is_open else {}
    return tag("details", tag("summary", summary), *content, **opened)


def figure(picture: str, caption: str) -> str:
    """A picture and its caption, both HTML."""
    return tag("figure", picture, tag("figcaption", caption))
