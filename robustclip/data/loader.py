"""Loads batches of images; undecodable samples are counted, and training resumes inside an epoch."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from robustclip.data.anchors import AnchoredSample
from robustclip.data.feature_cache import FeatureImages
from robustclip.data.samples import BadSample, Images, Loaded, StreamedImages, digest_of
from robustclip.data.transforms import in_unit_range
from robustclip.types import Batch, Pairs

log = logging.getLogger(__name__)


class ImageLoader(DataLoader[Loaded]):
    """Yields each `Batch` of an epoch, and can resume inside the epoch.

    Args:
        dataset: data set of `Loaded` samples.
        skips_bad_samples: leave out and count undecodable samples instead of raising an error.
        first_epoch: number of the epoch of the first iteration.
        name: name of the set, for messages.
        has_digests: hash the pixels of every image, in the loader's workers.
        kwargs: other arguments of the ``DataLoader``.

    Raises:
        ValueError: during iteration, if a sample does not decode and is not skipped.
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
        if isinstance(dataset, FeatureImages):  # these come as whole batches, faster than from a worker
            kwargs |= {"collate_fn": unchanged, "num_workers": 0}
        # Without a generator of its own, a loader draws the workers' seed from the global random stream.
        super().__init__(dataset, generator=torch.Generator().manual_seed(0), **kwargs)
        self.skips_bad_samples = skips_bad_samples
        self.bad_samples: list[BadSample] = []
        self.cut_after: int | None = None  # number of batches that the trainer uses of an epoch; None for all
        self._epoch = first_epoch
        self._batches_done = 0
        self._has_begun = False

    def __len__(self) -> int:
        """Returns the number of batches, at least 1.

        With 0 batches, Lightning would skip the evaluation of this process, and all others would wait for its counts.
        """
        if not isinstance(self.dataset, IterableDataset):
            return max(1, super().__len__())
        workers = max(1, self.num_workers)
        length = len(self.dataset)  # type: ignore[arg-type]  # raises a TypeError for a stream of unknown length
        shares = [length // workers + (worker < length % workers) for worker in range(workers)]
        size = cast(int, self.batch_size)
        return max(1, sum(share // size if self.drop_last else -(-share // size) for share in shares))

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self._has_begun:
            self._epoch, self._batches_done = self._epoch + 1, 0
        self._has_begun = True
        if isinstance(self.dataset, Images | StreamedImages):  # Lightning sets the epoch of samplers only
            self.dataset.set_epoch(self._epoch)
        self.bad_samples.clear()
        batches = self._length()
        for batch, bad in self._from(self._batches_done):
            self._batches_done += 1
            if bad and not self.skips_bad_samples:
                raise ValueError(f"{bad[0].where} does not decode: {bad[0].why}; `bad_samples: skip` leaves it out")
            self.bad_samples.extend(bad)
            if self._batches_done == batches:  # Lightning never requests the end of the iteration
                self._report_bad_samples()
            if batch is not None:
                yield batch
        if self._batches_done != batches:
            self._report_bad_samples()

    def _length(self) -> int | None:
        try:
            return len(self)
        except TypeError:  # a stream of unknown length
            return None

    def _report_bad_samples(self) -> None:
        if self.bad_samples:
            log.warning("%d samples did not decode, the first: %s", len(self.bad_samples), self.bad_samples[0].where)

    def _from(self, done: int) -> Iterator[tuple[Batch | None, list[BadSample]]]:
        """Yields the batches of this epoch after the first ``done``; only streams have to read the skipped ones."""
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
        """Returns the numbers of the next epoch and batch."""
        if self._batches_done >= min(len(self), self.cut_after or len(self)):
            return {"epoch": self._epoch + 1, "batches": 0}
        return {"epoch": self._epoch, "batches": self._batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Moves the start of the next iteration to a saved position."""
        self._epoch, self._batches_done, self._has_begun = state["epoch"], state["batches"], False


def unchanged(batch: tuple[Batch | None, list[BadSample]]) -> tuple[Batch | None, list[BadSample]]:
    """Returns a batch that is complete already; workers cannot receive a lambda."""
    return batch


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Stacks images of either type to ``(B, 3, H, W)`` float32 in [0, 1]; 8-bit images are converted all at once."""
    if any(image.is_floating_point() for image in images):
        return torch.stack([in_unit_range(image) for image in images])
    return in_unit_range(torch.stack(tuple(images)))


def collate(
    samples: Sequence[Loaded | AnchoredSample], *, name: str = "data", has_digests: bool = False
) -> tuple[Batch | None, list[BadSample]]:
    """Stacks the decoded samples of a batch, and lists the others.

    Args:
        samples: samples of the batch.
        name: name of the set, for messages.
        has_digests: hash the pixels of every image.

    Raises:
        ValueError: images have several sizes.
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
    batch = Batch(_stacked(images), torch.tensor(labels), torch.tensor(index), digests=digests)
    anchored = [sample for sample in good if isinstance(sample, AnchoredSample)]
    captions = tuple(sample.caption for sample in anchored if sample.caption is not None)
    batch = batch._replace(captions=captions or None)
    if anchors := [sample.anchor for sample in anchored if sample.anchor is not None]:
        images, captions, index, skipped = zip(*anchors, strict=True)
        bad += itertools.chain(*skipped)
        batch = batch._replace(anchors=Pairs(torch.stack(images), captions, torch.tensor(index)))
    return batch, bad
