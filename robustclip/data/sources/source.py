"""The contract of a source, and the data sets that are made of others without reading an image."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from robustclip.arguments import checked
from robustclip.data.class_labels import Named, Words, by_label, by_list, join
from robustclip.paths import located
from robustclip.types import UNKNOWN


@checked
@dataclass(frozen=True)
class Opened:
    """A data set under its own labels.

    Args:
        dataset: gives ``(image, label)`` by position: a PIL image or a float tensor ``(3, H, W)`` in [0, 1], and an
            integer. An attribute ``labels`` or ``targets`` gives all labels without decoding. None for remote shards.
        urls: addresses of remote shards.
        keys: names of its own labels, such as folders, which are joined to class names by name; None where labels are
            numbers.
        folders: folder by label, of a list of images.
        names: class names in the order of its labels, if it brings any.
        templates: prompts that it brings, each with ``{}``.
        native_size: attack its images at their own size; None looks the set up in the catalogue.
    """

    dataset: Any  # a data set, or a sequence of pairs
    urls: tuple[str, ...] = ()
    keys: Sequence[str] | None = None
    folders: dict[int, str] | None = None
    names: Sequence[str] | None = None
    templates: Sequence[str] | None = None
    native_size: bool | None = None

    def named(self, words: Words, where: str, *, is_same_copy: bool) -> tuple[Dataset[Any] | None, Named]:
        """The data set under the labels of its class names, and these.

        Args:
            words: of the configuration and the catalogue.
            where: data set, for messages.
            is_same_copy: whether the catalogue describes the label order of this very copy.

        Raises:
            ValueError: labels and names do not go together.
        """
        words = words._replace(beside=self.names)
        if self.folders is not None:
            named = by_list(self.folders, words, where)
        elif self.keys is not None:
            named = join(self.keys, words, where)
        else:
            named = by_label(words, where, is_same_copy=is_same_copy)
        labels = named.labels
        if labels is None or (self.keys is not None and labels == {number: number for number in range(len(self.keys))}):
            return self.dataset, named
        own = None if self.dataset is None else labels_of(self.dataset)
        if self.dataset is None or own is None:
            raise ValueError(f"{where} has the classes in another order, and labels that only decoding reveals")
        return Relabelled(self.dataset, own, labels), named


class Source(ABC):
    """A place that images with labels come from; a subclass can be named in a configuration, as ``my_module.MySet``."""

    @abstractmethod
    def open(self, split: str) -> Opened:
        """Opens one split; reads names and labels, no image.

        Args:
            split: ``train``, ``test``, or the ``split`` of the configuration.

        Raises:
            ValueError: no such data set or split.
        """


@dataclass(frozen=True)
class LocatedSource(Source):
    """A source of the package's own kinds, written ``KIND:LOCATION``.

    Args:
        location: path, address or name behind the colon.
        root: folder that relative paths start at.
        is_split_given: whether the configuration names the split.
    """

    schemes: ClassVar[Sequence[str]] = ()  # of addresses that are no local path

    location: str
    root: str = "."
    is_split_given: bool = False

    @property
    def path(self) -> str:
        """The complete path, or the address.

        Raises:
            ValueError: an address that cannot be read.
        """
        return located(self.location, self.root, "data source", self.schemes)


def labels_of(dataset: Dataset[Any]) -> Sequence[int] | None:
    """Labels of every sample where the data set has them without decoding."""
    for attribute in ("labels", "targets", "_labels", "y"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):  # type: ignore[arg-type]
            return [int(label) for label in labels]
    return None


def where_of(dataset: Dataset[Any], index: int) -> str:
    """Where a sample lies, for messages."""
    where: str = getattr(dataset, "where", "sample {} of the data set".format)(index)
    return where


class Relabelled(Dataset[Any]):
    """The samples of some labels, under new labels, in their order.

    Args:
        source: gives image and label by position.
        labels: of all samples of the source.
        new_labels: by old label; samples of any other are left out.
    """

    def __init__(self, source: Dataset[Any], labels: Sequence[int], new_labels: Mapping[int, int]) -> None:
        self.source = source
        self.positions = [position for position, label in enumerate(labels) if label in new_labels]
        self.labels = [new_labels[labels[position]] for position in self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.source[self.positions[index]][0], self.labels[index]

    def where(self, index: int) -> str:
        """Where the source has a sample."""
        return where_of(self.source, self.positions[index])


class Joined(Dataset[Any]):
    """Data sets one after the other, numbered through.

    Args:
        sources: data sets that give their labels without decoding.
    """

    def __init__(self, sources: Sequence[Dataset[Any]]) -> None:
        self.sources = sources
        sizes = [len(source) for source in sources]  # type: ignore[arg-type]
        self._ends = list(accumulate(sizes))
        self.domains = [number for number, size in enumerate(sizes) for _ in range(size)]
        self.labels = [label for source in sources for label in labels_of(source) or ()]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        source, position = self._place(index)
        return source[position]

    def where(self, index: int) -> str:
        """Where the source has a sample."""
        return where_of(*self._place(index))

    def _place(self, index: int) -> tuple[Dataset[Any], int]:
        number = bisect_right(self._ends, index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)


class CheckedImages(Dataset[Any]):
    """Labelled images of a user's data set, each of which is checked when it is read.

    Args:
        source: gives image and label by position.
        class_count: labels must be below it.
        name: name of the data set, for messages.
    """

    def __init__(self, source: Dataset[Any], class_count: int, name: str) -> None:
        self.source, self.class_count, self.name = source, class_count, name
        self.labels = labels_of(source)

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        """Returns one image and its label.

        Raises:
            ValueError: the data set yields no pair, no image, or a label that is no class.
        """
        sample = self.source[index]
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise ValueError(f"{self.where(index)} must be (image, label), got {type(sample).__name__}")
        image, label = sample
        if isinstance(image, Tensor):
            self._check_tensor(image, index)
        elif not isinstance(image, Image.Image):
            kind = type(image).__name__
            raise ValueError(f"{self.where(index)} must be a PIL image or a tensor (3, H, W) in [0, 1], got {kind}")
        if int(label) != label or not UNKNOWN <= label < self.class_count:
            raise ValueError(f"{self.where(index)} has label {label}, but there are {self.class_count} class names")
        return image, int(label)

    def where(self, index: int) -> str:
        """Names a sample, for messages."""
        return where_of(self.source, index) if hasattr(self.source, "where") else f"sample {index} of {self.name}"

    def _check_tensor(self, image: Tensor, index: int) -> None:
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            got = f"{image.dtype} {tuple(image.shape)}"
            raise ValueError(f"{self.where(index)} must be a float tensor (3, H, W) in [0, 1], got {got}")
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(f"{self.where(index)} must have values in [0, 1], got {low:.3g} to {high:.3g}")
