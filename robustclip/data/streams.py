"""Shards of the same layout that lie elsewhere, streamed from front to back."""

import itertools
import random
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple
from urllib.request import urlopen

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle
from webdataset.tariterators import group_by_keys, tar_file_expander

from robustclip.data.shards import IMAGE_TYPES, TIMEOUT_SECONDS, parse_label

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
    """The samples of one shard, in order.

    Raises:
        ValueError: as `read_samples`, or a sample without image or label.
    """
    for position, sample in enumerate(read_samples(url)):
        where = f"{url} key {sample['__key__']!r}"
        image = next((sample[kind] for kind in sample if kind.lower() in IMAGE_TYPES), None)
        if image is None or "cls" not in sample:
            kinds = sorted(kind for kind in sample if not kind.startswith("__"))
            raise ValueError(f"{where} needs an image and a .cls label, it has {kinds}")
        yield StreamedImage(image, parse_label(sample["cls"], where), number << 32 | position, where)


def read_samples(url: str) -> Iterator[dict[str, Any]]:
    """What a shard holds of each sample, by extension, and its ``__key__``.

    Raises:
        ValueError: the shard cannot be fetched, or is cut short.
    """
    try:
        with urlopen(url, timeout=TIMEOUT_SECONDS) as stream:
            watched = _WatchedStream(stream)
            yield from group_by_keys(tar_file_expander([{"url": url, "stream": watched}]))
            # tarfile takes a stream that stops between two members for a complete one.
            if not watched.ends_in_zeros():
                raise ValueError(f"shard {url} is cut short: it has no end-of-archive block; fetch it again")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"shard {url} cannot be read to its end: {error}; check the address") from error


class _WatchedStream:
    """Remembers the last block that was read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._last = stream, b""

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._last = (self._last + data)[-tarfile.BLOCKSIZE :]
        return data

    def ends_in_zeros(self) -> bool:
        """Reads to the end, which must be the empty block that closes an archive."""
        while self.read(tarfile.RECORDSIZE):
            pass
        return self._last == bytes(tarfile.BLOCKSIZE)


def _is_dealt_to(reader: int, readers: int, sample: StreamedImage) -> bool:
    return ((sample.index >> 32) + sample.index) % readers == reader  # also spreads many shards of a sample each


def _reader(rank: int, world_size: int) -> tuple[int, int]:
    """Number of this reader and of all readers, over ranks and loader workers."""
    worker = get_worker_info()
    workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
    return rank + world_size * number, world_size * workers
