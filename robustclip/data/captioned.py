"""Images with all their captions, for retrieval."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from robustclip.data.decoding import DECODING_ERRORS
from robustclip.data.sources.wds import IndexedShards, list_shards
from robustclip.data.transforms import ToPixels


class CaptionedImages:
    """Batches of images ``(B, 3, H, W)`` in [0, 1], each image with its captions; in order, from front to back.

    Args:
        folder: of shards with ``KEY.txt``, one caption a line, in ``test``; its name is that of the set.
        transform: from image to pixels of one size.
        batch_size: images at once.

    Raises:
        ValueError: no such shards, an image without captions or, on the way, one that does not decode.
    """

    def __init__(self, folder: Path, transform: ToPixels, *, batch_size: int) -> None:
        self.name = folder.name.lower()
        self.shards = IndexedShards([Path(shard) for shard in list_shards(str(folder), "test")], is_labelled=False)
        self.transform, self.batch_size = transform, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, list[list[str]]]]:
        for start in range(0, len(self.shards), self.batch_size):
            chosen = range(start, min(start + self.batch_size, len(self.shards)))
            yield torch.stack([self._pixels(number) for number in chosen]), [*map(self.shards.captions, chosen)]

    def _pixels(self, number: int) -> Tensor:
        try:
            return self.transform(self.shards[number][0])
        except DECODING_ERRORS as error:
            raise ValueError(f"{self.shards.where(number)} does not decode: {error}") from error
