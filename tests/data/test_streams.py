"""Streamed shards: every sample once over any grid of readers, and reproducible shuffles of equal length."""

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ShardWriter

from robustclip.data.loader import ImageLoader
from robustclip.data.samples import StreamedImages
from robustclip.data.sources import streams
from robustclip.data.sources.streams import ShuffledShards, StreamedShards
from robustclip.data.sources.wds import list_shards
from robustclip.data.transforms import ToPixels

GRIDS = [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2), (3, 3)]  # ranks and loader workers of each
SHARDS = [[7], [4, 3], [2, 2, 3], [1, 0, 4, 1], [1] * 7, [1, 2, 1, 1, 1, 1, 1, 1, 1, 1]]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for torch's loader worker; `count` 0 is the main process."""
    place = SimpleNamespace(id=0, count=0)

    def info() -> SimpleNamespace | None:
        return SimpleNamespace(id=place.id, num_workers=place.count) if place.count else None

    monkeypatch.setattr(streams, "get_worker_info", info)
    return place


def urls_of(folder: Path, write_shards: ShardWriter, counts: list[int]) -> list[str]:
    return list_shards(f"file://{write_shards(folder, 'set', 'test', counts)}", "test")


def shares(urls: list[str], worker: SimpleNamespace, ranks: int, workers: int, **options: int) -> list[list[int]]:
    result = []
    worker.count = workers
    for rank in range(ranks):
        for worker.id in range(max(1, workers)):
            result.append([sample.index for sample in StreamedShards(urls, rank=rank, world_size=ranks, **options)])
    return result


@pytest.mark.parametrize("counts", SHARDS, ids=str)
def test_every_sample_appears_once_over_ranks_and_workers(
    tmp_path: Path, write_shards: ShardWriter, worker: SimpleNamespace, counts: list[int]
) -> None:
    urls = urls_of(tmp_path, write_shards, counts)
    expected = [number << 32 | position for number, count in enumerate(counts) for position in range(count)]
    for ranks, workers in GRIDS:
        found = shares(urls, worker, ranks, workers)
        assert sorted(index for share in found for index in share) == expected, (ranks, workers)


@pytest.mark.parametrize("counts", [[4, 4], [8], [3, 3, 2]], ids=str)
def test_a_limit_keeps_the_same_samples_on_every_grid(
    tmp_path: Path, write_shards: ShardWriter, worker: SimpleNamespace, counts: list[int]
) -> None:
    urls = urls_of(tmp_path, write_shards, counts)
    found = [sorted(itertools.chain(*shares(urls, worker, *grid, max_samples=5))) for grid in GRIDS]
    assert len(found[0]) == 5
    assert all(each == found[0] for each in found)


def test_real_loader_workers_read_every_sample_once(tmp_path: Path, write_shards: ShardWriter) -> None:
    urls = urls_of(tmp_path, write_shards, [4, 3])
    stream = StreamedImages(StreamedShards(urls), ToPixels(None), 3)
    batches = list(ImageLoader(stream, skips_bad_samples=False, batch_size=2, num_workers=2))
    indices = sorted(index for batch in batches for index in batch.index.tolist())
    assert indices == [0, 1, 2, 3, *(1 << 32 | position for position in range(3))]


@pytest.mark.parametrize("counts", SHARDS, ids=str)
@pytest.mark.parametrize("length", [7, 12, 25])
def test_a_shuffled_epoch_is_equally_long_on_every_rank(
    tmp_path: Path, write_shards: ShardWriter, worker: SimpleNamespace, counts: list[int], length: int
) -> None:
    urls = urls_of(tmp_path, write_shards, counts)
    for ranks, workers in GRIDS:
        worker.count = workers
        for rank in range(ranks):
            stream = ShuffledShards(urls, length=length, seed=0, rank=rank, world_size=ranks)
            got = 0
            for worker.id in range(max(1, workers)):
                got += sum(1 for _ in stream)
            assert got == len(stream) == -(-length // ranks), (ranks, workers, rank)


@pytest.mark.parametrize(("counts", "ranks"), [([9], 1), ([4, 5], 1), ([3, 3], 2), ([6], 2), ([2, 2, 2, 2], 2)])
def test_a_shuffled_epoch_covers_everything_where_shares_are_equal(
    tmp_path: Path, write_shards: ShardWriter, worker: SimpleNamespace, counts: list[int], ranks: int
) -> None:
    urls = urls_of(tmp_path, write_shards, counts)
    for epoch in range(3):
        seen: Counter[int] = Counter()
        for rank in range(ranks):
            stream = ShuffledShards(urls, length=sum(counts), seed=0, rank=rank, world_size=ranks)
            stream.epoch = epoch
            seen.update(sample.index for sample in stream)
        assert len(seen) == sum(counts)
        assert set(seen.values()) == {1}


def test_a_shuffled_order_follows_from_seed_and_epoch(tmp_path: Path, write_shards: ShardWriter) -> None:
    urls = urls_of(tmp_path, write_shards, [6, 6])

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        stream = ShuffledShards(urls, length=12, seed=seed)
        stream.epoch = epoch
        return tuple(sample.index for sample in stream)

    assert order(0, 0) == order(0, 0)
    assert len({order(0, 0), order(0, 1), order(0, 2), order(1, 0)}) == 4


def test_shards_without_any_sample_are_reported(tmp_path: Path, write_shards: ShardWriter) -> None:
    urls = urls_of(tmp_path, write_shards, [0, 0])
    with pytest.raises(ValueError, match="hold no sample"):
        next(iter(ShuffledShards(urls, length=3, seed=0)))


def test_a_label_out_of_range_is_named(tmp_path: Path, write_shards: ShardWriter) -> None:
    stream = StreamedImages(StreamedShards(urls_of(tmp_path, write_shards, [3])), ToPixels(None), class_count=2)
    with pytest.raises(ValueError, match=r"0\.tar key 's0000002' has label 2, but there are 2 classes"):
        list(stream)


def test_a_cut_or_missing_remote_shard_is_named(tmp_path: Path, write_shards: ShardWriter) -> None:
    urls = urls_of(tmp_path, write_shards, [3, 3])
    shard = tmp_path / "set" / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"0\.tar is damaged at byte 512: it is cut short"):
        list(StreamedShards(urls[:1]))
    (tmp_path / "set" / "test" / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"1\.tar"):
        list(StreamedShards(urls[1:]))
