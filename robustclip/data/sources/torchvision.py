"""Data sets of torchvision."""

import inspect
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from robustclip.data.decoding import open_file
from robustclip.data.sources.source import LocatedSource, Opened


class Torchvision(LocatedSource):
    """A data set of torchvision by the name of its class, such as ``torchvision:CIFAR10``."""

    def open(self, split: str) -> Opened:
        """Opens the data set below the root."""
        dataset = _open_torchvision(self.location, self.root, split, is_asked=self.is_split_given)
        return Opened(dataset, keys=own_names(dataset))


def _open_torchvision(name: str, root: str, split: str, *, is_asked: bool) -> Dataset[Any]:
    from torchvision import datasets  # here because its import is slow and most runs do not need it

    cls: Callable[..., Dataset[Any]] | None = getattr(datasets, name, None)
    if name not in datasets.__all__ or cls is None:
        raise ValueError(f"torchvision has no data set {name!r}")
    takes = inspect.signature(cls).parameters
    known = None if "split" in takes else ("train", "test") if "train" in takes else ("all",)
    if is_asked and known and split not in known:
        raise ValueError(f"torchvision:{name} has no split {split!r}; give `split: {' or '.join(known)}`, or none")
    offered = {"root": root, "split": split, "train": split == "train", "download": False, "loader": open_file}
    try:
        return cls(**{key: value for key, value in offered.items() if key in takes})
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        raise ValueError(f"torchvision:{name} does not open below {root!r}: {' '.join(str(error).split())}") from error


def own_names(dataset: Dataset[Any]) -> list[str] | None:
    """Class names in the order of the labels, if the data set has any."""
    for attribute in ("wnids", "classes", "categories"):
        if names := getattr(dataset, attribute, None):
            return [str(name) for name in names]
    return None
