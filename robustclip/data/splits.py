"""Draws fixed random choices of samples and classes: hold-outs, subsets, few shots, known classes."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Generator
from torch.utils.data import Dataset

from robustclip.data.sources.source import Joined, labels_of
from robustclip.types import UNKNOWN

T = TypeVar("T")
SPLIT_SEED = 0  # a constant, not the seed of the run, so that all runs share hold-outs and subsets

ShotsRule = Literal["balanced", "official"]


class Shots(NamedTuple):
    """The number and the choice of training samples per class.

    Attributes:
        number: samples per class. Each of ``D`` joined sets gives ``number // D``; a class that has fewer gives all.
        seed: seed of the choice.
        rule: ``balanced``; or ``official``, CRoFT's code (https://github.com/LinLLLL/CRoFT), which on PACS draws for
            each class from all classes: as many samples per set, but not per class, and some of them twice.
    """

    number: int
    seed: int = 0
    rule: ShotsRule = "balanced"


def hold_out(dataset: Dataset[Any], share: float) -> tuple[list[int], list[int]]:
    """Splits off a share of every known class for validation.

    Args:
        dataset: labelled images; a set without labels counts as one class.
        share: share of each class in (0, 1).

    Returns:
        Positions to train on and positions to validate on, both sorted.

    Raises:
        ValueError: the share or the set is so small that nothing would be held out.
    """
    size = len(dataset)  # type: ignore[arg-type]
    by_class: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels_of(dataset) or [0] * size):
        by_class[label].append(position)
    by_class.pop(UNKNOWN, None)
    generator = Generator().manual_seed(SPLIT_SEED)
    held: set[int] = set()
    for label in sorted(by_class):
        held.update(_drawn(by_class[label], round(share * len(by_class[label])), generator))
    if not held:
        raise ValueError(f"holdout {share} of {size} samples in {len(by_class)} classes is empty; raise it or set 0")
    return [position for position in range(size) if position not in held], sorted(held)


def choose(dataset: Dataset[Any], positions: Sequence[int] | None, count: int | None) -> list[int] | None:
    """Draws a fixed random subset of positions, sorted; None stands for all positions.

    Args:
        dataset: all samples.
        positions: positions to choose from; None for all.
        count: size of the subset; None for all.
    """
    if positions is None and count is None:
        return None
    candidates = list(range(len(dataset)) if positions is None else positions)  # type: ignore[arg-type]
    if count is None or count >= len(candidates):
        return candidates
    return sorted(_drawn(candidates, count, Generator().manual_seed(SPLIT_SEED)))


def few_shots(dataset: Dataset[Any], positions: Sequence[int] | None, shots: Shots) -> list[int]:
    """Draws a few samples of every class, sorted, and equally many from each of several joined sets.

    Args:
        dataset: data set that gives its labels without decoding.
        positions: positions to choose from; None for all.
        shots: number and choice of the samples.

    Raises:
        ValueError: the set has no labels or images of unknown classes, or there are fewer shots than joined sets.
    """
    labels = labels_of(dataset)
    if labels is None or UNKNOWN in labels:
        raise ValueError("shots need the class of every training image, and some are unknown; set `shots` to null")
    domains = dataset.domains if isinstance(dataset, Joined) else [0] * len(labels)
    share = shots.number // (max(domains) + 1)
    if share < 1:
        raise ValueError(f"shots must be at least 1 for each of {max(domains) + 1} training sets, got {shots.number}")
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position in range(len(labels)) if positions is None else positions:
        groups[domains[position], labels[position]].append(position)
    if shots.rule == "official":
        groups = {
            (domain, label): [position for other, group in groups.items() if other[0] == domain for position in group]
            for domain, label in groups
        }
    generator = Generator().manual_seed(shots.seed)
    return sorted(position for key in sorted(groups) for position in _drawn(groups[key], share, generator))


def draw_known(keys: Sequence[str], number: int, seed: int) -> list[int]:
    """Draws classes at random and returns their labels, rising; the choice does not depend on the order of the keys.

    Args:
        keys: distinct keys of the classes, such as WordNet ids. ImageNet's names are not distinct.
        number: number of classes to draw.
        seed: seed of the choice.

    Raises:
        ValueError: two keys are equal, or there are too few classes.
    """
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(
            f"classes are drawn by distinct keys, but {twice!r} is twice; give the `name` of the catalogue"
        )
    if not 1 <= number <= len(keys):
        raise ValueError(f"`known` must be in [1, {len(keys)}], the number of classes, got {number}")
    chosen = set(_drawn(sorted(keys), number, Generator().manual_seed(seed)))
    return [label for label, key in enumerate(keys) if key in chosen]


def _drawn(candidates: Sequence[T], count: int, generator: Generator) -> list[T]:
    order = torch.randperm(len(candidates), generator=generator).tolist()
    return [candidates[number] for number in order[:count]]
