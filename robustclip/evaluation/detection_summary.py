"""The detection section of a result, from the scores of known and unknown samples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from robustclip.metrics import calibration_error, class_accuracy, harmonic_mean, roc, separation
from robustclip.objectives.scores import KNN
from robustclip.results.protocol import digest
from robustclip.results.summary import Record, Rows
from robustclip.results.tables import DETECTION

JOINT = "@"  # between a task and a set in the name of a ledger of scores
CLEAN, ATTACKED = "clean", "attacked"
NEIGHBOURS = "neighbours"  # of an unknown set: the curve of the KNN score
CONFIDENCE_BINS = 15  # Guo et al., https://arxiv.org/abs/1706.04599
HISTOGRAM_BINS, ROC_POINTS = 40, 100  # enough for a picture
DIGITS, CURVE_DIGITS = 6, 4  # torchmetrics computes in fp32

Columns = Mapping[str, Tensor]
"""A value per sample ``(N,)``: label, is_right, confidence, every score, and where they are ``<score>/attacked`` and
``knn/<K>``."""


def table_name(task: str, name: str) -> str:
    """Name of the ledger with the scores of a set of images; the known samples of a task form the set of its name.

    Args:
        task: whose classes are known.
        name: of the set.
    """
    return f"{task}{JOINT}{name}"


def detected(record: Record) -> dict[str, Any]:
    """The section of a test with `OODDetection`."""
    given = record.settings(DETECTION)
    tasks = {}
    for task, sets in given["pairs"].items():
        names = ["label", "is_right", "confidence", *given["scores"]]
        names += [column(score, ATTACKED) for score in given["attacked"]]
        names += [column(KNN, str(k)) for k in given["curve"]]
        tables = {name: record.rows[table_name(task, name)] for name in (task, *sets)}
        tasks[task] = summarise(
            _columns(tables[task], names),
            {name: _columns(tables[name], names) for name in sets},
            given["scores"],
            drawn=[given["headline"], *given["attacked"]],
            is_correct_only=given["is_correct_only"],
            neighbours=given["curve"],
        )
        for name, found in tasks[task]["unknown"].items():
            found["data"] = given["data"][name] | {"pixels": _digest(tables[name]) if given["has_pixels"] else None}
    told = ["headline", "is_correct_only", "attack", *([KNN] if given[KNN] else [])]
    told += ["attacked", "seed"] if given["attack"] else []
    own = {"scores": given["own_scores"]} if given["own_scores"] else {}
    return {**{name: given[name] for name in told}, **own, "tasks": tasks}


def column(score: str, kind: str) -> str:
    """Name of the column of a score.

    Args:
        score: its name.
        kind: ``clean``, ``attacked``, or K of the KNN score.
    """
    return score if kind == CLEAN else f"{score}/{kind}"


def summarise(
    known: Columns,
    unknown: Mapping[str, Columns],
    scores: Sequence[str],
    *,
    drawn: Sequence[str],
    is_correct_only: bool,
    neighbours: Sequence[int] = (),
) -> dict[str, Any]:
    """Compute the part of the section about a known task.

    Args:
        known: of all its samples.
        unknown: by the name of the set.
        scores: to be compared.
        drawn: scores whose histograms and ROC curves are kept.
        is_correct_only: samples that are wrong when clean count in accuracy and calibration alone.
        neighbours: every K of the curve of the KNN score.
    """
    is_right = known["is_right"].bool()
    accuracy = class_accuracy(known["label"].long(), is_right)
    ece = calibration_error(known["confidence"], is_right, CONFIDENCE_BINS)
    positives = {name: values[is_right] for name, values in known.items()} if is_correct_only else known
    sets = {}
    for name, columns in unknown.items():
        found = {score: _compared(positives, columns, score, accuracy, is_drawn=score in drawn) for score in scores}
        sets[name] = {"n": len(columns["label"]), "scores": found}
        if neighbours:
            sets[name][NEIGHBOURS] = _over_neighbours(positives, columns, neighbours)
    return {"n": len(is_right), "class_accuracy": _number(accuracy), "ece": _number(ece), "unknown": sets}


def scalars(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a `summarise`, by the path to be logged under."""
    found = {name: summary[name] for name in ("class_accuracy", "ece")}
    for name, each in summary["unknown"].items():
        found[f"{name}/n"] = each["n"]
        for score, values in each["scores"].items():
            plain = {key: value for key, value in values.items() if key not in (ATTACKED, "histogram", "roc")}
            attacked = {f"{ATTACKED}/{key}": value for key, value in values.get(ATTACKED, {}).items()}
            found |= {f"{name}/{score}/{key}": value for key, value in (plain | attacked).items()}
    return {name: math.nan if value is None else float(value) for name, value in found.items()}


def _columns(rows: Rows, names: Sequence[str]) -> Columns:
    return {name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64) for name in names}


def _digest(rows: Rows) -> str:
    """Hash of ids and pixels of a set, in any order."""
    total = sum(int(digest([int(row["id"]), row["pixels"]]), 16) for row in rows)
    return f"{total % 2**64:016x}"


def _compared(known: Columns, unknown: Columns, score: str, accuracy: Tensor, *, is_drawn: bool) -> dict[str, Any]:
    kinds = [kind for kind in (CLEAN, ATTACKED) if column(score, kind) in known]
    sides = {kind: (known[column(score, kind)], unknown[column(score, kind)]) for kind in kinds}
    measured = {kind: separation(*pair) for kind, pair in sides.items()}
    measured[CLEAN]["h"] = harmonic_mean(accuracy, measured[CLEAN]["auroc"])
    numbers = {kind: {name: _number(value) for name, value in found.items()} for kind, found in measured.items()}
    found: dict[str, Any] = {**numbers.pop(CLEAN), **numbers}
    if is_drawn and all(values["auroc"].isfinite() for values in measured.values()):
        found["histogram"] = _histogram(sides)
        found["roc"] = {kind: _curve(*pair) for kind, pair in sides.items()}
    return found


def _over_neighbours(known: Columns, unknown: Columns, neighbours: Sequence[int]) -> dict[str, list[Any]]:
    """AUROC and FPR95 of the KNN score for every K."""
    names = [column(KNN, str(k)) for k in neighbours]
    measured = [separation(known[name], unknown[name]) for name in names]
    return {"k": list(neighbours)} | {name: [_number(found[name]) for found in measured] for name in ("auroc", "fpr95")}


def _histogram(sides: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Counts over shared bins of even width, of known and unknown samples."""
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
