"""Own data sets, given as objects or by the path of their class."""

import inspect
import re
from typing import Any

from robustclip.arguments import imported
from robustclip.data.sources.source import Opened, Source
from robustclip.data.sources.torchvision import own_names

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def open_own(source: Any, split: str, root: str) -> Opened:
    """Opens an own source, which is constructed first if it is given by the path of its class.

    Args:
        source: a `Source`, a ``torch.utils.data.Dataset`` as `Opened` describes, whose attribute ``classes`` names its
            labels if there is one, or the path of a class of one of these. A data set is the same for every split.
        split: split to open; also passed to a constructor with the parameter ``split``. One with the parameter
            ``train`` gets true for ``train``.
        root: passed to a constructor that requires ``root``.

    Raises:
        ValueError: the class does not exist, is of another kind, or cannot be constructed, or as `Source.open`.
    """
    if isinstance(source, str):
        cls = imported(source, "data source")
        if not (isinstance(cls, type) and (issubclass(cls, Source) or hasattr(cls, "__getitem__"))):
            raise ValueError(f"data source {source!r} must be a class of Source or torch.utils.data.Dataset")
        parameters = inspect.signature(cls).parameters
        offered = {"split": split, "train": split == "train"}
        if "root" in parameters and parameters["root"].default is inspect.Parameter.empty:
            offered["root"] = root
        try:
            source = cls(**{key: value for key, value in offered.items() if key in parameters})
        except TypeError as error:
            remedy = f"`source: {{class_path: {source}, init_args: {{...}}}}` gives arguments"
            raise ValueError(f"data source {source!r} cannot be made: {error}; {remedy}") from error
    if isinstance(source, Source):
        return source.open(split)
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        kind = type(source).__name__
        raise ValueError(
            f"data source of {kind} must give samples by position, with `__getitem__` and `__len__`, or be a Source;"
            " write a path as 'folder:PATH'"
        )
    return Opened(source, keys=own_names(source))
