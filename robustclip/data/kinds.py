"""Reads every kind of data set, and the words that lie beside it."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from robustclip.data.decoding import open_file
from robustclip.data.files import open_folder, open_list
from robustclip.data.shapes import ShapesDataset
from robustclip.data.shards import REMOTE, IndexedShards, list_shards, read_lines

KINDS = ("wds", "torchvision", "folder", "list", "shapes")


def open_kind(
    kind: str, location: str, *, root: str, split: str, published: Sequence[str]
) -> tuple[Dataset[Any] | None, tuple[str, ...]]:
    """Random access to a data set, or None and the URLs of its shards.

    Args:
        kind: one of `KINDS`.
        location: what stands behind it; a path is complete.
        root: where torchvision looks.
        split: of the data set.
        published: sub-folders in the order of the labels, for a set that may lie as it was published.

    Raises:
        ValueError: no such set, path or split.
    """
    if kind == "shapes":
        return ShapesDataset(location, split), ()
    if kind == "torchvision":
        return _open_torchvision(location, root, split), ()
    if kind == "folder":
        return open_folder(location, split, published), ()
    if kind == "list":
        return open_list(location, split), ()
    urls = list_shards(location, split)
    if location.startswith(REMOTE):
        return None, tuple(urls)
    return IndexedShards([Path(url) for url in urls]), ()


def _open_torchvision(name: str, root: str, split: str) -> Dataset[Any]:
    from torchvision import datasets  # here because its import is slow and most runs do not need it

    cls = getattr(datasets, name, None)
    if name not in datasets.__all__ or cls is None:
        raise ValueError(f"torchvision has no data set {name!r}")
    takes = inspect.signature(cls).parameters
    offered = {"root": root, "split": split, "train": split == "train", "download": False, "loader": open_file}
    try:
        dataset: Dataset[Any] = cls(**{key: value for key, value in offered.items() if key in takes})
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"torchvision:{name} does not open below {root!r}: {' '.join(str(error).split())}") from error
    return dataset


def words_beside(
    kind: str, location: str, dataset: Dataset[Any] | None
) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    """Class names and templates that come with the data."""
    if kind in ("wds", "folder", "list"):
        templates = read_lines(location, "zeroshot_classification_templates.txt")
        names = read_lines(location, "classnames.txt") or getattr(dataset, "classes", None)
        return names, templates and [template.replace("{c}", "{}") for template in templates]
    if isinstance(dataset, ShapesDataset):
        return dataset.class_names, dataset.templates
    return None, None
