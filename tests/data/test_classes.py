"""Ranges of labels, the task that they leave, and the category shifts of the benchmarks."""

import pytest

from robustclip.data.task_parts import (
    Role,
    Shift,
    benchmark,
    format_ranges,
    narrowed,
    parse_ranges,
    part_by_ranges,
    part_by_shift,
)
from robustclip.types import UNKNOWN, Task

SHIFTS: tuple[Shift, ...] = ("closed", "partial", "open", "open_partial")

# Of UEO's code: classes, known classes, and ends of the ranges of training images under the four shifts.
TABLE = {
    "office": (31, 25, [[(0, 24)], [(0, 19)], [(0, 27)], [(0, 14), (25, 27)]]),
    "office_home": (65, 50, [[(0, 49)], [(0, 34)], [(0, 59)], [(0, 34), (50, 59)]]),
    "visda": (12, 8, [[(0, 7)], [(0, 5)], [(0, 9)], [(0, 5), (8, 9)]]),
    "domainnet": (345, 300, [[(0, 299)], [(0, 249)], [(0, 329)], [(0, 249), (300, 329)]]),
}


def labels(ends: list[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(label for first, last in ends for label in range(first, last + 1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-2", [0, 1, 2]), ("4", [4]), ("0-1,3", [0, 1, 3]), ("0, 2-3", [0, 2, 3]), ("0-9", list(range(10)))],
)
def test_ranges_hold_both_their_ends(text: str, expected: list[int]) -> None:
    assert parse_ranges(text, 10) == expected


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-10", "-1", "0-3,2-5", "4,4", "5,0", "1-2-3", "0-2,"])
def test_malformed_ranges_are_reported_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^label ranges must rise within 0-9, as `0-14,25-27` does, got '") as error:
        parse_ranges(text, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["0", "0-4", "1,3-4", "0-1,5,7-9"])
def test_ranges_are_written_in_one_way(text: str) -> None:
    assert format_ranges(parse_ranges(text, 10)) == text
    assert format_ranges(parse_ranges("0-1,2,3-4", 10)) == "0-4"


def test_a_narrowed_task_keeps_names_in_their_new_places() -> None:
    assert narrowed(Task("set", ("a", "b", "c"), ("{}!",)), [0, 2]) == Task("set", ("a", "c"), ("{}!",))


def test_narrowed_labels_of_several_names_keep_these() -> None:
    task = Task("set", ("a", "b", "c", "d"), groups=((3,), (0, 1), (2,)))
    assert narrowed(task, [0, 1]) == Task("set", ("a", "b", "d"), groups=((2,), (0, 1)))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", TABLE)
def test_every_benchmark_has_the_class_sets_of_every_shift(name: str, shift: Shift) -> None:
    count, known, images = TABLE[name]
    found = benchmark(f"{name}_first_domain", count, None)
    train, test, unknown = (part_by_shift(shift, found, role) for role in ("train", "test", "unknown"))
    assert train.classes == test.classes == test.images == tuple(range(known))
    assert train.images == labels(images[SHIFTS.index(shift)])
    assert unknown.images == tuple(range(known, count))  # also those that training never shows
    assert set(train.new_labels.values()) == {*train.images} - {*range(known, count)} | (
        {UNKNOWN} if "open" in shift else set()
    )


@pytest.mark.parametrize(
    ("shift", "images"),
    [("closed", "0-9"), ("partial", "0-6"), ("open", "0-13"), ("open_partial", "0-6,10-13")],
)
def test_any_other_set_is_shifted_by_rule(shift: Shift, images: str) -> None:
    part = part_by_shift(shift, benchmark("any", 16, 10), "train")  # 7 of 10 known, 4 of 6 unknown
    assert (format_ranges(part.classes), format_ranges(part.images)) == ("0-9", images)


def test_the_rule_is_that_of_office_home() -> None:
    rule, table = benchmark("any", 65, 50), benchmark("office_home_art", 65, None)
    for shift in SHIFTS:
        assert part_by_shift(shift, rule, "train") == part_by_shift(shift, table, "train")


@pytest.mark.parametrize(
    ("name", "count", "known", "words"),
    [
        ("any", 16, None, "set 'any' of 16 classes needs `known`, or the `name` of a benchmark: office .31 classes."),
        ("office_home_art", 64, None, "set 'office_home_art' of 64 classes needs `known`"),
        ("any", 16, 17, r"`known` of 'any' must be in \[1, 16\], the number of its classes, got 17"),
    ],
)
def test_a_set_without_known_classes_is_refused(name: str, count: int, known: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        benchmark(name, count, known)


@pytest.mark.parametrize(
    ("classes", "images", "role", "expected"),
    [
        ("1-2", None, "test", {1: 0, 2: 1}),
        ("1-2", "2-3", "train", {2: 1, 3: UNKNOWN}),
        (None, "3", "train", {3: 3}),
        ("1-2", None, "unknown", {0: UNKNOWN, 3: UNKNOWN}),
        (None, "0", "unknown", {0: UNKNOWN}),
        (None, None, "unknown", dict.fromkeys(range(4), UNKNOWN)),
    ],
)
def test_ranges_say_which_images_get_which_labels(
    classes: str | None, images: str | None, role: Role, expected: dict[int, int]
) -> None:
    assert part_by_ranges(classes, images, 4, role).new_labels == expected


def test_unknown_images_of_known_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="a set of unknown classes cannot have images of its `classes`, got 2"):
        part_by_ranges("0-2", "2-3", 4, "unknown")
