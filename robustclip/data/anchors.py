"""Reads images with captions, for anchored fine-tuning and for retrieval."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustclip.data.decoding import DECODING_ERRORS
from robustclip.data.samples import BadSample, Images
from robustclip.data.sources.wds import IndexedShards, list_shards
from robustclip.data.transforms import ToPixels

TRIES = 16  # number of undecodable pairs in a row after which the training image is left out

Choice = Literal["pool", "paired"]
Texts = Callable[[int], Sequence[str]]


class Anchor(NamedTuple):
    """An image-text pair that was drawn for a training image.

    Attributes:
        image: ``(3, H, W)`` in [0, 1].
        caption: one of its captions.
        index: position among the pairs.
        skipped: undecodable pairs that were drawn first.
    """

    image: Tensor
    caption: str
    index: int  # type: ignore[assignment]
    skipped: tuple[BadSample, ...]


class AnchoredSample(NamedTuple):
    """A decoded training sample with a caption and an image-text pair.

    Attributes:
        image: ``(3, H, W)`` in [0, 1].
        label: class of the image.
        index: sample id.
        caption: one of its captions; None without captions.
        anchor: image-text pair; None without pairs.
    """

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]
    caption: str | None
    anchor: Anchor | None


class ListTable:
    """Lists by sample id, read from a parquet file of ``robustclip caption`` or ``robustclip retrieve``.

    Args:
        path: path of the file, which has a column ``index`` of sample ids.
        column: name of the column with the lists.
        size: number of samples of the data set.

    Raises:
        ValueError: the file or the column is missing, or the table belongs to another data set.
    """

    def __init__(self, path: Path, column: str, size: int) -> None:
        table = _read(path)
        if not {"index", column} <= set(table.column_names):
            raise ValueError(f"table {path} must have the columns index and {column}, it has {table.column_names}")
        index = table["index"].to_numpy()
        if not len(index) or index.min() < 0 or index.max() >= size:
            raise ValueError(
                f"table {path} is of another data set: its ids must be in [0, {size - 1}], of {size} samples"
            )
        self._lists = table[column].combine_chunks()
        self._rows = np.full(size, -1)
        self._rows[index] = np.arange(len(index))

    def __call__(self, index: int) -> Sequence[Any]:
        """Returns the list of a sample; empty if there is none."""
        row = int(self._rows[index])
        return [] if row < 0 else self._lists[row].as_py() or []

    def greatest(self) -> int:
        """Returns the greatest number in any list; -1 if all are empty."""
        return int(max(self._lists.flatten().to_numpy(), default=-1))


class AnchorSet:
    """Image-text pairs, of which one is drawn for each training image; seed, epoch and image determine the draw.

    Args:
        pairs: images with captions.
        transform: transform of the images.
        seed: seed of the run.
        neighbours: positions among the pairs by sample id; None draws from all pairs.
    """

    def __init__(
        self, pairs: IndexedShards, transform: ToPixels, *, seed: int, neighbours: ListTable | None = None
    ) -> None:
        self.pairs, self.transform, self.seed, self.neighbours = pairs, transform, seed, neighbours
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shuffles the pool for an epoch."""
        self.epoch = epoch
        generator = torch.Generator().manual_seed(self._random("order").getrandbits(63))
        self._order = torch.randperm(len(self.pairs), generator=generator)

    def draw(self, number: int, index: int) -> Anchor | BadSample:
        """Draws the pair of a training image, or returns the first undecodable pair if no candidate decodes.

        The n-th image takes the n-th pair of the epoch's order, which repeats, regardless of its content; an image with
        neighbours takes one of these instead. A pair that does not decode is replaced by the next one.

        Args:
            number: position of the image in the training set.
            index: its sample id.
        """
        skipped: list[BadSample] = []
        for position in self._candidates(number, index):
            try:
                image = self.transform(self.pairs[position][0], (self.epoch, position, number))
                caption = self._random("caption", index).choice(self.pairs.captions(position))
            except (*DECODING_ERRORS, IndexError) as error:  # an IndexError for a text without a line
                skipped.append(BadSample(self.pairs.where(position), str(error)))
            else:
                return Anchor(image, caption, position, tuple(skipped))
        return skipped[0]

    def _candidates(self, number: int, index: int) -> Sequence[int]:
        near = [] if self.neighbours is None else [int(position) for position in self.neighbours(index)]
        if near:
            start = self._random("neighbour", index).randrange(len(near))
            return near[start:] + near[:start]
        size = len(self.pairs)
        return [int(self._order[(number + step) % size]) for step in range(min(TRIES, size))]

    def _random(self, *key: str | int) -> Random:
        return Random(repr((self.seed, self.epoch, *key)))


class AnchoredImages(Images):
    """Training images with one of their captions and an image-text pair.

    Args:
        images: training images.
        seed: seed of the run.
        captions: function that returns the captions of a sample id; None for no captions.
        anchors: image-text pairs; None for no pairs.
    """

    def __init__(self, images: Images, *, seed: int, captions: Texts | None, anchors: AnchorSet | None) -> None:
        super().__init__(images.source, images.transform, images.positions)
        self.seed, self.captions, self.anchors = seed, captions, anchors

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which all draws depend."""
        super().set_epoch(epoch)
        if self.anchors is not None:
            self.anchors.set_epoch(epoch)

    def __getitem__(self, number: int) -> AnchoredSample | BadSample:  # type: ignore[override]  # a longer tuple than that of `Images`
        sample = super().__getitem__(number)
        if isinstance(sample, BadSample):
            return sample
        drawn = None if self.anchors is None else self.anchors.draw(number, sample[2])
        return drawn if isinstance(drawn, BadSample) else AnchoredSample(*sample, self._text(sample[2]), drawn)

    def _text(self, index: int) -> str | None:
        if self.captions is None:
            return None
        return Random(repr((self.seed, self.epoch, index))).choice(self.captions(index) or [""])


def _read(path: Path) -> Any:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("tables of captions and neighbours need pyarrow: pip install 'robustclip[anchors]'") from error
    if not path.is_file():
        raise ValueError(f"table {path} is no file; `robustclip caption` and `robustclip retrieve` write such tables")
    try:
        return parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"table {path} must be a parquet file of `robustclip caption`: {' '.join(str(error).split())[:150]}; "
            "a CSV file is read as data.train list:FILE.csv with captions list"
        ) from error


class AuxiliaryData(NamedTuple):
    """Settings of the captions and image-text pairs that are read with a training set.

    Attributes:
        captions: ``shards`` for the ``.txt`` files of the images, ``list`` for a column of their CSV file, or the path
            of a table; None for no captions.
        anchors: folder with pairs in ``train`` and, to draw paired ones, ``neighbours.parquet``; None for no pairs.
        choice: ``pool`` draws any pair, ``paired`` a neighbour of the image.
        root: folder that relative paths start at.
    """

    captions: str | None
    anchors: str | None
    choice: Choice
    root: str

    @property
    def is_given(self) -> bool:
        """Whether there are captions or pairs."""
        return self.captions is not None or self.anchors is not None

    def added_to(self, images: Images, transform: ToPixels, seed: int) -> Images:
        """Adds captions and pairs to training images.

        Args:
            images: training images.
            transform: transform of the pairs' images.
            seed: seed of the run.

        Raises:
            ValueError: a file is missing, or belongs to another data set.
        """
        if not self.is_given:
            return images
        folder = Path(self.root).expanduser()
        texts = None if self.captions is None else _open_captions(self.captions, images.source, folder)
        pairs = None
        if self.anchors is not None:
            pairs = _open_anchors(folder / self.anchors, images.source, self.choice, transform, seed)
        return AnchoredImages(images, seed=seed, captions=texts, anchors=pairs)


def _open_captions(setting: str, source: Any, folder: Path) -> Texts:
    if setting not in ("shards", "list"):
        return ListTable(folder / setting, "captions", len(source))
    if not getattr(source, "has_captions", False):
        raise ValueError(
            f"captions {setting!r} needs captions of the training images: .txt files in their shards or a column "
            "`caption` in their list; give a table's path"
        )
    texts: Texts = source.captions
    return texts


def _open_anchors(folder: Path, source: Any, choice: Choice, transform: ToPixels, seed: int) -> AnchorSet:
    pairs = _pairs_in(folder, "train")
    if choice == "pool":
        return AnchorSet(pairs, transform, seed=seed)
    neighbours = ListTable(folder / "neighbours.parquet", "neighbours", len(source))
    if (farthest := neighbours.greatest()) >= len(pairs):
        raise ValueError(f"{folder}/neighbours.parquet names pair {farthest}, but only {len(pairs)} lie beside it")
    return AnchorSet(pairs, transform, seed=seed, neighbours=neighbours)


def _pairs_in(folder: Path, split: str) -> IndexedShards:
    return IndexedShards([Path(shard) for shard in list_shards(str(folder), split)], is_labelled=False)


class CaptionedImages:
    """Batches of images ``(B, 3, H, W)`` in [0, 1] with the list of captions of each image, in order.

    Args:
        folder: folder with shards in ``test`` that have a ``KEY.txt``, one caption a line; its name is that of the set.
        transform: transform of the images to one size.
        batch_size: images per batch.

    Raises:
        ValueError: the shards are missing or an image has no captions; during iteration, an image does not decode.
    """

    def __init__(self, folder: Path, transform: ToPixels, *, batch_size: int) -> None:
        self.name = folder.name.lower()
        self.shards = _pairs_in(folder, "test")
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
