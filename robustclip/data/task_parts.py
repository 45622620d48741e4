"""Parts of a class list: ranges of labels, and the category shifts of benchmarks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from robustclip.data.splits import draw_known
from robustclip.types import UNKNOWN, Task

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


Role = Literal["train", "test", "unknown"]
Shift = Literal["closed", "partial", "open", "open_partial"]


@dataclass(frozen=True)
class Benchmark:
    """Classes of a benchmark: how many, how many of the first are known, and which have training images."""

    count: int
    known: int
    images: Mapping[Shift, str]


def _by_rule(count: int, known: int) -> Benchmark:
    """The proportions of Office-Home for any other set."""
    kept, added = max(1, known * 7 // 10), (count - known) * 2 // 3
    extra = f",{known}-{known + added - 1}" if added else ""
    images: dict[Shift, str] = {"closed": f"0-{known - 1}", "partial": f"0-{kept - 1}"}
    return Benchmark(
        count, known, images | {"open": images["closed"] + extra, "open_partial": images["partial"] + extra}
    )


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "office": Benchmark(
            31, 25, {"closed": "0-24", "partial": "0-19", "open": "0-27", "open_partial": "0-14,25-27"}
        ),
        "office_home": Benchmark(
            65, 50, {"closed": "0-49", "partial": "0-34", "open": "0-59", "open_partial": "0-34,50-59"}
        ),
        "visda": Benchmark(12, 8, {"closed": "0-7", "partial": "0-5", "open": "0-9", "open_partial": "0-5,8-9"}),
        "domainnet": Benchmark(
            345, 300, {"closed": "0-299", "partial": "0-249", "open": "0-329", "open_partial": "0-249,300-329"}
        ),
    }
)
"""Closed-set, partial-set, open-set and open-partial shift as of UEO's code (https://github.com/tim-learn/UEO)."""


def benchmark(name: str, count: int, known: int | None) -> Benchmark:
    """The benchmark whose name a data set's name begins with, or, with another number of known classes, one by rule.

    Partial sets keep the first 70 % of the known classes; open sets add the first two thirds of the unknown ones; both
    are rounded down.

    Args:
        name: of the data set.
        count: of its classes.
        known: how many of the first classes are known; None asks the table.

    Raises:
        ValueError: neither is given, or more known classes than there are.
    """
    names = [key for key in BENCHMARKS if name == key or name.startswith(f"{key}_")]
    found = BENCHMARKS[max(names, key=len)] if names else None
    if found and found.count == count and known in (None, found.known):
        return found
    if known is None:
        known_names = ", ".join(f"{key} ({each.count} classes)" for key, each in BENCHMARKS.items())
        raise ValueError(f"set {name!r} of {count} classes needs `known`, or the `name` of a benchmark: {known_names}")
    if not 1 <= known <= count:
        raise ValueError(f"`known` of {name!r} must be in [1, {count}], the number of its classes, got {known}")
    return _by_rule(count, known)


@dataclass(frozen=True)
class Part:
    """A part of a data set.

    Args:
        classes: labels of the class list, which rise; none for a set of unknown classes.
        images: labels of the images.
        words: for the protocol of a result.
    """

    classes: tuple[int, ...]
    images: tuple[int, ...]
    words: str

    @property
    def new_labels(self) -> dict[int, int]:
        """By old label."""
        numbers = {label: number for number, label in enumerate(self.classes)}
        return {label: numbers.get(label, UNKNOWN) for label in self.images}


def part_by_shift(shift: Shift, found: Benchmark, role: Role) -> Part:
    """The part of a benchmark under a shift: the known classes are fixed, only training images change."""
    known = range(found.known)
    if role == "unknown":
        return _part((), range(found.known, found.count), found.count)
    return _part(known, parse_ranges(found.images[shift], found.count) if role == "train" else known, found.count)


def part_by_ranges(classes: str | None, images: str | None, count: int, role: Role) -> Part:
    """The part of a set within ranges; without images, those of the classes, or of all others in a set of unknown ones.

    Raises:
        ValueError: malformed ranges, or known classes in a set of unknown ones.
    """
    known = range(count) if classes is None else parse_ranges(classes, count)
    if role != "unknown":
        return _part(known, known if images is None else parse_ranges(images, count), count)
    given = set() if classes is None else set(known)
    kept = [label for label in range(count) if label not in given] if images is None else parse_ranges(images, count)
    if both := sorted(given & set(kept)):
        raise ValueError(f"a set of unknown classes cannot have images of its `classes`, got {format_ranges(both)}")
    return _part((), kept, count)


def part_by_seed(keys: Sequence[str], known: int, seed: int, role: Role) -> Part:
    """Known classes drawn by their keys, and their images; or the images of all others.

    Raises:
        ValueError: as `draw_known`.
    """
    drawn = draw_known(keys, known, seed)
    all_gather_rows = f"of {len(keys)} classes, of which seed {seed} drew {known} as known"
    if role == "unknown":
        rest = tuple(label for label in range(len(keys)) if label not in set(drawn))
        return Part((), rest, f"images of the unknown {all_gather_rows}")
    return Part(tuple(drawn), tuple(drawn), f"the known {all_gather_rows}")


def _part(classes: Sequence[int], images: Sequence[int], count: int) -> Part:
    kept = f"images of classes {format_ranges(images)} of {count}"
    if not classes:
        return Part((), tuple(images), f"{kept} as unknown")
    words = f"classes {format_ranges(classes)} of {count}"
    return Part(tuple(classes), tuple(images), words if tuple(classes) == tuple(images) else f"{words}, {kept}")
