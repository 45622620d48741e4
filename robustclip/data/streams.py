"""Shards of the same layout that lie elsewhere, streamed from front to back."""

import itertools
import random
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple
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
    """

    def __init__(
        self, urls: Sequence[str], *, max_samples: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        self.urls, self.max_samples, self.rank, self.world_size = urls, max_samples, rank, world_size

    def __iter__(self) -> Iterator[StreamedImage]:
        reader, readers = _reader(self.rank, self.world_size)
        deals_shards = len(self.urls) >= readers
        for number in range(len(self.urls)):
            if not deals_shards or number % readers == reader:
                for sample in itertools.islice(read_shard(self.urls[number], number), self._quota(number)):
                    if deals_shards or sample.index % readers == reader:
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
        generator = random.Random(f"{self.seed}/{self.epoch}/{reader}")
        shuffled = shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 4, rng=generator)(self._endless(reader, readers))
        yield from itertools.islice(shuffled, share)

    def _endless(self, reader: int, readers: int) -> Iterator[StreamedImage]:
        for lap in itertools.count():
            order = list(range(len(self.urls)))
            random.Random(f"{self.seed}/{self.epoch}/{lap}").shuffle(order)
            mine = order[reader::readers] if len(order) >= readers else order
            for number in mine:
                for sample in read_shard(self.urls[number], number):
                    if len(order) >= readers or sample.index % readers == reader:
                        yield sample


def read_shard(url: str, number: int) -> Iterator[StreamedImage]:
    """The samples of one shard, in order.

    Raises:
        ValueError: the shard cannot be fetched, is cut short, or has a sample without image or label.
    """
    try:
        with urlopen(url, timeout=TIMEOUT_SECONDS) as stream:
            samples = group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
            for position, sample in enumerate(samples):
                where = f"{url} key {sample['__key__']!r}"
                image = next((sample[kind] for kind in sample if kind.lower() in IMAGE_TYPES), None)
                if image is None or "cls" not in sample:
                    kinds = sorted(kind for kind in sample if not kind.startswith("__"))
                    raise ValueError(f"{where} needs an image and a .cls label, it has {kinds}")
                yield StreamedImage(image, parse_label(sample["cls"], where), number << 32 | position, where)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"shard {url} cannot be read to its end: {error}") from error


def _reader(rank: int, world_size: int) -> tuple[int, int]:
    """Number of this reader and of all readers, over ranks and loader workers."""
    worker = get_worker_info()
    workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
    return rank + world_size * number, world_size * workers
