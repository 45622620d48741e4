"""Two gloo processes count what one process counts, and learn the same weights."""

import json
from pathlib import Path
from typing import Any

import detection_cases
import process_cases
import pytest
import torch
from helpers import ROUNDED, ShardWriter
from ranks import in_background

from robustclip.results.run import Run

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("process_cases.py")
TESTS = ("all", "workers", "limited", "only_single", "only_stream_single")
FITS = ("fit", "fit_stream")
SIZES = {"odd": 7, "single": 1, "stream_odd": 7, "stream_few": 5, "stream_single": 1, "broken": 3}


@pytest.fixture(scope="module")
def folder(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds everything, after the cases ran on two processes and on one."""
    folder = detection_cases.write_all(tmp_path_factory.mktemp("processes"), write_shards)
    write_shards(folder, "odd", "train", [4, 3], seed=1)
    write_shards(folder, "odd", "test", [4, 3])
    write_shards(folder, "few", "test", [5])
    write_shards(folder, "single", "test", [1])
    write_shards(folder, "broken", "test", [5], broken=(1, 2))
    with in_background(SCRIPT, folder, "2"):
        process_cases.main(folder, 1)
    return folder


def results(folder: Path, processes: int, name: str) -> dict[str, Any]:
    """The result without the parts in which equal runs differ: times and device."""
    (path,) = (folder / str(processes) / name).iterdir()
    found = dict(Run.open(path).result)
    for values in found["tasks"].values():
        del values["seconds"]
    return {key: value for key, value in found.items() if key not in ("finished", "device", "geometry")}


@pytest.mark.parametrize("name", TESTS)
def test_two_processes_write_the_ledgers_of_one(folder: Path, name: str) -> None:
    one, two = (Run.open(next((folder / str(number) / name).iterdir())) for number in (1, 2))
    for task in one.result["tasks"]:
        assert len(one.rows(task)) == SIZES[task] or name == "limited"
        for ours, theirs in zip(one.rows(task), two.rows(task), strict=True):
            # The processes' batches differ, and with them the last digits of a loss; no verdict does.
            measured = {column for column in ours if column.endswith(ROUNDED)}
            for column in ours.keys() - measured - {"seconds"}:
                assert ours[column] == theirs[column], column
            for column in measured:
                assert float(theirs[column] or 0) == pytest.approx(float(ours[column] or 0), rel=1e-3, abs=1e-4), column


@pytest.mark.parametrize("name", TESTS)
def test_two_processes_write_the_results_of_one(folder: Path, name: str) -> None:
    assert results(folder, 2, name) == results(folder, 1, name)


@pytest.mark.parametrize("name", TESTS)
def test_two_processes_measure_the_geometry_of_one(folder: Path, name: str) -> None:
    one, two = (Run.open(next((folder / str(number) / name).iterdir())).result for number in (1, 2))
    assert one["geometry"].keys() == one["tasks"].keys()
    for task, values in one["geometry"].items():
        found, is_number = two["geometry"][task], {name: value is not None for name, value in values.items()}
        assert {name: value is not None for name, value in found.items()} == is_number, task
        for name in filter(is_number.get, values):
            # Batches of other sizes change the last digits of fp32; no value is near 0.
            assert found[name] == pytest.approx(values[name], rel=1e-4), (task, name)
        is_alone = one["tasks"][task]["n"] == 1
        assert (values["collapse"] is None) == (values["pearson"] is None) == is_alone


def test_two_processes_detect_unknown_classes_exactly_as_one(folder: Path) -> None:
    one, two = (Run.open(folder / str(number) / detection_cases.NAME).result["detection"] for number in (1, 2))
    assert one == two
    assert {name: found["n"] for name, found in one["tasks"].items()} == {"mixed": 9, "lone_known": 1}
    assert one["scores"]["knn"]["bank"] == 8
    expected = {"mixed_unknown": 6, "lone_unknown": 1}
    assert {name: found["n"] for name, found in one["tasks"]["lone_known"]["unknown"].items()} == expected
    ranks = ("1/detection.0.json", "2/detection.0.json", "2/detection.1.json")
    logged = [json.loads((folder / rank).read_text()) for rank in ranks]
    assert logged[0] == logged[1] == logged[2]
    values = one["tasks"]["mixed"]["unknown"]["mixed_unknown"]["scores"]["energy"]["attacked"]
    for name, value in values.items():
        found = logged[0][f"test/mixed/detection/mixed_unknown/energy/attacked/{name}"]
        assert found == pytest.approx(value, abs=1e-6)  # lightning logs fp32


def test_every_sample_is_counted_once(folder: Path) -> None:
    tasks = results(folder, 2, "all")["tasks"]
    assert {name: values["n"] for name, values in tasks.items()} == SIZES
    assert {name: values["bad_samples"] for name, values in tasks.items()} == dict.fromkeys(SIZES, 0) | {"broken": 2}


def test_a_limit_keeps_that_many_samples_over_all_processes(folder: Path) -> None:
    assert {values["n"] for values in results(folder, 2, "limited")["tasks"].values()} == {3}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_on_two_processes_leaves_equal_weights_on_both(folder: Path, name: str, tiny_model: Path) -> None:
    first, second = (torch.load(folder / "2" / f"{name}.{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = process_cases.method(folder).state_dict()
    assert any(not torch.equal(first[key], start[key]) for key in first), "nothing was learnt"


@pytest.mark.parametrize("name", FITS)
def test_both_ranks_see_the_same_validation(folder: Path, name: str) -> None:
    first, second = (json.loads((folder / "2" / f"{name}.{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["val/single/n"] == 1
