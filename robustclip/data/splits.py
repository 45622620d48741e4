"""Fixed choices of samples: hold-outs and subsets."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from robustclip.data.sources import labels_of

SPLIT_SEED = 0  # of the project, not of the run: every run shares its hold-out and its subsets


def hold_out(dataset: Dataset[Any], share: float) -> tuple[list[int], list[int]]:
    """Splits off a share of every class: positions to train on, positions to validate on, both sorted.

    Raises:
        ValueError: so small a share or set that nothing would be held out.
    """
    size = len(dataset)  # type: ignore[arg-type]
    by_class: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels_of(dataset) or [0] * size):
        by_class[label].append(position)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    held: set[int] = set()
    for label in sorted(by_class):
        positions = by_class[label]
        order = torch.randperm(len(positions), generator=generator).tolist()
        held |= {positions[number] for number in order[: round(share * len(positions))]}
    if not held:
        raise ValueError(f"holdout {share} of {size} samples in {len(by_class)} classes is empty; raise it or set 0")
    return [position for position in range(size) if position not in held], sorted(held)


def choose(dataset: Dataset[Any], positions: Sequence[int] | None, count: int | None) -> list[int] | None:
    """A fixed random subset of ``count`` positions, sorted; None for everything."""
    if positions is None and count is None:
        return None
    candidates = list(range(len(dataset)) if positions is None else positions)  # type: ignore[arg-type]
    if count is None or count >= len(candidates):
        return candidates
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return sorted(candidates[number] for number in order[:count].tolist())
