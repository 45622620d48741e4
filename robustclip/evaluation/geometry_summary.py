"""Computes the geometry section of a result from the stored features of the samples."""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustclip.attacks import noise
from robustclip.evaluation.detection_summary import JOINT
from robustclip.metrics import class_scatter, class_sums, similarity
from robustclip.results.ledger import Tidy
from robustclip.results.summary import Record, Rows, finite

GEOMETRY = "geometry"
CAPTIONED = "captioned"  # key of the numbers of retrieval, which come from no ledger
# Features are cells of a ledger, which survive a kill as its rows do: base64 of little-endian float32, 137 MB for
# 50,000 samples of 512 numbers. The original features are kept for the compared samples alone.
TUNED, ORIGINAL = "tuned", "original"
COLUMNS = ("id", "label", "pixels", TUNED, ORIGINAL)
CHOICE_SEED = 0x9E0  # of the project, not of the run: every run compares the same samples


def features_table(task: str) -> str:
    """Returns the name of the ledger with the features of a task; no task or table of scores can have it."""
    return f"unit-features{JOINT}{task}"


def encoded(features: Tensor) -> list[str]:
    """Encodes features ``(B, D)`` as one cell per sample."""
    return [b64encode(row.tobytes()).decode() for row in features.float().cpu().numpy().astype("<f4")]


def draws_of(index: Tensor) -> Tensor:
    """Draws a number ``(B,)`` per sample id ``(B,)``; the samples of the smallest numbers are compared."""
    return noise.uniform(index.cpu(), (), seed=CHOICE_SEED)


def smallest(draws: Tensor, count: int) -> Tensor:
    """Returns the smallest draws, sorted; equal draws count once, so that no sample is missed.

    Args:
        draws: any number of draws.
        count: largest number of them.
    """
    unequal: Tensor = draws.unique()  # type: ignore[no-untyped-call]
    return unequal[:count]


def compared(rows: Rows, count: int) -> list[int]:
    """Lists the places of the samples whose pairs are compared.

    Args:
        rows: all samples of a task, in the order of the ids.
        count: largest number of places.
    """
    candidates = [place for place, row in enumerate(rows) if row[ORIGINAL]]
    index = torch.tensor([int(rows[place]["id"]) for place in candidates], dtype=torch.long)
    return [candidates[number] for number in draws_of(index).argsort(stable=True)[:count].tolist()]


def without_spare_features(rows: Rows, count: int) -> list[dict[str, str]]:
    """Removes the original features of samples that are not compared, whose number depends on the processes.

    Args:
        rows: all samples of a task, in the order of the ids.
        count: number of compared samples.
    """
    kept = set(compared(rows, count))
    return [{**row, ORIGINAL: row[ORIGINAL] if place in kept else ""} for place, row in enumerate(rows)]


def tidied_tables(names: Iterable[str], settings: Mapping[str, Any]) -> dict[str, Tidy]:
    """Returns the function from all rows to the rows to keep, for every ledger of features.

    Args:
        names: names of all ledgers of a test.
        settings: settings of `FeatureGeometry`.
    """
    tidy = partial(without_spare_features, count=settings["max_samples"])
    return dict.fromkeys((name for name in names if name.startswith(features_table(""))), tidy)


def measured(record: Record) -> dict[str, Any]:
    """Computes the section of a test with `FeatureGeometry`."""
    settings, prefix = record.settings(GEOMETRY), features_table("")
    values = {
        name.removeprefix(prefix): _of_task(rows, settings["max_samples"])
        for name, rows in record.rows.items()
        if name.startswith(prefix)
    }
    captioned: dict[str, Any] = settings[CAPTIONED]
    return values | captioned


def _of_task(rows: Rows, count: int) -> dict[str, float | None]:
    labels, tuned = torch.tensor([int(row["label"]) for row in rows], dtype=torch.long), _decoded(rows, TUNED)
    sums = class_sums(tuned, labels, classes=max(labels.tolist(), default=0) + 1)
    places = compared(rows, count)
    original = _decoded([rows[place] for place in places], ORIGINAL)
    numbers = {"collapse": class_scatter(sums), **similarity(tuned[places], original)}
    return {name: finite(float(value)) for name, value in numbers.items()}


def _decoded(rows: Sequence[Any], column: str) -> Tensor:
    """Decodes a column of features to ``(N, D)``."""
    cells: Iterable[bytes] = (b64decode(row[column]) for row in rows)
    features = np.array([np.frombuffer(cell, "<f4") for cell in cells], np.float32)
    return torch.from_numpy(features.reshape(len(rows), features.shape[-1] or 1))
