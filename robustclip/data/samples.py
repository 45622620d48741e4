"""Decodes the samples of any source to tensors."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from robustclip.data.decoding import DECODING_ERRORS, open_image
from robustclip.data.sources.source import where_of
from robustclip.data.sources.streams import ShuffledShards, StreamedImage, StreamedShards
from robustclip.data.transforms import ToPixels, in_unit_range
from robustclip.types import UNKNOWN


class BadSample(NamedTuple):
    """A sample that does not decode.

    Attributes:
        where: place of the sample, for messages.
        why: message of the decoder.
    """

    where: str
    why: str


Loaded = tuple[Tensor, int, int] | BadSample
"""Image ``(3, H, W)`` of `ToPixels.stored`, label and sample id; or the record of a sample that does not decode."""


class Images(Dataset[Loaded]):
    """Chosen samples of a map-style source; the sample id is the position in the whole source.

    Args:
        source: data set that gives image and label by position.
        transform: transform of the images.
        positions: positions of the samples, in this order; None for all.
    """

    def __init__(self, source: Dataset[Any], transform: ToPixels, positions: Sequence[int] | None = None) -> None:
        self.source, self.transform = source, transform
        self.positions = range(len(source)) if positions is None else positions  # type: ignore[arg-type]
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.positions)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which random transforms depend."""
        self.epoch = epoch

    def __getitem__(self, number: int) -> Loaded:
        position = self.positions[number]
        try:
            image, label = self.source[position]
            return self.transform.stored(image, (self.epoch, position)), int(label), position
        except DECODING_ERRORS as error:
            return BadSample(where_of(self.source, position), str(error))


class StreamedImages(IterableDataset[Loaded]):
    """Decoded samples of a stream.

    Args:
        source: stream of encoded images.
        transform: transform of the images.
        class_count: number of labels; None if the classes of all images are unknown.
        only: sample ids to decode; None for all.
    """

    def __init__(
        self,
        source: StreamedShards | ShuffledShards,
        transform: ToPixels,
        class_count: int | None,
        only: frozenset[int] | None = None,
    ) -> None:
        self.source, self.transform, self.class_count, self.only = source, transform, class_count, only
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]  # raises a TypeError for a stream of unknown length

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which the order of a shuffled stream and random transforms depend."""
        self.epoch = epoch
        if isinstance(self.source, ShuffledShards):
            self.source.epoch = epoch

    def __iter__(self) -> Iterator[Loaded]:
        for sample in self._chosen():
            if self.class_count is None:
                sample = sample._replace(label=UNKNOWN)
            elif sample.label >= self.class_count:
                raise ValueError(f"{sample.where} has label {sample.label}, but there are {self.class_count} classes")
            yield self._decode(sample)

    def _chosen(self) -> Iterator[StreamedImage]:
        """Yields the samples to decode; since sample ids of a stream rise, it need not be read to its end."""
        if self.only is None:
            yield from self.source
            return
        last = max(self.only, default=-1)
        for sample in takewhile(lambda sample: sample.index <= last, self.source):
            if sample.index in self.only:
                yield sample

    def _decode(self, sample: StreamedImage) -> Loaded:
        try:
            pixels = self.transform.stored(open_image(sample.data), (self.epoch, sample.index))
            return pixels, sample.label, sample.index
        except DECODING_ERRORS as error:
            return BadSample(sample.where, str(error))


def digest_of(image: Tensor) -> str:
    """Hashes the pixels of one image to 16 hexadecimal digits, which are equal for equal pixels of either type.

    Args:
        image: ``(3, H, W)`` uint8, or float32 in [0, 1].
    """
    if image.is_floating_point():
        eight_bits = (image * 255).round().to(torch.uint8)
        image = eight_bits if torch.equal(in_unit_range(eight_bits), image) else image
    digest = hashlib.sha256(repr((tuple(image.shape), str(image.dtype))).encode())
    digest.update(image.permute(1, 2, 0).contiguous().numpy().data)  # the order in which images are decoded
    return digest.hexdigest()[:16]
