"""Shards of the same layout that lie elsewhere, streamed from front to back."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from robustclip.data.sources.tar import IMAGE_TYPES, LABEL
from robustclip.data.sources.wds import read_samples

SHUFFLE_BUFFER = 4096  # encoded images held per loader worker while training


class StreamedImage(NamedTuple):
    """One sample, not yet decoded. ``index`` is ``shard number << 32 | position in the shard``."""

    data: bytes
    label: int
    index: int  # type: ignore[assignment]
    where: str


class StreamedShards(IterableDataset[StreamedImage]):
    """Remote labelled images; over ranks and loader workers every sample appears exactly once.

    Whole shards are dealt out while there are enough of them, single samples otherwise. Shares may be uneven or empty.

    Args:
        urls: of the shards (http, https, file), in their order.
        max_samples: keep this many, an equal number from the front of every shard; None for all.
        rank: of this process.
        world_size: number of processes.
        done: sample ids to leave out.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        done: frozenset[int] = frozenset(),
    ) -> None:
        self.urls, self.max_samples, self.rank, self.world_size = urls, max_samples, rank, world_size
        self.done = done

    def __iter__(self) -> Iterator[StreamedImage]:
        reader, readers = _reader(self.rank, self.world_size)
        deals_shards = len(self.urls) >= readers
        for number in range(len(self.urls)):
            if not deals_shards or number % readers == reader:
                for sample in itertools.islice(read_shard(self.urls[number], number), self._quota(number)):
                    if sample.index not in self.done and (deals_shards or _is_dealt_to(reader, readers, sample)):
                        yield sample

    def _quota(self, number: int) -> int | None:
        if self.max_samples is None:
            return None
        share, rest = divmod(self.max_samples, len(self.urls))
        return share + (number < rest)


class ShuffledShards(IterableDataset[StreamedImage]):
    """Remote labelled images for training: shuffled anew each epoch, the same number for every rank.

    Args:
        urls: of the shards.
        length: samples of one epoch over all ranks; ranks take ``ceil(length / world_size)`` each, some twice if
            their share of the shards is smaller.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, urls: Sequence[str], *, length: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.urls, self.seed, self.rank, self.world_size = urls, seed, rank, world_size
        self._length = -(-length // world_size)
        self.epoch = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[StreamedImage]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        share = self._length // workers + (number < self._length % workers)
        reader, readers = _reader(self.rank, self.world_size)
        yield from itertools.islice(self._endless(reader, readers), share)

    def _endless(self, reader: int, readers: int) -> Iterator[StreamedImage]:
        """Lap after lap over this reader's share, or over everything if that is empty; no lap runs into the next."""
        for lap in itertools.count():
            generator = random.Random(f"{self.seed}/{self.epoch}/{lap}/{reader}")
            shuffled = shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 4, rng=generator)
            is_empty = True
            for sample in shuffled(self._lap(lap, reader, readers)):
                is_empty = False
                yield sample
            if is_empty and readers == 1:
                raise ValueError(f"the shards from {self.urls[0]} on hold no sample")
            if is_empty:
                reader, readers = 0, 1

    def _lap(self, lap: int, reader: int, readers: int) -> Iterator[StreamedImage]:
        order = list(range(len(self.urls)))
        random.Random(f"{self.seed}/{self.epoch}/{lap}").shuffle(order)
        deals_shards = len(order) >= readers
        for number in order[reader::readers] if deals_shards else order:
            for sample in read_shard(self.urls[number], number):
                if deals_shards or _is_dealt_to(reader, readers, sample):
                    yield sample


def read_shard(url: str, number: int) -> Iterator[StreamedImage]:
    """Reads the labelled images of one shard in their order.

    Args:
        url: of the shard.
        number: of the shard among those of its set.

    Raises:
        ValueError: as `read_samples`.
    """
    for position, sample in enumerate(read_samples(url, needs=LABEL, loads=(*IMAGE_TYPES, LABEL))):
        where = f"{url} key {sample.key!r}"
        yield StreamedImage(sample.image.data, sample.label, number << 32 | position, where)


def _is_dealt_to(reader: int, readers: int, sample: StreamedImage) -> bool:
    return ((sample.index >> 32) + sample.index) % readers == reader  # also spreads many shards of a sample each


def _reader(rank: int, world_size: int) -> tuple[int, int]:
    """Number of this reader and of all readers, over ranks and loader workers."""
    worker = get_worker_info()
    workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
    return rank + world_size * number, world_size * workers
