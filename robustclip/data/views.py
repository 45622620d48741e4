"""Data sets made of others without reading an image: a part with other labels, or several one after the other."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset


def labels_of(dataset: Dataset[Any]) -> Sequence[int] | None:
    """Labels of every sample where the data set tells them without decoding."""
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
        sources: of which each tells its labels.
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
