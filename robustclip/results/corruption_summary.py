"""Computes the errors of a test on corrupted copies of its sets, and the mean corruption error."""

from collections import Counter
from collections.abc import Mapping, Sequence
from operator import mul
from statistics import fmean
from typing import Any

from robustclip.intervals import clustered_interval
from robustclip.results.corruption_error import (
    ALEXNET,
    CATEGORIES,
    CORRUPTIONS,
    TASKS,
    UNLIKE,
    Summary,
    errors_of,
    mean_corruption_error,
)
from robustclip.results.run import baseline_of
from robustclip.results.summary import Record, Rows
from robustclip.results.tables import CLEAN


def copies(protocol: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Collects the corrupted copies of every test set.

    Args:
        protocol: axes by task and attack, ``clean`` among the attacks.

    Returns:
        By the name of the set, the axis ``corruption`` of its copies by the names of their tasks.
    """
    axes = {task: attacks[CLEAN].get("corruption") for task, attacks in protocol.items()}
    of_sets: dict[str, dict[str, Mapping[str, Any]]] = {}
    for task, axis in axes.items():
        if axis is not None:
            of_sets.setdefault(axis["of"], {})[task] = axis
    return of_sets


def corrupted(record: Record) -> dict[str, Any]:
    """Computes the section of a test with corrupted copies.

    Every set has the names of its ``tasks`` and, per attack and ``clean``: ``kinds`` with ``errors`` by severity and
    ``error``, their mean; ``categories`` and ``error``, the means over kinds, with its ``interval``; ``uncorrupted``,
    the error on the set itself, None if it was not tested. ``relative_to`` has, by the name of a reference, ``mce`` and
    ``relative_mce`` of `mean_corruption_error`: the run of ``results.baseline``, with the reason ``unlike`` if it did
    not measure alike, and ``alexnet``, for all published images of ImageNet-C.
    """
    facts, section = record.facts, dict[str, Any]()
    baseline = baseline_of(facts)
    for name, tasks in copies(facts["protocol"]).items():
        kinds = [CLEAN, *facts["members"][next(iter(tasks))]]
        section[name] = {TASKS: [*tasks]} | {kind: _summary(record, name, tasks, kind) for kind in kinds}
        for kind in kinds:
            references: dict[str, Summary | str] = {}
            if baseline is not None:
                ours = {CORRUPTIONS: section, "protocol": record.protocol}
                references["baseline"] = errors_of(baseline.result, ours, name, kind)
            if name == "imagenet" and kind == CLEAN and _is_published(tasks):
                references["alexnet"] = ALEXNET
            section[name][kind]["relative_to"] = {
                title: {"mce": None, "relative_mce": None, UNLIKE: reference}
                if isinstance(reference, str)
                else mean_corruption_error(section[name][kind], reference)
                for title, reference in references.items()
            }
    return section


def _summary(record: Record, name: str, tasks: Mapping[str, Mapping[str, Any]], attack: str) -> dict[str, Any]:
    outcomes = {task: _errors(record.rows[task], attack) for task in tasks}
    kinds: dict[str, dict[str, Any]] = {}
    for task, axis in tasks.items():
        kinds.setdefault(axis["kind"], {"errors": {}})["errors"][str(axis["severity"])] = _share(outcomes[task])
    for values in kinds.values():
        values["error"] = fmean(values["errors"].values())
    groups = {category: [kind for kind in members if kind in kinds] for category, members in CATEGORIES.items()}
    return {
        "error": fmean(values["error"] for values in kinds.values()),
        "interval": _interval(record, tasks, outcomes),
        "uncorrupted": _share(_errors(record.rows[name], attack)) if name in record.rows else None,
        "categories": {
            category: fmean(kinds[kind]["error"] for kind in members) for category, members in groups.items() if members
        },
        "kinds": kinds,
    }


def _interval(record: Record, tasks: Mapping[str, Any], outcomes: Mapping[str, Sequence[bool]]) -> list[float] | None:
    """Returns the interval of the mean error, images being drawn; None if the copies show different images."""
    first, *others = ([(row["id"], row["label"]) for row in record.rows[task]] for task in tasks)
    if any(other != first for other in others):
        return None
    severities = Counter(axis["kind"] for axis in tasks.values())
    weights = [1 / severities[axis["kind"]] / len(severities) for axis in tasks.values()]
    images = zip(*outcomes.values(), strict=True)
    return list(clustered_interval([min(1.0, sum(map(mul, weights, of_image))) for of_image in images]))


def _errors(rows: Rows, attack: str) -> list[bool]:
    if attack == CLEAN:
        return [row["clean"] != row["label"] for row in rows]
    return [bool(row[f"{attack}.by"]) for row in rows]


def _share(errors: Sequence[bool]) -> float:
    return fmean(errors) if errors else float("nan")


def _is_published(tasks: Mapping[str, Mapping[str, Any]]) -> bool:
    """Checks for all published images of all kinds and severities."""
    cells = {(axis["kind"], axis["severity"]) for axis in tasks.values() if axis["constants"] == "published files"}
    return len(cells) == 5 * len(ALEXNET["kinds"])
