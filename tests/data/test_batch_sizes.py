"""One number of images per optimiser step, shared out over processes; and the last batch of an epoch."""

import logging
import os
import traceback
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ShardWriter, quick_trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn
from ranks import meeting_place

from robustclip.cli.main import run
from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.batch_sizes import BatchSizes, Pieces
from robustclip.methods import TeCoA

SIZE = 8


def test_a_step_is_shared_out_over_processes_and_accumulated_batches() -> None:
    sizes = BatchSizes(None, 256, None)
    assert [sizes.training(Pieces(n)) for n in (1, 2, 8, 64)] == [256, 128, 32, 4]
    assert sizes.training(Pieces(8, 4)) == 8
    assert [sizes.evaluation(Pieces(n)) for n in (1, 3, 512)] == [256, 86, 1]
    assert BatchSizes(None, 256, 50).evaluation(Pieces(8)) == 50
    assert [BatchSizes(None, None, None).training(Pieces(n)) for n in (1, 8)] == [64, 64]
    assert BatchSizes(16, None, None).training(Pieces(8, 2)) == BatchSizes(16, None, None).evaluation(Pieces(8)) == 16


@pytest.mark.parametrize("pieces", [Pieces(3), Pieces(2, 3), Pieces(512)])
def test_a_step_that_is_not_divisible_is_refused(pieces: Pieces) -> None:
    with pytest.raises(ValueError, match=r"data\.global_batch_size is 256.*trainer\.devices.*multiple of") as error:
        BatchSizes(None, 256, None).training(pieces)
    nearest = int(str(error.value).rpartition(" ")[2])
    assert nearest % (pieces.processes * pieces.accumulated) == 0


def test_two_sizes_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test", "--model", "ZeroShot", "--data.test", "[shapes:colours]", "--data.batch_size", "4"]
    assert run([*words, "--data.global_batch_size", "8"]) != 0
    message = capsys.readouterr().err
    assert "data.batch_size is 4" in message
    assert "data.global_batch_size is 8" in message


def module(folder: Path, **options: Any) -> CLIPDataModule:
    defaults = {"global_batch_size": SIZE, "holdout": 0, "image_size": 32, "seed": 3}
    return CLIPDataModule("wds:set", root=str(folder), **{**defaults, **options})


def seen(folder: Path, world_size: int, *, state: dict[str, Any] | None = None, **options: Any) -> list[list[int]]:
    """Sorted ids of each step over all processes, without starting them."""
    parts = []
    for rank in range(world_size):
        data = attached(module(folder, **options), world_size, rank)
        if state is not None:
            data.load_state_dict(state)
        data.setup("fit")
        parts.append([batch.index.tolist() for batch in data.train_dataloader()])
    assert len({len(part) for part in parts}) == 1, "processes must take equally many steps"
    return [sorted(chain(*step)) for step in zip(*parts, strict=True)]


def attached(data: CLIPDataModule, world_size: int, rank: int = 0, callbacks: Sequence[Any] = ()) -> CLIPDataModule:
    """The data module, with what it reads of a trainer of several processes."""
    trainer: Any = SimpleNamespace(
        world_size=world_size, global_rank=rank, accumulate_grad_batches=1, current_epoch=0, callbacks=callbacks,
        limit_train_batches=1.0, state=SimpleNamespace(fn=TrainerFn.FITTING),
    )  # fmt: skip
    data.trainer = trainer
    return data


def test_each_step_has_the_same_images_on_any_number_of_processes(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "set", "train", [20])
    expected = seen(tmp_path, 1)
    assert [len(step) for step in expected] == [8, 8, 4]
    assert seen(tmp_path, 2) == seen(tmp_path, 4) == expected
    assert sorted(chain(*expected)) == list(range(20))


@pytest.mark.parametrize(("count", "steps"), [(20, 2), (16, 2), (23, 2), (9, 1)])
def test_the_last_small_batch_is_dropped_on_all_processes(
    count: int, steps: int, tmp_path: Path, write_shards: ShardWriter
) -> None:
    write_shards(tmp_path, "set", "train", [count])
    expected = seen(tmp_path, 1, drop_last=True)
    assert [len(set(step)) for step in expected] == [SIZE] * steps
    for processes in (2, 4):
        found = seen(tmp_path, processes, drop_last=True)
        assert [len(set(step)) for step in found] == [SIZE] * steps, "no image is repeated"
        assert found == expected
    data = module(tmp_path, drop_last=True, val=["wds:set"])
    data.val_sources = (DataSource("wds:set", split="train"),)
    data.setup("fit")
    assert sum(len(batch.labels) for batch in data.val_dataloader()[0]) == count, "evaluation drops nothing"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_last_batch_of_a_stream_is_dropped_in_each_reader(
    workers: int, tmp_path: Path, write_shards: ShardWriter
) -> None:
    write_shards(tmp_path, "set", "train", [10, 10])
    source = DataSource(f"wds:file://{tmp_path}/set", name="streamed", split="train", length=20)
    data = CLIPDataModule(source, val=["shapes:colours"], batch_size=4, drop_last=True, num_workers=workers)
    data.setup("fit")
    loader = data.train_dataloader()
    sizes = [len(batch.labels) for batch in loader]
    assert sizes == [4] * (5 if workers == 0 else 4)  # 20 in one reader, or 10 in each of two
    assert len(loader) == len(sizes)


def test_a_training_set_that_is_smaller_than_a_batch_is_not_dropped_silently(
    tmp_path: Path, write_shards: ShardWriter
) -> None:
    write_shards(tmp_path, "set", "train", [7])
    with pytest.raises(ValueError, match=r"'set' has 7 samples.*data\.drop_last"):
        module(tmp_path, drop_last=True).setup("fit")


def test_a_batch_that_the_trainer_would_change_is_refused(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "set", "train", [20])
    with pytest.raises(ValueError, match="GradientAccumulationScheduler"):
        attached(module(tmp_path), 1, callbacks=[GradientAccumulationScheduler({0: 1, 2: 4})]).setup("fit")
    with pytest.raises(ValueError, match=r"data\.global_batch_size is 8, which 3 processes"):
        attached(module(tmp_path), 3).setup("fit")
    attached(module(tmp_path), 3).batch_sizes.evaluation(Pieces(3))  # a test needs no divisible training step


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1), (2, 2), (2, 4)])
def test_a_resumed_epoch_goes_through_the_same_images_on_another_number_of_processes(
    before: int, after: int, drop_last: bool, tmp_path: Path, write_shards: ShardWriter,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    write_shards(tmp_path, "set", "train", [28])
    whole = seen(tmp_path, 1, drop_last=drop_last)
    data = attached(module(tmp_path, drop_last=drop_last), before)
    data.setup("fit")
    steps = iter(data.train_dataloader())
    next(steps)
    next(steps)
    with caplog.at_level(logging.WARNING):
        rest = seen(tmp_path, after, state=data.state_dict(), drop_last=drop_last)
    assert rest == whole[2:]
    assert ("are shared by" in caplog.text) == (before != after)


def test_a_resumed_epoch_with_another_step_is_refused(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "set", "train", [28])
    data = attached(module(tmp_path), 1)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match=r"data\.batch_size 8 \(here 8\)|number of processes 1 \(here 2\)"):
        seen(tmp_path, 2, state=data.state_dict(), global_batch_size=16)


def fit(folder: Path, processes: int) -> None:
    """Two epochs of TeCoA; the first rank writes what was learnt."""
    torch.manual_seed(0)
    method = TeCoA(
        pretrained=str(folder / "model"), warmup_steps=0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    )
    trainer = quick_trainer(processes=processes, max_epochs=2, default_root_dir=folder)
    trainer.fit(method, datamodule=module(folder, drop_last=True))
    if trainer.is_global_zero:
        torch.save((method.state_dict(), trainer.global_step), folder / f"{processes}.pt")


def start(folder: Path, rank: int, place: dict[str, str]) -> int:
    """Forks one of two ranks, which shares the imports; returns its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.environ |= place | {"LOCAL_RANK": str(rank)}
        fit(folder, 2)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def test_two_processes_learn_the_weights_of_one(tmp_path: Path, write_shards: ShardWriter, tiny_model: Path) -> None:
    """One configuration, 1 x 8 and 2 x 4 images; test_big_batch.py does so for every method and for four processes."""
    write_shards(tmp_path, "set", "train", [19])
    (tmp_path / "model").symlink_to(tiny_model)
    place = meeting_place()
    children = [start(tmp_path, rank, place) for rank in (0, 1)]
    fit(tmp_path, 1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    (one, steps), (two, steps_of_two) = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert steps == steps_of_two == 4
    before = TeCoA(pretrained=str(tiny_model)).state_dict()
    moved = 0.0
    for name, weight in one.items():
        if weight.is_floating_point():
            torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=0)
            moved = max(moved, float((weight - before[name]).abs().max()))
    assert moved > 1e-3, "nothing was learnt"


def test_a_size_that_is_set_later_takes_the_place_of_the_configured_one(tmp_path: Path) -> None:
    data = attached(module(tmp_path), 2)
    assert (data.batch_size, data.eval_batch_size) == (4, 4)
    data.batch_size = 3
    assert (data.batch_size, data.eval_batch_size) == (3, 3)
    data.eval_batch_size = 7
    assert (data.batch_size, data.eval_batch_size) == (3, 7)
