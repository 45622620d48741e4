"""Selects a part of a data set's classes and images, by ranges of labels or by the category shift of a benchmark."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from robustclip.data.splits import draw_known
from robustclip.types import UNKNOWN, Task

RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def parse_ranges(text: str, count: int) -> list[int]:
    """Parses ranges of labels such as ``0-14,25-27``, both ends included.

    Args:
        text: rising ranges that do not overlap.
        count: number of labels.

    Raises:
        ValueError: the text is malformed, or a label is too large.
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
    """Writes rising labels as the shortest text of ranges."""
    if not labels:
        return "none"
    gaps = [(before, after) for before, after in pairwise(labels) if after != before + 1]
    starts, ends = [labels[0], *(after for _, after in gaps)], [*(before for before, _ in gaps), labels[-1]]
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def narrowed(task: Task, labels: Sequence[int]) -> Task:
    """Reduces a task to some of its labels.

    Args:
        task: task of all labels.
        labels: labels to keep; their order gives the new numbers.
    """
    if task.groups is None:
        return _of_names(task, labels)
    groups = [task.groups[label] for label in labels]
    members = sorted({member for group in groups for member in group})
    numbers = {member: number for number, member in enumerate(members)}
    of_members = tuple(tuple(numbers[member] for member in group) for group in groups)
    return replace(_of_names(task, members), groups=of_members)


def _of_names(task: Task, places: Sequence[int]) -> Task:
    """Keeps the class names at some places, without groups."""
    names = tuple(task.class_names[place] for place in places)
    sentences = None if task.descriptions is None else tuple(task.descriptions[place] for place in places)
    return replace(task, class_names=names, groups=None, descriptions=sentences)


Role = Literal["train", "test", "unknown"]
Shift = Literal["closed", "partial", "open", "open_partial"]


@dataclass(frozen=True)
class Benchmark:
    """The classes of a category-shift benchmark.

    Args:
        count: number of classes.
        known: number of known classes, which are the first.
        images: ranges of the classes that have training images, by shift.
    """

    count: int
    known: int
    images: Mapping[Shift, str]


def _by_rule(count: int, known: int) -> Benchmark:
    """Applies the proportions of Office-Home to any other set."""
    kept, added = max(1, known * 7 // 10), (count - known) * 2 // 3
    extra = f",{known}-{known + added - 1}" if added else ""
    closed, partial = f"0-{known - 1}", f"0-{kept - 1}"
    images: dict[Shift, str] = {"closed": closed, "partial": partial}
    return Benchmark(count, known, images | {"open": closed + extra, "open_partial": partial + extra})


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
"""Closed-set, partial-set, open-set and open-partial shift in UEO's code (https://github.com/tim-learn/UEO)."""


def benchmark(name: str, count: int, known: int | None) -> Benchmark:
    """Returns the benchmark whose name begins the name of a data set, or derives one from the number of known classes.

    A derived benchmark has the proportions of Office-Home: partial sets keep the first 70 % of the known classes, open
    sets add the first two thirds of the unknown classes, both rounded down.

    Args:
        name: name of the data set.
        count: number of its classes.
        known: number of known classes, which are the first; None uses the table.

    Raises:
        ValueError: no benchmark has such a name and ``known`` is None, or ``known`` exceeds the number of classes.
    """
    names = [key for key in BENCHMARKS if name == key or name.startswith(f"{key}_")]
    entry = BENCHMARKS[max(names, key=len)] if names else None
    if entry and entry.count == count and known in (None, entry.known):
        return entry
    if known is None:
        known_names = ", ".join(f"{key} ({entry.count} classes)" for key, entry in BENCHMARKS.items())
        raise ValueError(f"set {name!r} of {count} classes needs `known`, or the `name` of a benchmark: {known_names}")
    if not 1 <= known <= count:
        raise ValueError(f"`known` of {name!r} must be in [1, {count}], the number of its classes, got {known}")
    return _by_rule(count, known)


@dataclass(frozen=True)
class Part:
    """A selection of the classes and images of a data set.

    Args:
        classes: rising labels of the classes that are kept; empty for a set of unknown classes.
        images: labels of the images that are kept.
        description: text for the protocol of a result.
    """

    classes: tuple[int, ...]
    images: tuple[int, ...]
    description: str

    @property
    def new_labels(self) -> dict[int, int]:
        """New label by old label."""
        numbers = {label: number for number, label in enumerate(self.classes)}
        return {label: numbers.get(label, UNKNOWN) for label in self.images}


def part_by_shift(shift: Shift, classes: Benchmark, role: Role) -> Part:
    """Selects a part of a benchmark; the shift changes only the images of the training set.

    Args:
        shift: category shift.
        classes: classes of the benchmark.
        role: use of the images.
    """
    images = classes.images[shift] if role == "train" else None
    return part_by_ranges(f"0-{classes.known - 1}", images, classes.count, role)


def part_by_ranges(classes: str | None, images: str | None, count: int, role: Role) -> Part:
    """Selects a part of a set by ranges of labels.

    Args:
        classes: labels of the known classes; None for all.
        images: labels of the images; None for those of ``classes``, or all others in a set of unknown classes.
        count: number of labels.
        role: use of the images.

    Raises:
        ValueError: a range is malformed, or a set of unknown classes would have images of known ones.
    """
    known = range(count) if classes is None else parse_ranges(classes, count)
    if role != "unknown":
        return _part(known, known if images is None else parse_ranges(images, count), count)
    excluded = set() if classes is None else set(known)
    kept = [label for label in range(count) if label not in excluded] if images is None else parse_ranges(images, count)
    if both := sorted(excluded & set(kept)):
        raise ValueError(f"a set of unknown classes cannot have images of its `classes`, got {format_ranges(both)}")
    return _part((), kept, count)


def part_by_seed(keys: Sequence[str], known: int, seed: int, role: Role) -> Part:
    """Selects classes that are drawn at random and their images, or the images of all others.

    Args:
        keys: distinct keys of all classes.
        known: number of classes that are drawn as known.
        seed: seed of the draw.
        role: use of the images.

    Raises:
        ValueError: as `draw_known`.
    """
    drawn = draw_known(keys, known, seed)
    origin = f"of {len(keys)} classes, of which seed {seed} drew {known} as known"
    if role == "unknown":
        others = tuple(label for label in range(len(keys)) if label not in set(drawn))
        return Part((), others, f"images of the unknown {origin}")
    return Part(tuple(drawn), tuple(drawn), f"the known {origin}")


def _part(classes: Sequence[int], images: Sequence[int], count: int) -> Part:
    kept = f"images of classes {format_ranges(images)} of {count}"
    if not classes:
        return Part((), tuple(images), f"{kept} as unknown")
    text = f"classes {format_ranges(classes)} of {count}"
    return Part(tuple(classes), tuple(images), text if tuple(classes) == tuple(images) else f"{text}, {kept}")
