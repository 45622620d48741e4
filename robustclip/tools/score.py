"""Computes a result again from the ledgers of its test, without a model."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robustclip.evaluation.sections import SECTIONS
from robustclip.paths import local_path
from robustclip.results.run import RESULT
from robustclip.results.summary import Record, summarise, write_result
from robustclip.textfiles import read_text


def score(folder: Path) -> None:
    """Write ``result.json`` and the tables of a finished test anew, from its ledgers and its ``facts.json``.

    A section that the package does not know keeps its value in the present result.

    Args:
        folder: folder that `robustclip test` wrote.

    Raises:
        ValueError: the folder is no finished test, or an older version wrote it.
    """
    folder = local_path(folder.parent if folder.name == RESULT else folder, "run")
    record = Record.open(folder)
    sections: dict[str, Callable[[Record], Any]] = {}
    for name in record.facts["sections"]:
        sections[name] = SECTIONS[name] if name in SECTIONS else _kept(folder, name)
    write_result(folder, summarise(record, sections))
    sys.stdout.write(f"{folder / RESULT}\n")


def _kept(folder: Path, name: str) -> Callable[[Record], Any]:
    """Returns a function of the section that the present result has."""
    try:
        result: Mapping[str, Any] = json.loads(read_text(folder / RESULT))
        value = result[name]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} has a section {name!r} of the user, and no {RESULT} that holds it: {error}"
        ) from error
    return lambda record: value
