"""Parts of a class list: ranges of labels, and the task that is left of them."""

import re
from collections.abc import Sequence
from itertools import pairwise

from robustclip.types import Task

RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def parse_ranges(text: str, count: int) -> list[int]:
    """Labels of ranges, ``0-14,25-27``, both ends included.

    Args:
        text: ranges that rise and do not overlap.
        count: labels must be below it.

    Raises:
        ValueError: anything else.
    """
    labels: list[int] = []
    for part in text.split(","):
        match = RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= count or (labels and first <= labels[-1]):
            raise ValueError(f"label ranges must rise within 0-{count - 1}, as `0-14,25-27` does, got {text!r}")
        labels += range(first, last + 1)
    return labels


def format_ranges(labels: Sequence[int]) -> str:
    """The shortest ranges of labels that rise."""
    if not labels:
        return "none"
    starts = [labels[0], *(after for before, after in pairwise(labels) if after != before + 1)]
    ends = [*(before for before, after in pairwise(labels) if after != before + 1), labels[-1]]
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def narrowed(task: Task, labels: Sequence[int]) -> Task:
    """The task of some of the labels, which are renumbered in this order."""
    if task.groups is None:
        return Task(task.name, tuple(task.class_names[label] for label in labels), task.templates)
    groups = [task.groups[label] for label in labels]
    members = sorted({member for group in groups for member in group})
    numbers = {member: number for number, member in enumerate(members)}
    names = tuple(task.class_names[member] for member in members)
    return Task(task.name, names, task.templates, tuple(tuple(numbers[member] for member in group) for group in groups))
