"""Shows the errors on corrupted copies of the test sets, by kind, category and severity."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from robustclip.report.blocks import Block, Table, Tables, Text, table_of_measures
from robustclip.report.section import Section
from robustclip.report.view import CLEAN, View
from robustclip.results.corruption_error import CORRUPTIONS, TASKS, errors_of, mean_corruption_error

RATIOS = {"mCE, relative to the first run": "mce", "relative mCE, relative to the first run": "relative_mce"}
Errors = Sequence[Any]
"""Errors of a test set under one attack per run; empty for a run that did not measure them."""


class Corrupted(Section):
    """Errors under the corruptions of ImageNet-C."""

    title = "Corruptions"

    def blocks(self, views: Sequence[View]) -> list[Block]:
        """Returns tables, or nothing if no run has corrupted copies."""
        names = dict.fromkeys(
            (name, kind)
            for view in views
            for name, section in view.part(CORRUPTIONS).items()
            for kind in section
            if kind != TASKS
        )
        tables = [table for name, kind in names for table in _tables(views, name, kind)]
        text = (
            "Errors are means over severities, and lower is better. The mean corruption error (mCE) is the mean over "
            "kinds of a run's error divided by that of the first run; the relative one subtracts the errors without "
            "corruption first."
        )
        return [Text(text), Tables(tables)] if tables else []


def _tables(views: Sequence[View], name: str, kind: str) -> list[Table]:
    parts: Errors = [view.part(CORRUPTIONS).get(name, {}).get(kind, {}) for view in views]
    kinds = dict.fromkeys(key for part in parts for key in part.get("kinds", {}))
    rows = {key: [part.get("kinds", {}).get(key, {}).get("error") for part in parts] for key in kinds}
    categories = dict.fromkeys(key for part in parts for key in part.get("categories", {}))
    means = {key: [part.get("categories", {}).get(key) for part in parts] for key in categories}
    means |= {"all kinds": [part.get("error") for part in parts]}
    means |= {"without corruption": [part.get("uncorrupted") for part in parts]}
    if len(views) > 1:
        ratios = [_relative(view, views[0], name, kind) for view in views]
        means |= {title: [ratio.get(key) for ratio in ratios] for title, key in RATIOS.items()}
    severities = dict.fromkeys(key for part in parts for of in part.get("kinds", {}).values() for key in of["errors"])
    by_severity = {f"severity {key}": [_at(part, key) for part in parts] for key in severities}
    where = f"{name}{'' if kind == CLEAN else f' under {kind}'}"
    return [
        table_of_measures(f"Error on corrupted copies of {where}, percent", "kind", views, rows),
        table_of_measures(f"Mean errors on corrupted copies of {where}, percent", "mean", views, means | by_severity),
    ]


def _relative(view: View, first: View, name: str, kind: str) -> dict[str, float | None]:
    """Computes the mean corruption errors of a run; empty if the first run did not measure alike."""
    reference = errors_of(first.run.result, view.run.result, name, kind)
    return {} if isinstance(reference, str) else mean_corruption_error(view.part(CORRUPTIONS)[name][kind], reference)


def _at(part: Any, severity: str) -> float | None:
    """Returns the mean error over kinds at a severity."""
    errors = [of["errors"][severity] for of in part.get("kinds", {}).values() if severity in of["errors"]]
    return fmean(errors) if errors else None
