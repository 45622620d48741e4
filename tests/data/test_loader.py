"""Exact shares in evaluation, a training order that can be continued, and samples that do not decode."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ShardWriter
from PIL import Image
from torch.utils.data import DistributedSampler

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.loader import ImageLoader
from robustclip.data.process_share import ExactSampler
from robustclip.data.samples import Images, StreamedImages, digest_of
from robustclip.data.sources.streams import ShuffledShards
from robustclip.data.sources.wds import IndexedShards, list_shards
from robustclip.data.transforms import ToPixels


def images_of(folder: Path, write_shards: ShardWriter, count: int, broken: tuple[int, ...] = ()) -> Images:
    base = write_shards(folder, "set", "test", [count], broken=broken)
    return Images(IndexedShards([base / "test" / "0.tar"]), ToPixels(None))


@pytest.mark.parametrize("size", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_exact_shares_hold_every_sample_once(size: int, ranks: int) -> None:
    shares = [list(ExactSampler(range(size), rank=rank, world_size=ranks)) for rank in range(ranks)]  # type: ignore[arg-type]
    assert sorted(itertools.chain(*shares)) == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [len(ExactSampler(range(size), rank=rank, world_size=ranks)) for rank in range(ranks)] == [  # type: ignore[arg-type]
        len(share) for share in shares
    ]


def epochs_of(loader: ImageLoader, count: int) -> list[list[int]]:
    """Sample ids of every batch of some epochs, as Lightning drives a loader."""
    result = []
    for _ in range(count):  # a new iteration is a new epoch, except after loading
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(loader.state_dict()["epoch"])
        result += [batch.index.tolist() for batch in loader]
    return result


def training_loader(kind: str, base: Path, workers: int) -> ImageLoader:
    urls = list_shards(f"file://{base}", "test")
    if kind == "stream":
        stream = StreamedImages(ShuffledShards(urls, length=11, seed=3), ToPixels(None), 3)
        return ImageLoader(stream, skips_bad_samples=True, batch_size=3, num_workers=workers)
    images = Images(IndexedShards([Path(url.removeprefix("file://")) for url in urls]), ToPixels(None))
    sampler: DistributedSampler[int] = DistributedSampler(images, 1, 0, shuffle=True, seed=3)  # type: ignore[arg-type]
    return ImageLoader(images, skips_bad_samples=True, batch_size=3, num_workers=workers, sampler=sampler)


@pytest.mark.parametrize(
    ("kind", "workers", "done"),
    [(kind, 0, done) for kind in ("map", "stream") for done in (0, 1, 3, 4, 6, 9)] + [("map", 2, 6), ("stream", 2, 6)],
)
def test_a_loader_continues_where_another_stood(
    tmp_path: Path, write_shards: ShardWriter, kind: str, workers: int, done: int
) -> None:
    base = write_shards(tmp_path, "set", "test", [5, 6])
    whole = epochs_of(training_loader(kind, base, workers), 3)
    first = training_loader(kind, base, workers)
    assert len(whole) == 3 * len(first) == 12
    seen: list[list[int]] = []
    while len(seen) < done:
        if isinstance(first.sampler, DistributedSampler):
            first.sampler.set_epoch(first.state_dict()["epoch"])
        for batch in first:
            seen.append(batch.index.tolist())
            if len(seen) == done:
                break
    state = first.state_dict()
    assert state == {"epoch": done // 4, "batches": done % 4}
    second = training_loader(kind, base, workers)
    second.load_state_dict(state)
    assert seen + epochs_of(second, 3 - done // 4) == whole


@pytest.mark.parametrize(("length", "workers"), [(1, 0), (4, 0), (7, 0), (11, 0), (7, 1), (7, 2)])
def test_a_stream_has_as_many_batches_as_its_length(
    tmp_path: Path, write_shards: ShardWriter, length: int, workers: int
) -> None:
    base = write_shards(tmp_path, "set", "test", [5, 6])
    stream = StreamedImages(
        ShuffledShards(list_shards(f"file://{base}", "test"), length=length, seed=0), ToPixels(None), 3
    )
    loader = ImageLoader(stream, skips_bad_samples=True, batch_size=3, num_workers=workers)
    assert len(list(loader)) == len(loader)


def test_after_an_epoch_that_the_trainer_cut_short_comes_the_next(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [5, 6])
    loader = training_loader("map", base, 0)
    loader.cut_after = 2
    batches = iter(loader)
    next(batches)
    assert loader.state_dict() == {"epoch": 0, "batches": 1}
    next(batches)
    assert loader.state_dict() == {"epoch": 1, "batches": 0}


def test_an_iteration_leaves_the_global_random_stream_alone(tmp_path: Path, write_shards: ShardWriter) -> None:
    loader = ImageLoader(images_of(tmp_path, write_shards, 4), skips_bad_samples=False, batch_size=2, num_workers=1)
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_undecodable_sample_stops_with_shard_and_key(tmp_path: Path, write_shards: ShardWriter) -> None:
    loader = ImageLoader(images_of(tmp_path, write_shards, 5, (3,)), skips_bad_samples=False, batch_size=2)
    with pytest.raises(ValueError, match=r"test/0\.tar key 's0000003' does not decode: .*`bad_samples: skip`"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_samples_are_counted_anew_each_time(tmp_path: Path, write_shards: ShardWriter, workers: int) -> None:
    images = images_of(tmp_path, write_shards, 7, (1, 2, 3))  # 2 and 3 are a whole batch
    loader = ImageLoader(images, skips_bad_samples=True, batch_size=2, num_workers=workers)
    for _ in range(2):
        assert [batch.index.tolist() for batch in loader] == [[0], [4, 5], [6]]
        assert [bad.where[-14:] for bad in loader.bad_samples] == [f"key 's000000{number}'" for number in (1, 2, 3)]


def test_training_skips_undecodable_images_that_evaluation_refuses(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "set", "train", [6], broken=(4,))
    write_shards(tmp_path, "set", "test", [6], broken=(4,))
    data = CLIPDataModule("wds:set", test=["wds:set"], root=str(tmp_path), holdout=0, batch_size=2)
    data.setup("fit")
    data.setup("test")
    assert sum(len(batch.labels) for batch in data.train_dataloader()) == 5
    with pytest.raises(ValueError, match="'s0000004' does not decode"):
        list(data.test_dataloader()[0])


def test_skipped_samples_are_reported_per_task(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "good", "test", [3])
    write_shards(tmp_path, "bad", "test", [6], broken=(0, 4))
    data = CLIPDataModule(test=["wds:good", "wds:bad"], root=str(tmp_path), bad_samples="skip")
    data.setup("test")
    assert [sum(len(batch.labels) for batch in loader) for loader in data.test_dataloader()] == [3, 4]
    assert data.bad_sample_counts == {"good": 0, "bad": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_several_sizes_are_refused_by_the_set_the_sizes_and_the_remedy(tmp_path: Path, workers: int) -> None:
    for number, size in enumerate([(40, 40), (40, 40), (50, 30)]):
        (tmp_path / "sizes" / "test" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "sizes" / "test" / "ab"[number % 2] / f"{number}.png")
    source = DataSource(f"folder:{tmp_path / 'sizes'}", split="test", native_size=True)
    options: dict[str, Any] = {"train": source, "test": [source], "holdout": 0, "num_workers": workers}
    words = "images of set 'sizes' have several sizes, such as (40 x 40 and 50 x 30|50 x 30 and 40 x 40) pixels"
    data = CLIPDataModule(batch_size=3, **options)
    data.setup("fit")
    data.setup("test")
    for loader in (data.train_dataloader(), *data.test_dataloader()):
        with pytest.raises(ValueError, match=words) as error:
            list(loader)
        assert "set `native_size: false` for this set" in str(error.value)
    alone = CLIPDataModule(batch_size=1, **options)
    alone.setup("test")
    assert [batch.images.shape[-2:] for batch in alone.test_dataloader()[0]] == [(40, 40), (30, 50), (40, 40)]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_hashes_pixels_and_training_does_not(
    tmp_path: Path, write_shards: ShardWriter, workers: int
) -> None:
    write_shards(tmp_path, "set", "train", [12])
    base = write_shards(tmp_path, "set", "test", [6])
    streamed = DataSource(f"wds:file://{base}", name="streamed")
    data = CLIPDataModule(
        train="wds:set",
        test=["wds:set", streamed],
        root=str(tmp_path),
        batch_size=4,
        image_size=32,
        num_workers=workers,
        holdout=0.5,
    )
    data.setup("fit")
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        assert all(batch.digests is None for batch in loader)
    data.setup("test")
    found = []
    for loader in data.test_dataloader():
        batches = list(loader)
        assert all(batch.digests == tuple(map(digest_of, batch.images)) for batch in batches)
        found.append(sorted(digest for batch in batches for digest in batch.digests))
    assert found[0] == found[1]
    assert len(set(found[0])) == 6


def test_finished_samples_are_read_again_in_order_by_place_and_stream(
    tmp_path: Path, write_shards: ShardWriter
) -> None:
    base = write_shards(tmp_path, "set", "test", [3, 4], broken=[4])
    streamed = DataSource(f"wds:file://{base}", name="streamed")
    data = CLIPDataModule(test=["wds:set", streamed], root=str(tmp_path), batch_size=2, image_size=32)
    data.setup("test")
    ids = {"set": [0, 2, 4, 5], "streamed": [0, 2, 1 << 32 | 1, 1 << 32 | 2]}
    for task, numbers in ids.items():
        assert data.done_dataloader(task) is None
        data.connect(done={task: frozenset(numbers)}.__getitem__)
        loader = data.done_dataloader(task)
        assert loader is not None
        assert [number for batch in loader for number in batch.index.tolist()] == [*numbers[:2], numbers[3]]
        assert len(loader.bad_samples) == 1
        data.connect()
