"""Streams labelled images from remote shards in the WebDataset layout."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from robustclip.data.sources.tar import IMAGE_TYPES, LABEL
from robustclip.data.sources.wds import read_samples
from robustclip.types import Share

WHOLE = Share(0, 1)
SHUFFLE_BUFFER = 4096  # number of encoded images in the memory of each loader worker while training


class StreamedImage(NamedTuple):
    """One sample that is not decoded.

    Attributes:
        data: bytes of the image file.
        label: class number.
        index: sample id, ``shard number << 32 | position in the shard``.
        where: shard and key, for messages.
    """

    data: bytes
    label: int
    index: int  # type: ignore[assignment]
    where: str


class StreamedShards(IterableDataset[StreamedImage]):
    """Remote labelled images for evaluation; each sample appears exactly once over processes and loader workers.

    Readers get whole shards if there are enough of them, single samples otherwise. Shares may be uneven or empty.

    Args:
        urls: addresses of the shards (http, https, file), in their order.
        max_samples: number of samples, taken equally from the beginning of every shard; None for all.
        rank: rank of this process.
        world_size: number of processes.
        done: sample ids to leave out.
        share: part of the samples that the processes share; None for all. It holds whole shards if there are as many
            as parts, single samples otherwise.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        done: frozenset[int] = frozenset(),
        share: Share | None = None,
    ) -> None:
        self.urls, self.max_samples, self.rank, self.world_size = urls, max_samples, rank, world_size
        self.done, self.share = done, share or WHOLE

    def __iter__(self) -> Iterator[StreamedImage]:
        order, part = range(len(self.urls)), self.share
        if len(order) >= part.count:
            order, part = order[part.number :: part.count], WHOLE
        share = _share(self.urls, order, *_reader(self.rank, self.world_size), quota=self._quota, part=part)
        yield from (sample for sample in share if sample.index not in self.done)

    def _quota(self, number: int) -> int | None:
        if self.max_samples is None:
            return None
        share, rest = divmod(self.max_samples, len(self.urls))
        return share + (number < rest)


class ShuffledShards(IterableDataset[StreamedImage]):
    """Remote labelled images for training, shuffled anew each epoch, equally many for every process.

    Args:
        urls: addresses of the shards.
        length: samples of one epoch over all processes. Each process takes ``ceil(length / world_size)``, and repeats
            samples if its share of the shards is smaller.
        seed: seed of the order.
        rank: rank of this process.
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
        """Yields this reader's share again and again, or all samples if the share is empty; laps are not mixed."""
        for lap in itertools.count():
            generator = random.Random(f"{self.seed}/{self.epoch}/{lap}/{reader}")
            shuffled = shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 4, rng=generator)
            is_empty = True
            order = list(range(len(self.urls)))
            random.Random(f"{self.seed}/{self.epoch}/{lap}").shuffle(order)
            for sample in shuffled(_share(self.urls, order, reader, readers)):
                is_empty = False
                yield sample
            if is_empty and readers == 1:
                raise ValueError(f"the shards from {self.urls[0]} on hold no sample")
            if is_empty:
                reader, readers = 0, 1


def read_shard(url: str, number: int) -> Iterator[StreamedImage]:
    """Reads the labelled images of one shard in their order.

    Args:
        url: address of the shard.
        number: number of the shard in its set.

    Raises:
        ValueError: as `read_samples`.
    """
    for position, sample in enumerate(read_samples(url, needs=LABEL, loads=(*IMAGE_TYPES, LABEL))):
        where = f"{url} key {sample.key!r}"
        yield StreamedImage(sample.image.data, sample.label, number << 32 | position, where)


def _share(
    urls: Sequence[str],
    order: Sequence[int],
    reader: int,
    readers: int,
    quota: Callable[[int], int | None] = lambda number: None,
    part: Share = WHOLE,
) -> Iterator[StreamedImage]:
    """Yields one reader's share of a part: whole shards if there are enough of them, else single samples of all."""
    has_shards = len(order) >= readers
    for number in order[reader::readers] if has_shards else order:
        for sample in itertools.islice(read_shard(urls[number], number), quota(number)):
            place = (sample.index >> 32) + sample.index  # the sum also spreads many shards that hold one sample each
            is_own = has_shards or place // part.count % readers == reader
            if is_own and place % part.count == part.number:
                yield sample


def _reader(rank: int, world_size: int) -> tuple[int, int]:
    """Returns the number of this reader and the number of all readers, over processes and loader workers."""
    worker = get_worker_info()
    workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
    return rank + world_size * number, world_size * workers
