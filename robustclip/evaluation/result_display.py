"""Prints a result to the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustclip import display
from robustclip.results.tables import open_checks, rich_corruptions, rich_detection, rich_table


def print_result(result: Mapping[str, Any], folder: Path) -> None:
    """Prints the tables of a result, the checks that did not pass and, last, its folder.

    Args:
        result: content of ``result.json``.
        folder: folder of the test.
    """
    console = display.console()
    console.print(rich_table(result))
    for table in rich_corruptions(result):
        console.print(table)
    if (detected := rich_detection(result)) is not None:
        console.print(detected)
    for check in open_checks(result):
        console.print(f"{check['status']:>12}  {check['name']}: {check['found']}")
    console.print(f"Table, ledgers and protocol are in\n{folder}", soft_wrap=True)
