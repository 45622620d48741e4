"""Reads the image embeddings that ``robustclip cache`` has stored, in place of the images."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from robustclip.data.data_source import DataSource
from robustclip.data.opened_source import OpenedSource
from robustclip.data.samples import BadSample, Images, Loaded
from robustclip.data.sources.source import labels_of, where_of
from robustclip.data.transforms import AugmentedPixels, ToPixels
from robustclip.textfiles import read_text
from robustclip.types import Batch

MANIFEST, IDS, LABELS = "manifest.json", "ids.npy", "labels.npy"
# Fields of a source on which no embedding depends; the crop is part of the preprocessing.
IRRELEVANT = ("name", "class_names", "templates", "descriptions", "length", "crop")


@dataclass(frozen=True)
class ImageSet:
    """A set of images that a run uses.

    Args:
        name: ``train``, ``holdout``, ``val/NAME``, ``test/NAME`` or ``unknown/NAME``; also the folder in the cache.
        source: opened data set.
        transform: transform of the view without augmentation.
        chosen: sample ids; None for all.
    """

    name: str
    source: OpenedSource
    transform: ToPixels
    chosen: Sequence[int] | None = None

    @property
    def dataset(self) -> Dataset[Any]:
        """Data set that gives image and label by position.

        Raises:
            ValueError: the source is remote.
        """
        if self.source.dataset is None:
            raise ValueError(f"data source {self.source.task.name!r} is remote; features are made of local images")
        return self.source.dataset

    @property
    def positions(self) -> list[int]:
        """Sample ids in rising order."""
        return sorted(set(range(len(self.dataset)) if self.chosen is None else self.chosen))  # type: ignore[arg-type]

    @property
    def identity(self) -> dict[str, Any]:
        """Properties that distinguish these images from others, in JSON's types."""
        labels = labels_of(self.dataset)
        return {
            "source": [_description(source) for source in self.source.sources],
            "part": self.source.part,
            "split": self.source.split,
            "size": len(self.dataset),  # type: ignore[arg-type]
            "labels": None if labels is None else digest(labels),
            "preprocessing": self.transform.description,
        }


class FeatureCache:
    """A folder of embeddings that ``robustclip cache`` has written.

    Args:
        folder: folder with ``manifest.json``.

    Attributes:
        model: ``arch``, ``pretrained``, ``fingerprint`` and ``image_size`` of the tower, and ``width`` of its output.

    Raises:
        ValueError: the folder is missing or has other content.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads(read_text(folder / MANIFEST))
            self.model: dict[str, Any] = self.manifest["model"]
            self._sets: dict[str, dict[str, Any]] = self.manifest["sets"]
            self._files: dict[str, str] = self.manifest.get("files", {})
            entries = (self.model, self._sets, self._files, *self._sets.values())
            if not all(isinstance(entry, dict) for entry in entries):
                raise TypeError("model, sets and files must be mappings")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            remedy = "`robustclip cache` with this run's options writes it"
            raise ValueError(f"features {str(folder)!r} have no {MANIFEST} that can be read; {remedy}") from error

    def instead_of(self, images: Dataset[Any], sets: Sequence[ImageSet]) -> "FeatureImages":
        """Returns embeddings of the same samples in the same order.

        Args:
            images: images that would be decoded otherwise.
            sets: sets of the run; the images belong to one of them.

        Raises:
            ValueError: the cache has other images, another augmentation or too few samples, of which the message names
                the first difference; or the images are streamed, or have captions or anchors.
        """
        if type(images) is not Images:
            raise ValueError("features stand for labelled images on the disk; remote data, captions, anchors need null")
        same = [image_set for image_set in sets if image_set.source.dataset is images.source]
        owner = next(image_set for image_set in same if {*images.positions} <= {*image_set.positions})
        views = 0
        if isinstance(images.transform, AugmentedPixels):
            views = int(self.manifest["views"])
            made = self.manifest["augmentation"] or dict.fromkeys(asdict(images.transform.augmentation))
            self._compare("augmentation", made, asdict(images.transform.augmentation))
        if owner.name not in self._sets:
            raise ValueError(f"features {self.folder} lack the set {owner.name!r}, they have {', '.join(self._sets)}")
        entry, folder, width = self._sets[owner.name], self.folder / owner.name, self.model.get("width")
        self._compare(owner.name, entry, owner.identity)
        paths = {self.folder / path: digest for path, digest in self._files.items()}
        digests = {path.name: digest for path, digest in paths.items() if path.parent == folder}
        return FeatureImages(images, folder, views=views, bad=entry["bad_samples"], width=width, digests=digests)

    def _compare(self, of: str, made: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        for key, value in json.loads(json.dumps(run)).items():
            if made.get(key) != value:
                difference = f"{key} {made.get(key)!r} of {of}, this run has {value!r}"
                raise ValueError(f"features {self.folder} were made with {difference}; make others elsewhere")


class FeatureImages(Images):
    """Stored embeddings of images, read batch by batch.

    Args:
        images: the images.
        folder: folder of the set.
        views: number of augmented views; epoch ``n`` reads view ``n % views``. 0 reads the view without augmentation.
        bad: ids of samples that did not decode.
        width: length of an embedding; None if the manifest does not state it.
        digests: digests of the files, by name.

    Raises:
        ValueError: a sample has no embedding, or files are damaged or do not belong together.
    """

    def __init__(
        self,
        images: Images,
        folder: Path,
        *,
        views: int,
        bad: Sequence[int],
        width: int | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(images.source, images.transform, images.positions)
        self.folder, self.views, self._width = folder, views, width
        self._unread = dict(digests or {})  # digests of the files that were not read yet
        self._ids, self._labels = (torch.from_numpy(self._load(name, np.int64, 1)) for name in (IDS, LABELS))
        if len(self._ids) != len(self._labels) or not len(self._ids) or not (self._ids[1:] > self._ids[:-1]).all():
            raise ValueError(f"{folder} is damaged: {IDS} must rise and have one label each; make the features anew")
        positions = np.array(images.positions, np.int64)
        self._rows = _rows(self._ids.numpy(), positions)
        if absent := set(positions[self._rows < 0].tolist()) - set(bad):
            count = f"{len(absent)} of {len(positions)} samples, such as {min(absent)}"
            raise ValueError(f"features {folder} lack {count}; make others with this run's choice of samples")
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the view."""
        super().set_epoch(epoch)
        name = file_name(epoch % self.views if self.views else None)
        self._features = self._load(name, np.float16, 2, mmap_mode="r")
        if self._width is not None and self._features.shape[1] != self._width:
            widths = f"width {self._features.shape[1]}, not {self._width}"
            raise ValueError(f"{self.folder / name} is damaged: its embeddings have {widths}; make the features anew")
        if len(self._features) != len(self._ids):
            counts = f"{len(self._features)} embeddings of {len(self._ids)} samples"
            raise ValueError(f"{self.folder} is damaged: it has {counts}; make the features anew")

    def __getitem__(self, number: int) -> Loaded:
        batch, bad = self.__getitems__([number])
        return bad[0] if batch is None else (batch.images[0], int(batch.labels), int(batch.index))

    def __getitems__(self, numbers: Sequence[int]) -> tuple[Batch | None, list[BadSample]]:
        """Returns a batch of embeddings ``(B, D)`` float32, and its undecodable samples; PyTorch defines the name."""
        rows = self._rows[numbers]
        absent = [self.positions[numbers[place]] for place in np.flatnonzero(rows < 0).tolist()]
        bad = [
            BadSample(where_of(self.source, position), "it did not when the features were made") for position in absent
        ]
        rows = rows[rows >= 0]
        if not len(rows):
            return None, bad
        features = torch.from_numpy(self._features[rows]).float()
        if not features.isfinite().all():
            raise ValueError(f"{self.folder} holds embeddings that are not finite; make the features anew")
        return Batch(features, self._labels[rows], self._ids[rows]), bad

    def _load(self, name: str, kind: Any, dimensions: int, **options: Any) -> NDArray[Any]:
        """Reads an array; at the first reading of a file, its digest is checked."""
        path = self.folder / name
        try:
            # An array is indexed faster than the memmap object around the same memory.
            array = np.asarray(np.load(path, allow_pickle=False, **options))
            digest = self._unread.pop(name, None)
            if digest is not None and digest != file_digest(path):
                raise ValueError("the digest differs")
            if array.dtype != kind or array.ndim != dimensions:
                raise ValueError(f"array has {array.ndim} dimensions of {array.dtype}")
        except (OSError, ValueError, EOFError, MemoryError, SyntaxError, TokenError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}); make the features anew") from error
        return array


def digest(numbers: Sequence[int]) -> str:
    """Returns the digest of a list of integers."""
    return hashlib.blake2b(np.array(numbers, np.int64).tobytes(), digest_size=8).hexdigest()


def file_digest(path: Path) -> str:
    """Returns the SHA-256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(view: int | None) -> str:
    """Names the file of a view; None stands for the view without augmentation."""
    return "plain.npy" if view is None else f"view-{view}.npy"


def _description(source: DataSource) -> dict[str, Any]:
    settings = {field.name: getattr(source, field.name) for field in fields(source)} | {"source": source.title}
    return {key: value for key, value in settings.items() if value is not None and key not in IRRELEVANT}


def _rows(ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Finds the row of each sample among rising ids; -1 if it is absent."""
    rows = np.searchsorted(ids, positions).clip(max=len(ids) - 1)
    return np.where(ids[rows] == positions, rows, -1)
