"""Decoded samples of any source, as tensors."""

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from robustclip.data.streams import ShuffledShards, StreamedImage, StreamedShards
from robustclip.data.transforms import ToPixels
from robustclip.data.views import where_of
from robustclip.types import UNKNOWN

DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises


class BadSample(NamedTuple):
    """A sample that does not decode: where it lies and what the decoder said."""

    where: str
    why: str


Loaded = tuple[Tensor, int, int] | BadSample
"""Image ``(3, H, W)`` in [0, 1], label, sample id; or what is wrong with it."""


class Images(Dataset[Loaded]):
    """Chosen samples of a map-style source; the sample id is the position in the whole source.

    Args:
        source: gives image and label by position.
        transform: from image to pixels.
        positions: which samples, in this order; None for all.
    """

    def __init__(self, source: Dataset[Any], transform: ToPixels, positions: Sequence[int] | None = None) -> None:
        self.source, self.transform = source, transform
        self.positions = range(len(source)) if positions is None else positions  # type: ignore[arg-type]
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.positions)

    def set_epoch(self, epoch: int) -> None:
        """Chooses what random transforms do."""
        self.epoch = epoch

    def __getitem__(self, number: int) -> Loaded:
        position = self.positions[number]
        try:
            image, label = self.source[position]
            return self.transform(image, (self.epoch, position)), int(label), position
        except DECODING_ERRORS as error:
            return BadSample(where_of(self.source, position), str(error))


class StreamedImages(IterableDataset[Loaded]):
    """Decodes a stream.

    Args:
        source: encoded images.
        transform: from image to pixels.
        class_count: labels must be below it; None for images whose classes are all unknown.
    """

    def __init__(self, source: StreamedShards | ShuffledShards, transform: ToPixels, class_count: int | None) -> None:
        self.source, self.transform, self.class_count = source, transform, class_count
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]  # a TypeError is how a stream says that nobody knows

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of a shuffled stream, and what random transforms do."""
        self.epoch = epoch
        if isinstance(self.source, ShuffledShards):
            self.source.epoch = epoch

    def __iter__(self) -> Iterator[Loaded]:
        for sample in self.source:
            if self.class_count is None:
                sample = sample._replace(label=UNKNOWN)
            elif sample.label >= self.class_count:
                raise ValueError(f"{sample.where} has label {sample.label}, but there are {self.class_count} classes")
            yield self._decode(sample)

    def _decode(self, sample: StreamedImage) -> Loaded:
        try:
            image = Image.open(io.BytesIO(sample.data))
            return self.transform(image, (self.epoch, sample.index)), sample.label, sample.index
        except DECODING_ERRORS as error:
            return BadSample(sample.where, str(error))
