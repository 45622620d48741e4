"""Images with captions: beside a training set, for anchored fine-tuning, and on their own, for retrieval."""

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

TRIES = 16  # pairs in a row that may be broken before the image beside them is left out

Choice = Literal["pool", "paired"]
Texts = Callable[[int], Sequence[str]]


class Anchor(NamedTuple):
    """One image-text pair: image ``(3, H, W)``, one of its captions, position, and the broken pairs before it."""

    image: Tensor
    caption: str
    index: int  # type: ignore[assignment]
    skipped: tuple[BadSample, ...]


class AnchoredSample(NamedTuple):
    """A decoded sample with what was drawn for it."""

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]
    caption: str | None
    anchor: Anchor | None


class ListTable:
    """A column of lists by sample id, from a parquet file of ``robustclip caption`` or ``robustclip retrieve``.

    Args:
        path: of the file, which has a column ``index`` of sample ids.
        column: the lists.
        size: number of samples of the data set.

    Raises:
        ValueError: no such file or column, or a table of another data set.
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
        """The list of a sample; empty where there is none."""
        row = int(self._rows[index])
        return [] if row < 0 else self._lists[row].as_py() or []

    def greatest(self) -> int:
        """Greatest number in any list; -1 where all are empty."""
        return int(max(self._lists.flatten().to_numpy(), default=-1))


class AnchorSet:
    """Image-text pairs, one drawn for each training image; every draw is a function of seed, epoch and image.

    Args:
        pairs: images and captions.
        transform: from image to pixels.
        seed: of the run.
        neighbours: positions among the pairs by sample id; None draws from all of them.
    """

    def __init__(
        self, pairs: IndexedShards, transform: ToPixels, *, seed: int, neighbours: ListTable | None = None
    ) -> None:
        self.pairs, self.transform, self.seed, self.neighbours = pairs, transform, seed, neighbours
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Orders the pool anew."""
        self.epoch = epoch
        generator = torch.Generator().manual_seed(self._random("order").getrandbits(63))
        self._order = torch.randperm(len(self.pairs), generator=generator)

    def draw(self, number: int, index: int) -> Anchor | BadSample:
        """The pair of a training image.

        The n-th image takes the n-th pair of the epoch's order, round and round, whatever it shows; or, where
        neighbours were given and it has some, one of its own. A pair that does not decode leaves its place to the next.

        Args:
            number: of the image among those that are trained on.
            index: its sample id.
        """
        skipped: list[BadSample] = []
        for position in self._candidates(number, index):
            try:
                image = self.transform(self.pairs[position][0], (self.epoch, position, number))
                caption = self._random("caption", index).choice(self.pairs.captions(position))
            except (*DECODING_ERRORS, IndexError) as error:  # the last for a text without a line
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

    def _random(self, *what: str | int) -> Random:
        return Random(repr((self.seed, self.epoch, *what)))


class AnchoredImages(Images):
    """Training images with one of their captions, and with a pair.

    Args:
        images: to be extended.
        seed: of the run.
        captions: of a sample id; None for no captions.
        anchors: None for no pairs.
    """

    def __init__(self, images: Images, *, seed: int, captions: Texts | None, anchors: AnchorSet | None) -> None:
        super().__init__(images.source, images.transform, images.positions)
        self.seed, self.captions, self.anchors = seed, captions, anchors

    def set_epoch(self, epoch: int) -> None:
        """Chooses what is drawn."""
        super().set_epoch(epoch)
        if self.anchors is not None:
            self.anchors.set_epoch(epoch)

    def __getitem__(self, number: int) -> AnchoredSample | BadSample:  # type: ignore[override]  # more than `Images` has
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
        raise ValueError(f"table {path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def anchored(
    images: Images,
    captions: str | None,
    anchors: str | None,
    choice: Choice,
    root: str,
    *,
    transform: ToPixels,
    seed: int,
) -> Images:
    """Training images with what lies beside them.

    Args:
        images: to be extended.
        captions: ``shards`` for the ``.txt`` beside the images, or the path of a table; None for none.
        anchors: folder with pairs in ``train`` and, to draw paired ones, ``neighbours.parquet``; None for none.
        choice: ``pool`` or ``paired``.
        root: where relative paths start.
        transform: of the pairs' images.
        seed: of the run.

    Raises:
        ValueError: no such files, or files of another data set.
    """
    if captions is None and anchors is None:
        return images
    base = Path(root).expanduser()
    texts = None if captions is None else _open_captions(captions, images.source, base)
    pairs = None if anchors is None else _open_anchors(base / anchors, images.source, choice, transform, seed)
    return AnchoredImages(images, seed=seed, captions=texts, anchors=pairs)


def _open_captions(wanted: str, source: Any, base: Path) -> Texts:
    if wanted != "shards":
        return ListTable(base / wanted, "captions", len(source))
    if not isinstance(source, IndexedShards) or not source.has_captions:
        raise ValueError("captions 'shards' needs .txt files in the shards of the training set; give a table's path")
    return source.captions


def _open_anchors(place: Path, source: Any, choice: Choice, transform: ToPixels, seed: int) -> AnchorSet:
    pairs = IndexedShards([Path(shard) for shard in list_shards(str(place), "train")], is_labelled=False)
    if choice == "pool":
        return AnchorSet(pairs, transform, seed=seed)
    neighbours = ListTable(place / "neighbours.parquet", "neighbours", len(source))
    if (farthest := neighbours.greatest()) >= len(pairs):
        raise ValueError(f"{place}/neighbours.parquet names pair {farthest}, but only {len(pairs)} lie beside it")
    return AnchorSet(pairs, transform, seed=seed, neighbours=neighbours)


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
