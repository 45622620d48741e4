"""Computes the detection section of a result from the scores of known and unknown samples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from robustclip.metrics import calibration_error, class_accuracy, harmonic_mean, roc, separation
from robustclip.results.protocol import digest
from robustclip.results.summary import Record, Rows
from robustclip.results.tables import DETECTION

JOINT = "@"  # separates a task from a set in the name of a ledger
CLEAN, ATTACKED = "clean", "attacked"
NAMES = "further_names"  # key of the names that scores compare with beside the classes, and their folder
VARIANTS = "variants"  # key of the measures of further columns of scores, such as those of `Neighbours`
CONFIDENCE_BINS = 15  # Guo et al., https://arxiv.org/abs/1706.04599
HISTOGRAM_BINS, ROC_POINTS = 40, 100  # enough for a plot
DIGITS, CURVE_DIGITS = 6, 4  # torchmetrics computes in fp32

Columns = Mapping[str, Tensor]
"""Values ``(N,)`` by name: label, is_right, confidence, scores, ``<score>/attacked`` and ``<score>/<variant>``."""


def table_name(task: str, name: str) -> str:
    """Returns the name of the ledger with the scores of a set; a task's known samples form the set of its name.

    Args:
        task: name of the task with the known classes.
        name: name of the set.
    """
    return f"{task}{JOINT}{name}"


def detected(record: Record) -> dict[str, Any]:
    """Computes the section of a test with `OODDetection`."""
    settings = record.settings(DETECTION)
    tasks = {}
    for task, sets in settings["pairs"].items():
        names = ["label", "is_right", "confidence", *settings["scores"]]
        names += [column(score, ATTACKED) for score in settings["attacked"]]
        names += [
            column(score, variant) for score, several in settings.get(VARIANTS, {}).items() for variant in several
        ]
        tables = {name: record.rows[table_name(task, name)] for name in (task, *sets)}
        tasks[task] = summarise(
            _columns(tables[task], names),
            {name: _columns(tables[name], names) for name in sets},
            settings["scores"],
            drawn=[settings["headline"], *settings["attacked"]],
            is_correct_only=settings["is_correct_only"],
            variants=settings.get(VARIANTS, {}),
        )
        if names := settings.get(NAMES, {}).get(task):
            tasks[task][NAMES] = names
        for name, summary in tasks[task]["unknown"].items():
            summary["data"] = settings["data"][name] | {
                "pixels": _digest(tables[name]) if settings["has_pixels"] else None
            }
    keys = ["headline", "is_correct_only", "attack"]
    keys += ["attacked", "seed"] if settings["attack"] else []
    own = {"scores": settings["own_scores"]} if settings["own_scores"] else {}
    return {**{name: settings[name] for name in keys}, **own, "tasks": tasks}


def column(score: str, kind: str) -> str:
    """Returns the name of the column of a score.

    Args:
        score: name of the score.
        kind: ``clean``, ``attacked``, or the name of a variant.
    """
    return score if kind == CLEAN else f"{score}/{kind}"


def summarise(
    known: Columns,
    unknown: Mapping[str, Columns],
    scores: Sequence[str],
    *,
    drawn: Sequence[str],
    is_correct_only: bool,
    variants: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Computes the part of the section about a known task.

    Args:
        known: columns of all samples of the task.
        unknown: columns of the unknown sets, by their names.
        scores: names of the compared scores.
        drawn: scores with a histogram and a ROC curve.
        is_correct_only: leave samples that are misclassified without attack out of the comparison of scores.
        variants: names of the variants of scores, by the name of the score.
    """
    is_correct = known["is_right"].bool()
    accuracy = class_accuracy(known["label"].long(), is_correct)
    ece = calibration_error(known["confidence"], is_correct, CONFIDENCE_BINS)
    positives = {name: values[is_correct] for name, values in known.items()} if is_correct_only else known
    sets = {}
    for name, columns in unknown.items():
        numbers = {score: _compared(positives, columns, score, accuracy, is_drawn=score in drawn) for score in scores}
        sets[name] = {"n": len(columns["label"]), "scores": numbers}
        if variants:
            sets[name][VARIANTS] = {score: _varied(positives, columns, score, variants[score]) for score in variants}
    return {"n": len(is_correct), "class_accuracy": _number(accuracy), "ece": _number(ece), "unknown": sets}


def scalars(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a known task by the paths for logging."""
    numbers = {name: summary[name] for name in ("class_accuracy", "ece")}
    for name, part in summary["unknown"].items():
        numbers[f"{name}/n"] = part["n"]
        for score, values in part["scores"].items():
            plain = {key: value for key, value in values.items() if key not in (ATTACKED, "histogram", "roc")}
            attacked = {f"{ATTACKED}/{key}": value for key, value in values.get(ATTACKED, {}).items()}
            numbers |= {f"{name}/{score}/{key}": value for key, value in (plain | attacked).items()}
    return {name: math.nan if value is None else float(value) for name, value in numbers.items()}


def _columns(rows: Rows, names: Sequence[str]) -> Columns:
    return {name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64) for name in names}


def _digest(rows: Rows) -> str:
    """Hashes ids and pixels of a set, in any order."""
    total = sum(int(digest([int(row["id"]), row["pixels"]]), 16) for row in rows)
    return f"{total % 2**64:016x}"


def _compared(known: Columns, unknown: Columns, score: str, accuracy: Tensor, *, is_drawn: bool) -> dict[str, Any]:
    kinds = [kind for kind in (CLEAN, ATTACKED) if column(score, kind) in known]
    sides = {kind: (known[column(score, kind)], unknown[column(score, kind)]) for kind in kinds}
    measured = {kind: separation(*pair) for kind, pair in sides.items()}
    measured[CLEAN]["h"] = harmonic_mean(accuracy, measured[CLEAN]["auroc"])
    numbers = {kind: {name: _number(value) for name, value in values.items()} for kind, values in measured.items()}
    result: dict[str, Any] = {**numbers.pop(CLEAN), **numbers}
    if is_drawn and all(values["auroc"].isfinite() for values in measured.values()):
        result["histogram"] = _histogram(sides)
        result["roc"] = {kind: _curve(*pair) for kind, pair in sides.items()}
    return result


def _varied(known: Columns, unknown: Columns, score: str, variants: Sequence[str]) -> dict[str, list[Any]]:
    """Computes AUROC and FPR95 of every variant of a score."""
    names = [column(score, variant) for variant in variants]
    measured = [separation(known[name], unknown[name]) for name in names]
    return {"names": list(variants)} | {
        name: [_number(values[name]) for values in measured] for name in ("auroc", "fpr95")
    }


def _histogram(sides: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Counts known and unknown samples in shared bins of even width."""
    low, high = torch.cat([values for pair in sides.values() for values in pair]).aminmax()
    limits = [float(low), float(high) if high > low else float(low) + 1]
    counts = {
        kind: {
            side: torch.histc(values, HISTOGRAM_BINS, *limits).long().tolist()
            for side, values in zip(("known", "unknown"), pair, strict=True)
        }
        for kind, pair in sides.items()
    }
    return {"range": limits, **counts}


def _curve(known: Tensor, unknown: Tensor) -> dict[str, list[float]]:
    shares = zip(("unknown", "known"), roc(known, unknown, ROC_POINTS), strict=True)
    return {side: [round(value, CURVE_DIGITS) for value in values.tolist()] for side, values in shares}


def _number(value: Tensor) -> float | None:
    return round(float(value), DIGITS) if value.isfinite() else None  # JSON has no nan
