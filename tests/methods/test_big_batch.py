"""A batch in pieces, one after the other or one per process, teaches what the whole batch teaches.

Gradient accumulation and DistributedDataParallel average the pieces' gradients. That is the gradient of the whole
batch where the loss is a mean over samples that do not know each other, where the attack of a sample depends on its
id and the step alone, and where BatchNorm keeps its statistics.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import update_cases as cases
from ranks import in_background
from torch import Tensor

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("update_cases.py")
ROUNDING = 1e-5  # of an update in fp32, relative to its norm: sums over 4 images and over 8 round differently
Fits = dict[str, list[dict[str, Any]]]  # by name of the case, the result of each process
Load = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module", autouse=True)
def no_seed_of_other_tests() -> Iterator[None]:
    """Lightning would start the random numbers of processes that it spawns from the seed that it finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PL_GLOBAL_SEED", raising=False)
        yield


@cache
def whole(name: str) -> dict[str, Any]:
    return cases.fit(name)


@cache
def accumulated(name: str) -> list[dict[str, Any]]:
    return [cases.fit(name, pieces=cases.PIECES)]


def fits_of(folder: Path, processes: int) -> Fits:
    """Every case on some gloo processes, under the plain `ddp` strategy."""
    with in_background(SCRIPT, folder, str(processes)):
        for name in cases.CASES:  # while these are busy
            whole(name)
    ranks = range(processes)
    return {name: [torch.load(folder / f"{name}.{processes}.{rank}.pt") for rank in ranks] for name in cases.CASES}


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    return fits_of(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def by_four(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    return fits_of(tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(params=["accumulated", "distributed", "by_four"])
def in_pieces(request: pytest.FixtureRequest) -> Load:
    """The fit of a case by name, seen in pieces; one result per process."""
    if request.param == "accumulated":
        return accumulated
    fits: Fits = request.getfixturevalue(request.param)
    return fits.__getitem__


@pytest.fixture(params=["distributed", "by_four"])
def on_processes(request: pytest.FixtureRequest) -> Fits:
    fits: Fits = request.getfixturevalue(request.param)
    return fits


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def attacked(results: list[dict[str, Any]]) -> dict[tuple[int, int], Tensor]:
    return {key: image for result in results for key, image in result["attacked"].items()}


@pytest.mark.parametrize("name", cases.DECOMPOSABLE)
def test_micro_batches_give_the_weights_of_the_whole_batch(name: str, in_pieces: Load) -> None:
    results = in_pieces(name)
    assert whole(name)["update"].norm() > 1, "too small to be seen beside the weights, whose norm is 80"
    for result in results:
        assert error(result["update"], whole(name)["update"]) < ROUNDING


@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in cases.IN_TURNS])
def test_every_sample_meets_the_attack_of_its_id_and_step(name: str, in_pieces: Load) -> None:
    keys = attacked(in_pieces(name)).keys()
    assert keys == whole(name)["attacked"].keys()
    assert {step for step, _ in keys} == ({0, 1} if keys else set())
    assert len(keys) in (0, 2 * cases.BATCH)


def test_random_starts_are_bit_for_bit_those_of_the_whole_batch(in_pieces: Load) -> None:
    ours, theirs = attacked(in_pieces("tecoa-start-only")), whole("tecoa-start-only")["attacked"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in cases.OTHER])
def test_any_number_of_processes_gives_the_weights_of_one(name: str, on_processes: Fits) -> None:
    """One configuration of the data, whose global batch is shared out: 1 x 8, 2 x 4 and 4 x 2 images.

    The first step is compared, relative to its own size: at these rates, later ones multiply the rounding.
    """
    expected = whole(name)["update"]
    assert expected.norm() > 0.1, "too little was learnt"
    sizes = {len(piece[1]) for result in on_processes[name] for piece in result["batches"]}
    assert sizes == {cases.BATCH // len(on_processes[name])}
    for result in on_processes[name]:
        assert error(result["update"], expected) < ROUNDING


def test_a_sum_over_the_batch_needs_its_weights_multiplied_by_the_pieces(distributed: Fits) -> None:
    """The mean of n sums over pieces is the n-th part of the sum over all, as in the authors' code on n processes."""
    expected = whole("pmg_aft-sum")["update"]
    for fits in (accumulated, distributed.__getitem__):
        assert error(fits("pmg_aft-sum")[0]["update"], expected) > 0.1
        assert error(fits("pmg_aft-sum-weighted")[0]["update"], expected) < ROUNDING


@pytest.mark.parametrize("name", ["img_coadv", "ueo", "pouf", "dance"])
def test_accumulation_takes_the_mean_of_losses_of_its_pieces(name: str) -> None:
    """A loss of the batch is that of a piece: negatives and marginals of other pieces are not seen."""
    assert error(accumulated(name)[0]["update"], whole(name)["update"]) > 10 * ROUNDING


def test_both_processes_remember_the_features_of_both(distributed: Fits) -> None:
    first, second = (result["bank"] for result in distributed["dance"])
    assert torch.equal(first, second)
    # Features of the second step are of weights that differ by the rounding of the first.
    torch.testing.assert_close(first, whole("dance")["bank"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", cases.IN_TURNS)
def test_a_method_that_learns_in_turns_changes_nothing_else(name: str, on_processes: Fits) -> None:
    for result in on_processes[name]:
        assert result["moved"] + result["stray"] == []


def test_statistics_of_the_batch_would_make_a_difference() -> None:
    """BatchNorm that counts sees smaller batches: why it is fixed by default."""
    one, two = (cases.fit("tecoa", pieces=n, has_fixed_batch_norm=False)["update"] for n in (1, cases.PIECES))
    assert error(two, one) > 0.1


@pytest.mark.parametrize("name", cases.CASES)
def test_both_processes_train_equal_weights_of_declared_parameters_alone(name: str, distributed: Fits) -> None:
    """The teacher and the text tower stay; every declared parameter gets a gradient, or `ddp` would have stopped."""
    first, second = distributed[name]
    assert torch.equal(first["update"], second["update"])
    assert [result["moved"] + result["stray"] for result in (first, second)] == [[], []]
