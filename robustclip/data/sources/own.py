"""Own data sets, given as objects or by the path of their class."""

import importlib
import inspect
import re
from typing import Any

from torch.utils.data import Dataset

from robustclip.data.sources.source import Opened, Source
from robustclip.data.sources.torchvision import own_names

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class OwnDataset(Source):
    """An own ``torch.utils.data.Dataset``, whose attribute ``classes`` names its labels if there is one.

    Args:
        dataset: data set that gives ``(image, label)`` by position, as `Opened` describes.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def open(self, split: str) -> Opened:
        """Returns the same data set for every split."""
        return Opened(self.dataset, keys=own_names(self.dataset))


def own_source(source: Any, split: str, root: str) -> Source:
    """Returns an own source, which is constructed if it is given by the path of its class.

    Args:
        source: a `Source`, a data set, or the path of a class of one of these.
        split: passed to a constructor with the parameter ``split``; one with the parameter ``train`` gets true for
            ``train``.
        root: passed to a constructor that requires ``root``.

    Raises:
        ValueError: the class does not exist, is of another kind, or cannot be constructed.
    """
    if isinstance(source, str):
        cls = _class_at(source)
        parameters = inspect.signature(cls).parameters
        offered = {"split": split, "train": split == "train"}
        if "root" in parameters and parameters["root"].default is inspect.Parameter.empty:
            offered["root"] = root
        try:
            source = cls(**{key: value for key, value in offered.items() if key in parameters})
        except TypeError as error:
            remedy = f"`source: {{class_path: {source}, init_args: {{...}}}}` gives arguments"
            raise ValueError(f"data source {source!r} cannot be made: {error}; {remedy}") from error
    return source if isinstance(source, Source) else OwnDataset(source)


def _class_at(path: str) -> Any:
    """Imports the class of a `Source` or a data set from a path such as ``my_module.MySet``."""
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data source {path!r} cannot be imported: {error}; start where {module} lies") from error
    if not (isinstance(cls, type) and (issubclass(cls, Source) or hasattr(cls, "__getitem__"))):
        raise ValueError(f"data source {path!r} must be a class of Source or torch.utils.data.Dataset")
    return cls
