"""Loaders of images: every sample exactly once in evaluation, resumable in training; and the samples of a process."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from robustclip.data.anchors import Anchor, AnchoredSample, Choice, anchored
from robustclip.data.data_sets import OpenedSource
from robustclip.data.feature_cache import FeatureImages
from robustclip.data.samples import BadSample, Images, Loaded, StreamedImages, digest_of
from robustclip.data.sources.source import Joined
from robustclip.data.sources.streams import ShuffledShards, StreamedShards
from robustclip.data.splits import choose
from robustclip.data.transforms import ToPixels
from robustclip.types import Batch, Pairs

log = logging.getLogger(__name__)


class ExactSampler(DistributedSampler[Any]):
    """Every sample once over the ranks, so that counts are exact; shares may be uneven or empty.

    torch's own sampler pads by repeating samples. Lightning leaves samplers of this type alone.

    Args:
        dataset: the samples.
        rank: of this process.
        world_size: number of processes.
        done: sample ids to leave out; what remains keeps its rank.
    """

    def __init__(self, dataset: Images, *, rank: int, world_size: int, done: frozenset[int] = frozenset()) -> None:
        super().__init__(dataset, world_size, rank, shuffle=False)
        share = range(rank, len(dataset), world_size)
        self._indices = [number for number in share if dataset.positions[number] not in done] if done else share

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class ImageLoader(DataLoader[Loaded]):
    """Yields `Batch`; handles undecodable samples; knows where it is within the epoch and can continue there.

    Args:
        dataset: yields `Loaded`.
        skips_bad_samples: leave undecodable samples out, and count them, instead of stopping.
        first_epoch: number of the epoch that the first iteration is.
        name: of the set, for messages.
        has_digests: hash the pixels of every image, in the loader's workers.
        kwargs: of the DataLoader.

    Raises:
        ValueError: while iterating: a sample that does not decode, unless these are skipped.
    """

    def __init__(
        self,
        dataset: Dataset[Loaded],
        *,
        skips_bad_samples: bool,
        first_epoch: int = 0,
        name: str = "data",
        has_digests: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs["collate_fn"] = partial(collate, name=name, has_digests=has_digests)
        if isinstance(dataset, FeatureImages):  # batches come whole, sooner than a worker could be asked for them
            kwargs |= {"collate_fn": as_it_is, "num_workers": 0}
        # An own generator: the workers' base seed must not move the global random stream.
        super().__init__(dataset, generator=torch.Generator().manual_seed(0), **kwargs)
        self.skips_bad_samples = skips_bad_samples
        self.bad_samples: list[BadSample] = []
        self.cut_after: int | None = None  # batches that the trainer takes of an epoch; None for all
        self._epoch = first_epoch
        self._batches_done = 0
        self._has_begun = False

    def __len__(self) -> int:
        """Number of batches; at least 1, so that a rank whose shares are all empty still joins in counting.

        Lightning would skip its evaluation, and the other ranks would wait for its counts for ever.
        """
        if not isinstance(self.dataset, IterableDataset):
            return max(1, super().__len__())
        workers = max(1, self.num_workers)
        length = len(self.dataset)  # type: ignore[arg-type]  # a TypeError is how a stream says that nobody knows
        shares = [length // workers + (worker < length % workers) for worker in range(workers)]
        return max(1, sum(-(-share // cast(int, self.batch_size)) for share in shares))

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self._has_begun:
            self._epoch, self._batches_done = self._epoch + 1, 0
        self._has_begun = True
        if isinstance(self.dataset, Images | StreamedImages):  # samplers are told by Lightning, data sets are not
            self.dataset.set_epoch(self._epoch)
        self.bad_samples.clear()
        batches = self._length()
        for batch, bad in self._from(self._batches_done):
            self._batches_done += 1
            if bad and not self.skips_bad_samples:
                raise ValueError(f"{bad[0].where} does not decode: {bad[0].why}; `bad_samples: skip` leaves it out")
            self.bad_samples.extend(bad)
            if self._batches_done == batches:  # Lightning takes as many as it was told and never asks for the end
                self._tell_bad_samples()
            if batch is not None:
                yield batch
        if self._batches_done != batches:
            self._tell_bad_samples()

    def _length(self) -> int | None:
        try:
            return len(self)
        except TypeError:  # a stream whose length nobody knows
            return None

    def _tell_bad_samples(self) -> None:
        if self.bad_samples:
            log.warning("%d samples did not decode, the first: %s", len(self.bad_samples), self.bad_samples[0].where)

    def _from(self, done: int) -> Iterator[tuple[Batch | None, list[BadSample]]]:
        """Batches of this epoch after the first ``done``; only streams have to read what they skip."""
        batch_sampler = self.batch_sampler
        if done == 0 or isinstance(self.dataset, IterableDataset) or batch_sampler is None:
            yield from itertools.islice(super().__iter__(), done, None)
            return
        rest = DataLoader(
            self.dataset,
            batch_sampler=list(itertools.islice(batch_sampler, done, None)),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            generator=self.generator,
        )
        yield from rest

    def state_dict(self) -> dict[str, int]:
        """Number of the epoch and of the batch that come next."""
        if self._batches_done >= min(len(self), self.cut_after or len(self)):
            return {"epoch": self._epoch + 1, "batches": 0}
        return {"epoch": self._epoch, "batches": self._batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration continue there."""
        self._epoch, self._batches_done, self._has_begun = state["epoch"], state["batches"], False


def as_it_is(batch: tuple[Batch | None, list[BadSample]]) -> tuple[Batch | None, list[BadSample]]:
    """A batch that needs no stacking."""
    return batch


def collate(
    samples: Sequence[Loaded | AnchoredSample], *, name: str = "data", has_digests: bool = False
) -> tuple[Batch | None, list[BadSample]]:
    """Stack the decoded samples of a batch, and list the others.

    Args:
        samples: of the batch.
        name: of the set, for messages.
        has_digests: hash the pixels of every image.

    Raises:
        ValueError: images of several sizes.
    """
    bad = [sample for sample in samples if isinstance(sample, BadSample)]
    good = [sample for sample in samples if not isinstance(sample, BadSample)]
    if not good:
        return None, bad
    images, labels, index = zip(*(sample[:3] for sample in good), strict=True)
    sizes = list(dict.fromkeys(" x ".join(map(str, reversed(image.shape[1:]))) for image in images))
    if len(sizes) > 1:
        raise ValueError(
            f"images of set {name!r} have several sizes, such as {sizes[0]} and {sizes[1]} pixels, which make no batch;"
            " set `native_size: false` for this set"
        )
    digests = tuple(map(digest_of, images)) if has_digests else None
    batch = Batch(torch.stack(images), torch.tensor(labels), torch.tensor(index), digests=digests)
    anchored = [sample for sample in good if isinstance(sample, AnchoredSample)]
    captions = tuple(sample.caption for sample in anchored if sample.caption is not None)
    anchors = [sample.anchor for sample in anchored if sample.anchor is not None]
    bad += [each for anchor in anchors for each in anchor.skipped]
    return batch._replace(captions=captions or None, anchors=_stacked(anchors) if anchors else None), bad


def _stacked(anchors: Sequence[Anchor]) -> Pairs:
    images, captions, index, _ = zip(*anchors, strict=True)
    return Pairs(torch.stack(images), captions, torch.tensor(index))


class Place(NamedTuple):
    """A process among those that share the work."""

    rank: int
    world_size: int


class Beside(NamedTuple):
    """Auxiliary data of a training set: captions, anchors, how these are chosen, and where paths start."""

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
        """Split, samples, preprocessing and attack space of a set, for the protocol of a result."""
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
        beside: auxiliary data that is read with them.
        seed: of the run.

    Raises:
        ValueError: a remote set without a `length`, or captions or anchors where none can be.
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
