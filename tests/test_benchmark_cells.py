"""Cells of the benchmarks: bits of correct images keep means and paired differences, and a file of them is resumed."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from robustclip.intervals import mean_difference, mean_interval


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("cells")


def correct(*answers: int) -> dict[str, bool]:
    return {f"image {number}": bool(answer) for number, answer in enumerate(answers)}


def model(cells: ModuleType, name: str, **sets: dict[str, bool]):  # type: ignore[no-untyped-def]
    answers = {task: cells.Answers.of(of) for task, of in sets.items()}
    return cells.Cell(name, 0, "1e-3", {"1e-3": 0.5}, {"clean": answers}, {"shifts": ["b"]}, {"auroc": 0.9}, "A", "abc")


def test_means_intervals_and_differences_are_those_of_the_counts(cells: ModuleType) -> None:
    ours = model(cells, "Ours", a=correct(0, 1, 1, 1), b=correct(1, 1, 0, 0, 0))
    theirs = model(cells, "Theirs", a=correct(0, 0, 1, 0), b=correct(0, 1, 1, 1, 0))
    assert ours.mean("clean") == (3 / 4 + 2 / 5) / 2
    assert ours.mean("shifts") == 2 / 5
    assert cells.interval([ours], "clean") == list(mean_interval([(3, 4), (2, 5)], images=["a", "b"]))
    assert cells.difference([(ours, theirs)], "clean") == list(
        mean_difference([(2, 0, 4), (1, 2, 5)], images=["a", "b"])
    )
    assert cells.difference([(ours, theirs)], "cascade") is None


def test_a_file_gives_its_last_cell_of_a_method_and_seed(cells: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    first = model(cells, "TeCoA", a=correct(0, 0, 0), b=correct(1))
    later, other = model(cells, "TeCoA", a=correct(0, 0, 1), b=correct(1)), replace(first, seed=1)
    kept = cells.Cells(path)
    for cell in (first, other, later):
        kept.add(cell)
    for file in (kept, cells.Cells(path)):
        assert file.get("TeCoA", 0) == later
        assert file.get("TeCoA", 1) == other
        assert file.get("TeCoA", 2) is None


def test_models_tested_on_different_images_are_not_compared(cells: ModuleType) -> None:
    ours, theirs = model(cells, "Ours", a=correct(1, 1)), model(cells, "Theirs", a=correct(1, 1, 1))
    with pytest.raises(SystemExit, match="different images"):
        cells.difference([(replace(ours, averages={}), replace(theirs, averages={}))], "clean")
