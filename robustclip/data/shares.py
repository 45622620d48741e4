"""From an opened data set to the samples of one process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch.utils.data import Dataset, DistributedSampler

from robustclip.data.anchors import Choice, anchored
from robustclip.data.loader import ExactSampler
from robustclip.data.samples import Images, Loaded, StreamedImages
from robustclip.data.sources.source import OpenedSource
from robustclip.data.sources.streams import ShuffledShards, StreamedShards
from robustclip.data.splits import choose
from robustclip.data.transforms import ToPixels
from robustclip.data.views import Joined


class Place(NamedTuple):
    """A process among those that share the work."""

    rank: int
    world_size: int


class Beside(NamedTuple):
    """What lies beside the training images: captions, anchors, how these are chosen, and where paths start."""

    captions: str | None
    anchors: str | None
    choice: Choice
    root: str


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image of a set to the pixels that an attack works on.

    Args:
        image_size: side in pixels of the crop.
        attack_resolution: ``native`` leaves small-image sets at their own size; ``model`` does not.
    """

    image_size: int
    attack_resolution: Literal["native", "model"]

    def __call__(self, source: OpenedSource) -> ToPixels:
        """The transform of a set."""
        return ToPixels(None if self._keeps_size(source) else self.image_size, source.border)

    def protocol(self, source: OpenedSource, max_samples: int | None) -> dict[str, str]:
        """The same and which samples it concerns, in words, for a result."""
        size = None if source.dataset is None else len(source.dataset)  # type: ignore[arg-type]
        return {
            "split": ", ".join(filter(None, (source.task.name, source.split, source.part))),
            "sample_ids": f"{max_samples or 'all'} of {'a stream' if size is None else size}",
            "preprocessing": self(source).description,
            "attack_space": "native" if self._keeps_size(source) else f"{self.image_size} x {self.image_size}",
        }

    def _keeps_size(self, source: OpenedSource) -> bool:
        return source.native_size and self.attack_resolution == "native"


Samples = tuple[Dataset[Loaded], DistributedSampler[Loaded] | None]
"""Samples and their order; None for a stream, which has one of its own."""


def exact_samples(
    source: OpenedSource,
    transform: ToPixels,
    place: Place,
    *,
    positions: Sequence[int] | None = None,
    max_samples: int | None = None,
    done: frozenset[int] = frozenset(),
    only: frozenset[int] | None = None,
) -> Samples:
    """This process's share of a set, every sample once, in order.

    Args:
        source: the set.
        transform: from image to pixels.
        place: of this process.
        positions: of the samples to choose from; None for all.
        max_samples: how many; None for all.
        done: ids of samples to leave out.
        only: ids of the samples to take; None for all.
    """
    rank, world_size = place
    if source.dataset is None:
        shards = StreamedShards(source.urls, max_samples=max_samples, rank=rank, world_size=world_size, done=done)
        return StreamedImages(shards, transform, source.class_count, only), None
    chosen = choose(source.dataset, positions, max_samples) if only is None else sorted(only)
    images = Images(source.dataset, transform, chosen)
    return images, ExactSampler(images, rank=rank, world_size=world_size, done=done)


def shuffled_samples(
    source: OpenedSource,
    transforms: tuple[ToPixels, ToPixels],
    place: Place,
    *,
    positions: Sequence[int] | None,
    beside: Beside,
    seed: int,
) -> Samples:
    """This process's share of a training set, of as many samples as any other's, shuffled anew each epoch.

    Args:
        source: the set.
        transforms: of its images, and of the images of anchors.
        place: of this process.
        positions: of the samples that are trained on; None for all.
        beside: what is read with them.
        seed: of the run.

    Raises:
        ValueError: a remote set whose length nobody told, or captions or anchors where none can be.
    """
    name, wants_more = source.task.name, beside.captions is not None or beside.anchors is not None
    if source.dataset is None:
        if source.length is None:
            raise ValueError(f"training set {name!r} is remote: give its number of samples as `length`")
        if wants_more:
            raise ValueError(f"training set {name!r} is remote: captions and anchors must be null")
        rank, world_size = place
        shards = ShuffledShards(source.urls, length=source.length, seed=seed, rank=rank, world_size=world_size)
        return StreamedImages(shards, transforms[0], source.class_count), None
    if wants_more and isinstance(source.dataset, Joined):
        raise ValueError(f"training set {name!r} is joined from several: captions and anchors must be null")
    images = anchored(Images(source.dataset, transforms[0], positions), *beside, transform=transforms[1], seed=seed)
    return images, DistributedSampler(images, place.world_size, place.rank, shuffle=True, seed=seed)
