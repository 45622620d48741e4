"""Reads sentences that describe classes, in the files of CuPL, in place of templates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robustclip.data.catalog import plain
from robustclip.textfiles import check_printable, read_text

LISTED = 3  # names in a message


def read_descriptions(path: Path, class_names: Sequence[str], where: str) -> tuple[tuple[str, ...], ...]:
    """Reads the sentences of each class from a JSON file of class name to list of sentences.

    Names are compared without case, apostrophes and differences of blanks. Other classes in the file are ignored.

    Args:
        path: file, as CuPL publishes them (https://github.com/sarahpratt/CuPL).
        class_names: names of the classes.
        where: start of messages, which names the data set.

    Raises:
        ValueError: no such file, other content, or a class without sentences.
    """
    try:
        content: Any = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} has descriptions {str(path)!r} that cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {path} must hold a mapping of class name to list of sentences")
    sentences = {plain(name): texts for name, texts in content.items()}
    if missing := [name for name in class_names if plain(name) not in sentences]:
        names = ", ".join(map(repr, missing[:LISTED]))
        raise ValueError(f"{where}: {path} has no sentences of {len(missing)} classes, such as {names}")
    return tuple(_checked(sentences[plain(name)], f"{where}: class {name!r} in {path}") for name in class_names)


def _checked(texts: Any, where: str) -> tuple[str, ...]:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{where} must have a list of one or more sentences, got {str(texts)[:60]!r}")
    for text in texts:
        check_printable(text, f"{where}: sentence {text[:60]!r}")
    return tuple(texts)
