"""Defines the contract of a data source, and data sets that select, join or check the samples of others."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from robustclip.arguments import checked
from robustclip.data.class_labels import Named, NameLists, by_label, by_list, join
from robustclip.paths import located
from robustclip.types import UNKNOWN


@checked
@dataclass(frozen=True)
class Opened:
    """One split of a data set with its own labels, before these are matched with class names.

    Args:
        dataset: data set that gives ``(image, label)`` by position: a PIL image or a float tensor ``(3, H, W)`` in
            [0, 1], and an integer. An attribute ``labels`` or ``targets`` gives all labels without decoding. None for
            remote shards.
        urls: addresses of remote shards.
        keys: names of its own labels, such as folders, which are matched with class names; None if labels are numbers.
        folders: folder by label, of a list of images.
        names: class names that come with the data, in the order of the labels; None for none.
        templates: prompts that come with the data, each with ``{}``; None for none.
        native_size: attack images at their own size; None uses the catalogue.
    """

    dataset: Any  # a data set, or a sequence of pairs
    urls: tuple[str, ...] = ()
    keys: Sequence[str] | None = None
    folders: dict[int, str] | None = None
    names: Sequence[str] | None = None
    templates: Sequence[str] | None = None
    native_size: bool | None = None

    def named(self, lists: NameLists, where: str, *, is_same_copy: bool) -> tuple[Dataset[Any] | None, Named]:
        """Returns the data set with labels that match the class names, and these names.

        Args:
            lists: class names of the configuration and the catalogue.
            where: start of messages, which names the data set.
            is_same_copy: whether the label order in the catalogue is that of this copy.

        Raises:
            ValueError: labels and names do not match.
        """
        lists = lists._replace(shipped=self.names)
        if self.folders is not None:
            named = by_list(self.folders, lists, where)
        elif self.keys is not None:
            named = join(self.keys, lists, where)
        else:
            named = by_label(lists, where, is_same_copy=is_same_copy)
        labels = named.labels
        if labels is None or (self.keys is not None and labels == {number: number for number in range(len(self.keys))}):
            return self.dataset, named
        if (own := labels_of(self.dataset)) is None:
            raise ValueError(f"{where} has the classes in another order, and labels that only decoding reveals")
        return Relabelled(self.dataset, own, labels), named


class Source(ABC):
    """A source of labelled images; a configuration can name a subclass, as ``my_module.MySet``."""

    @abstractmethod
    def open(self, split: str) -> Opened:
        """Opens one split: reads names and labels, but no image.

        Args:
            split: ``train``, ``test``, or the ``split`` of the configuration.

        Raises:
            ValueError: the data set or the split does not exist.
        """


@dataclass(frozen=True)
class LocatedSource(Source):
    """A source of one of the package's kinds, written ``KIND:LOCATION``.

    Args:
        location: path, address or name after the colon.
        root: folder that relative paths start at.
        is_split_given: whether the configuration names the split.

    Attributes:
        schemes: beginnings of the URLs that this kind reads, such as ``https://``.
    """

    schemes: ClassVar[Sequence[str]] = ()

    location: str
    root: str = "."
    is_split_given: bool = False

    @property
    def path(self) -> str:
        """Path below the root folder, or URL.

        Raises:
            ValueError: this kind cannot read such a URL.
        """
        return located(self.location, self.root, "data source", self.schemes)


def labels_of(dataset: Dataset[Any] | None) -> Sequence[int] | None:
    """Returns the label of every sample; None for a remote set, or one that has no labels without decoding.

    Raises:
        ValueError: a label is no integer.
    """
    for attribute in ("labels", "targets", "_labels", "y"):
        labels: Any = getattr(dataset, attribute, None)
        if hasattr(labels, "__len__") and len(labels) == len(dataset):  # type: ignore[arg-type]
            if all(type(label) is int for label in labels):  # fast, for sets of millions
                return list(labels)
            where = f"attribute {attribute!r} of {type(dataset).__name__}"
            return [class_number(label, f"{where} at place {place}") for place, label in enumerate(labels)]
    return None


def class_number(label: Any, where: str) -> int:
    """Converts a label to an integer.

    Args:
        label: integer, or a scalar of the value of one.
        where: place of the label, for the message.

    Raises:
        ValueError: the label has another value, such as a text or a vector.
    """
    try:
        number = int(label)
        is_number = bool(number == label)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        is_number = False
    if not is_number:
        text = " ".join(repr(label).split())[:80]
        raise ValueError(f"{where} must have the number of a class as label, got {text}")
    return number


def where_of(dataset: Dataset[Any], index: int) -> str:
    """Describes the place of a sample in messages.

    Args:
        dataset: data set, perhaps with a method ``where``.
        index: position of the sample.
    """
    where: str = getattr(dataset, "where", "sample {} of the data set".format)(index)
    return where


class Relabelled(Dataset[Any]):
    """The samples of some labels with new labels, in their order.

    Args:
        source: data set that gives image and label by position.
        labels: labels of all its samples.
        new_labels: new label by old label; samples of any other label are left out.
    """

    def __init__(self, source: Dataset[Any], labels: Sequence[int], new_labels: Mapping[int, int]) -> None:
        self.source = source
        self.positions = [position for position, label in enumerate(labels) if label in new_labels]
        self.labels = [new_labels[labels[position]] for position in self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.source[self.positions[index]][0], self.labels[index]

    @property
    def has_captions(self) -> bool:
        """Whether images of the source have captions."""
        return getattr(self.source, "has_captions", False)

    def captions(self, index: int) -> Sequence[str]:
        """Returns the captions of one image."""
        texts: Sequence[str] = self.source.captions(self.positions[index])  # type: ignore[attr-defined]
        return texts

    def where(self, index: int) -> str:
        """Describes the place of a sample in messages."""
        return where_of(self.source, self.positions[index])


class Joined(ConcatDataset[Any]):
    """The concatenation of several data sets.

    Args:
        sources: data sets that give their labels without decoding.
    """

    def __init__(self, sources: Sequence[Dataset[Any]]) -> None:
        super().__init__(sources)
        labels = [labels_of(source) or () for source in sources]
        self.domains = [number for number, of_source in enumerate(labels) for _ in of_source]
        self.labels = [label for of_source in labels for label in of_source]

    def where(self, index: int) -> str:
        """Describes the place of a sample in messages."""
        number = bisect_right(self.cumulative_sizes, index)
        return where_of(self.datasets[number], index - (self.cumulative_sizes[number - 1] if number else 0))


class CheckedImages(Dataset[Any]):
    """Labelled images of an own data set, which are checked when they are read.

    Args:
        source: data set that gives image and label by position.
        class_count: number of labels.
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
            ValueError: the sample is not a pair of an image and the number of a class.
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
        number, labels = class_number(label, self.where(index)), self.labels
        # The data module has asked for unknown classes before, and a set can only answer by its list of labels.
        if not (0 if labels is None else UNKNOWN) <= number < self.class_count:
            raise ValueError(f"{self.where(index)} has label {number}, but there are {self.class_count} class names")
        if labels is not None and labels[index] != number:
            raise ValueError(
                f"{self.where(index)} has label {number}, but the data set lists {labels[index]} for it; transform both"
            )
        return image, number

    def where(self, index: int) -> str:
        """Describes the place of a sample in messages."""
        return where_of(self.source, index) if hasattr(self.source, "where") else f"sample {index} of {self.name}"

    def _check_tensor(self, image: Tensor, index: int) -> None:
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or not image.is_floating_point():
            got = f"{image.dtype} {tuple(image.shape)}"
            raise ValueError(f"{self.where(index)} must be a float tensor (3, H, W) in [0, 1], got {got}")
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise ValueError(f"{self.where(index)} must have values in [0, 1], got {low:.3g} to {high:.3g}")
