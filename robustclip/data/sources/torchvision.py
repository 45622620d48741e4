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
        """Opens the data set below the root folder."""
        from torchvision import datasets  # here because its import is slow and most runs do not need it

        name, root = self.location, self.root
        cls: Callable[..., Dataset[Any]] | None = getattr(datasets, name, None)
        if name not in datasets.__all__ or cls is None:
            raise ValueError(f"torchvision has no data set {name!r}")
        parameters = inspect.signature(cls).parameters
        known = None if "split" in parameters else ("train", "test") if "train" in parameters else ("all",)
        if self.is_split_given and known and split not in known:
            raise ValueError(f"torchvision:{name} has no split {split!r}; give `split: {' or '.join(known)}`, or none")
        offered = {"root": root, "split": split, "train": split == "train", "download": False, "loader": open_file}
        try:
            dataset = cls(**{key: value for key, value in offered.items() if key in parameters})
        except (RuntimeError, OSError, ValueError, LookupError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"torchvision:{name} does not open below {root!r}: {reason}") from error
        return Opened(dataset, keys=own_names(dataset))


def own_names(dataset: Dataset[Any]) -> list[str] | None:
    """Returns the class names of a data set in the order of its labels; None if it has none."""
    for attribute in ("wnids", "classes", "categories"):
        if names := getattr(dataset, attribute, None):
            return [str(name) for name in names]
    return None
