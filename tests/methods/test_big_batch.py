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

from robustclip.data import CLIPDataModule
from robustclip.types import Batch

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


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    """Every case on two gloo processes, under the plain `ddp` strategy."""
    folder = tmp_path_factory.mktemp("distributed")
    with in_background(SCRIPT, folder):
        for name in cases.CASES:  # while the two are busy
            whole(name)
    names = cases.CASES | cases.IN_TURNS
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1)] for name in names}


@pytest.fixture(params=["accumulated", "distributed"])
def in_pieces(request: pytest.FixtureRequest) -> Load:
    """The fit of a case by name, seen in pieces; one result per process."""
    if request.param == "accumulated":
        return accumulated
    fits: Fits = request.getfixturevalue("distributed")
    return fits.__getitem__


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def attacked(results: list[dict[str, Any]]) -> dict[tuple[int, int], Tensor]:
    return {key: image for result in results for key, image in result["attacked"].items()}


@pytest.mark.parametrize("name", cases.DECOMPOSABLE)
def test_pieces_teach_what_the_whole_batch_teaches(name: str, in_pieces: Load) -> None:
    results = in_pieces(name)
    assert whole(name)["update"].norm() > 1, "too small to be seen beside the weights, whose norm is 80"
    for result in results:
        assert error(result["update"], whole(name)["update"]) < ROUNDING


@pytest.mark.parametrize("name", cases.CASES)
def test_every_sample_meets_the_attack_of_its_id_and_step(name: str, in_pieces: Load) -> None:
    keys = attacked(in_pieces(name)).keys()
    assert keys == whole(name)["attacked"].keys()
    assert {step for step, _ in keys} == ({0, 1} if keys else set())
    assert len(keys) in (0, 2 * cases.BATCH)


def test_random_starts_are_bit_for_bit_those_of_the_whole_batch(in_pieces: Load) -> None:
    ours, theirs = attacked(in_pieces("tecoa-start-only")), whole("tecoa-start-only")["attacked"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_sum_over_the_batch_needs_its_weights_multiplied_by_the_pieces(in_pieces: Load) -> None:
    """The mean of n sums over pieces is the n-th part of the sum over all, as in the authors' code on n processes."""
    expected = whole("pmg_aft-sum")["update"]
    assert error(in_pieces("pmg_aft-sum")[0]["update"], expected) > 0.1
    assert error(in_pieces("pmg_aft-sum-weighted")[0]["update"], expected) < ROUNDING


def test_negatives_in_the_batch_are_those_of_the_piece(in_pieces: Load) -> None:
    """ImgCoAdv contrasts a sample with its piece: it learns the mean of what the pieces teach, not the whole."""
    results = in_pieces("img_coadv")
    pieces = [Batch(*parts) for result in results for parts in result["batches"]]
    assert [len(piece.labels) for piece in pieces] == [cases.BATCH // cases.PIECES] * cases.PIECES
    expected = torch.stack([update_of(piece) for piece in pieces]).mean(0)
    assert error(results[0]["update"], expected) < ROUNDING
    assert error(results[0]["update"], whole("img_coadv")["update"]) > 0.1


@pytest.mark.parametrize("name", ["ueo", "pouf", "dance"])
def test_a_loss_of_the_batch_is_that_of_all_processes(name: str, distributed: Fits) -> None:
    """Rows are gathered; accumulation does not, and takes the mean of two losses of half the batch."""
    expected = whole(name)["update"]
    for result in distributed[name]:
        assert error(result["update"], expected) < ROUNDING
    assert error(accumulated(name)[0]["update"], expected) > 10 * ROUNDING


def test_both_processes_remember_the_features_of_both(distributed: Fits) -> None:
    first, second = (result["bank"] for result in distributed["dance"])
    assert torch.equal(first, second)
    # Features of the second step are of weights that differ by the rounding of the first.
    torch.testing.assert_close(first, whole("dance")["bank"], rtol=0, atol=1e-5)


def test_what_learns_in_turns_takes_the_mean_of_the_pieces_each_time(distributed: Fits) -> None:
    """CRoFT: by gradient descent a step of the generator, then, with it, one of the adapters."""
    results = distributed["croft"]
    method: Any = cases.build("croft")
    method.freeze_the_rest()
    data = CLIPDataModule(train="shapes:source")
    data.setup("fit")
    method.prepare_training(data.train_task)
    start = cases.learned(method)
    pieces = [Batch(*result["batches"][0]) for result in results]
    for turn in (0, 1):
        for piece in pieces:
            view = method.view(piece)
            generator, adapters = method.generator_loss(view, piece.labels), method.adapter_loss(view, piece.labels)
            loss = sum(adapters.values()) if turn else generator
            loss.backward(inputs=[method.image_adapter, method.text_adapter] if turn else [method.generator])
        torch.optim.SGD(method.parameters(), lr=50 * cases.RATE / len(pieces)).step()
        method.zero_grad()
    for result in results:
        assert error(result["update"], cases.learned(method) - start) < ROUNDING
        assert result["moved"] + result["stray"] == []


def update_of(piece: Batch) -> Tensor:
    """What one batch alone would teach, by gradient descent."""
    method = cases.build("img_coadv")
    method.freeze_the_rest()
    torch.stack(list(method.training_loss(piece).values())).sum().backward()
    gradients = [p.grad.flatten() for p in method.parameters() if p.requires_grad and p.grad is not None]
    return -cases.RATE * torch.cat(gradients)


def test_statistics_of_the_batch_would_make_a_difference() -> None:
    """BatchNorm that counts sees smaller batches: why it is fixed by default."""
    one, two = (cases.fit("tecoa", pieces=n, has_fixed_batch_norm=False)["update"] for n in (1, cases.PIECES))
    assert error(two, one) > 0.1


@pytest.mark.parametrize("name", cases.CASES)
def test_both_processes_learn_the_same_and_only_what_is_declared(name: str, distributed: Fits) -> None:
    """The teacher and the text tower stay; every declared parameter gets a gradient, or `ddp` would have stopped."""
    first, second = distributed[name]
    assert torch.equal(first["update"], second["update"])
    assert [result["moved"] + result["stray"] for result in (first, second)] == [[], []]
