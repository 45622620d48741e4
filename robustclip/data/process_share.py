"""Gives each process its share of a data set: every sample exactly once in evaluation, shuffled in training."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import Dataset, DistributedSampler

from robustclip.data.anchors import AuxiliaryData
from robustclip.data.opened_source import OpenedSource
from robustclip.data.samples import Images, Loaded, StreamedImages
from robustclip.data.sources.source import Joined
from robustclip.data.sources.streams import ShuffledShards, StreamedShards
from robustclip.data.splits import choose
from robustclip.data.transforms import ToPixels
from robustclip.types import Share

Samples = tuple[Dataset[Loaded], DistributedSampler[Loaded] | None]
"""Samples and their order; None for a stream, which has an order of its own."""


class Process(NamedTuple):
    """One of the processes that share the work.

    Attributes:
        rank: number of the process, from 0.
        world_size: number of processes.
    """

    rank: int
    world_size: int


class ExactSampler(DistributedSampler[Any]):
    """Assigns every sample to exactly one process, so that counts are exact; shares may be uneven or empty.

    PyTorch's own sampler pads by repeating samples. Lightning does not replace samplers of this type.

    Args:
        dataset: the samples.
        rank: rank of this process.
        world_size: number of processes.
        done: sample ids to leave out; the other samples keep their process.
    """

    def __init__(self, dataset: Images, *, rank: int, world_size: int, done: frozenset[int] = frozenset()) -> None:
        super().__init__(dataset, world_size, rank, shuffle=False)
        share = range(rank, len(dataset), world_size)
        self._indices = [number for number in share if dataset.positions[number] not in done] if done else share

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def exact_samples(
    source: OpenedSource,
    transform: ToPixels,
    process: Process,
    *,
    positions: Sequence[int] | None = None,
    max_samples: int | None = None,
    done: frozenset[int] = frozenset(),
    only: frozenset[int] | None = None,
    share: Share | None = None,
) -> Samples:
    """Returns this process's share of a set for evaluation, in order.

    Args:
        source: the set.
        transform: transform of the images.
        process: this process.
        positions: positions of the samples to choose from; None for all.
        max_samples: number of samples over all processes; None for all.
        done: sample ids to leave out.
        only: sample ids to keep; None for all.
        share: part of the set that the processes of this run share; None for the whole set.
    """
    rank, world_size = process
    if source.dataset is None:
        options: dict[str, Any] = {"rank": rank, "world_size": world_size, "done": done, "share": share}
        shards = StreamedShards(source.urls, max_samples=max_samples, **options)
        return StreamedImages(shards, transform, source.class_count, only), None
    chosen: Sequence[int] | None = choose(source.dataset, positions, max_samples) if only is None else sorted(only)
    if share is not None and only is None:
        everything = range(len(source.dataset)) if chosen is None else chosen  # type: ignore[arg-type]
        chosen = everything[share.number :: share.count]
    images = Images(source.dataset, transform, chosen)
    return images, ExactSampler(images, rank=rank, world_size=world_size, done=done)


def shuffled_samples(
    source: OpenedSource,
    transforms: tuple[ToPixels, ToPixels],
    process: Process,
    *,
    positions: Sequence[int] | None,
    auxiliary: AuxiliaryData,
    seed: int,
    drop_last: bool = False,
) -> Samples:
    """Returns this process's share of a training set, shuffled anew each epoch; all shares have the same size.

    Args:
        source: the set.
        transforms: transform of its images, and of the images of anchors.
        process: this process.
        positions: positions of the training samples; None for all.
        auxiliary: captions and anchors.
        seed: seed of the run.
        drop_last: leave out samples at the end of an epoch, instead of repeating some, to make shares equal.

    Raises:
        ValueError: a remote set has no ``length``, or the set cannot have captions or anchors.
    """
    name = source.task.name
    if source.dataset is None:
        if source.length is None:
            raise ValueError(f"training set {name!r} is remote: give its number of samples as `length`")
        if auxiliary.is_given:
            raise ValueError(f"training set {name!r} is remote: captions and anchors must be null")
        rank, world_size = process
        shards = ShuffledShards(source.urls, length=source.length, seed=seed, rank=rank, world_size=world_size)
        return StreamedImages(shards, transforms[0], source.class_count), None
    if auxiliary.is_given and isinstance(source.dataset, Joined):
        raise ValueError(f"training set {name!r} is joined from several: captions and anchors must be null")
    images = auxiliary.added_to(Images(source.dataset, transforms[0], positions), transforms[1], seed)
    share = {"num_replicas": process.world_size, "rank": process.rank}
    return images, DistributedSampler(images, **share, shuffle=True, seed=seed, drop_last=drop_last)
