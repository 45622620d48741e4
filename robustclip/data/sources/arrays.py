"""Images in NumPy files, in the layout of CIFAR-10-C: one file per corruption, whose labels stand beside it."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from robustclip.data.sources.source import LocatedSource, Opened

SEVERITIES = ("1", "2", "3", "4", "5")  # the blocks of a file, in this order
LABELS = "labels.npy"


class ArraySource(LocatedSource):
    """Images of one corruption in a file such as ``npy:CIFAR-10-C/fog.npy``, with their labels in ``labels.npy``.

    The file has the images ``(5 N, H, W, 3)`` uint8 of the severities 1 to 5, one after another, and ``labels.npy`` the
    labels ``(5 N,)``, which repeat five times. The split names a severity; without one, all are read.
    """

    def open(self, split: str) -> Opened:
        """Reads the labels and checks the shape of the images.

        Raises:
            ValueError: a file is missing or has another layout, or there is no such severity.
        """
        path = Path(self.path)
        if self.is_split_given and split not in SEVERITIES:
            raise ValueError(f"npy:{self.location} has no split {split!r}; give a severity from '1' to '5', or none")
        images = _mapped(path, "images (5 N, H, W, 3) uint8")
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) % len(SEVERITIES):
            raise ValueError(f"{path} must have images (5 N, H, W, 3) of uint8, found {images.shape} of {images.dtype}")
        labels = _labels(path.parent / LABELS, len(images))
        size = len(images) // len(SEVERITIES)
        first = SEVERITIES.index(split) * size if self.is_split_given else 0
        count = size if self.is_split_given else len(images)
        return Opened(ArrayImages(path, first, labels[first : first + count].tolist()))


def _labels(path: Path, count: int) -> NDArray[Any]:
    """Reads the labels of all severities, which are the same ones for each."""
    labels = _mapped(path, "labels (5 N,) of integers")
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path} must have {count} integer labels, one per image, found {labels.shape} of {labels.dtype}"
        )
    blocks = labels.reshape(len(SEVERITIES), -1)
    if (blocks != blocks[0]).any() or (labels < 0).any():
        raise ValueError(f"{path} must have the labels of one severity five times, all at least 0; found others")
    return labels


def _mapped(path: Path, content: str) -> NDArray[Any]:
    """Maps a file into memory, without running code that it may contain."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; the layout of CIFAR-10-C has {content} there")
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} must be a NumPy file of {content}: {' '.join(str(error).split())}") from error
    if not isinstance(array, np.ndarray):  # an archive of arrays, whatever its name
        raise ValueError(
            f"{path} must be a NumPy file of {content}, found an archive (.npz); save one array by np.save"
        )
    return array


class ArrayImages(Dataset[Any]):
    """Consecutive images of a NumPy file.

    Args:
        path: file of images ``(N, H, W, 3)`` uint8.
        first: position of the first image.
        labels: labels of the images.
    """

    def __init__(self, path: Path, first: int, labels: list[int]) -> None:
        self.path, self.first, self.labels = path, first, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        # The file is mapped anew, which reads its header alone: a loader process would copy an open map as a whole.
        images = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return Image.fromarray(np.array(images[self.first + index])), self.labels[index]

    def where(self, index: int) -> str:
        """Describes the place of a sample in messages."""
        return f"image {self.first + index} of {self.path}"
