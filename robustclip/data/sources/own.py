"""Data sets of a user, as objects or by the path of their class."""

import importlib
import inspect
import re
from typing import Any

from torch.utils.data import Dataset

from robustclip.data.sources.source import Opened, Source
from robustclip.data.sources.torchvision import own_names

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class OwnDataset(Source):
    """A ``torch.utils.data.Dataset`` of a user, whose attribute ``classes`` names its labels if there is one.

    Args:
        dataset: gives ``(image, label)`` by position, as `Opened` describes.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def open(self, split: str) -> Opened:
        """Takes the data set as it is, whatever the split."""
        return Opened(self.dataset, keys=own_names(self.dataset))


def own_source(given: Any, split: str, root: str) -> Source:
    """A source of the user's: an object, or one that is made from the path of its class.

    Args:
        given: a `Source`, a data set, or the path of a class of these.
        split: given to a constructor that takes ``split``; ``train`` becomes true for one that takes ``train``.
        root: given to a constructor that demands ``root``.

    Raises:
        ValueError: no such class, or one that is neither or does not start.
    """
    if isinstance(given, str):
        made = _class_at(given)
        takes = inspect.signature(made).parameters
        offered = {"split": split, "train": split == "train"}
        if "root" in takes and takes["root"].default is inspect.Parameter.empty:
            offered["root"] = root
        try:
            given = made(**{key: value for key, value in offered.items() if key in takes})
        except TypeError as error:
            remedy = f"`source: {{class_path: {given}, init_args: {{...}}}}` gives arguments"
            raise ValueError(f"data source {given!r} cannot be made: {error}; {remedy}") from error
    return given if isinstance(given, Source) else OwnDataset(given)


def _class_at(path: str) -> Any:
    """The class of a `Source` or a data set at a path such as ``my_module.MySet``."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data source {path!r} cannot be imported: {error}; start where {module} lies") from error
    if not (isinstance(found, type) and (issubclass(found, Source) or hasattr(found, "__getitem__"))):
        raise ValueError(f"data source {path!r} must be a class of Source or torch.utils.data.Dataset")
    return found
