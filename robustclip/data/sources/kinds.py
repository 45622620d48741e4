"""Opens a data set of any kind, with the class names and templates that come with it."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from robustclip.data.class_labels import Named, Words, by_label, by_list, join
from robustclip.data.decoding import open_file
from robustclip.data.sources.files import ImageFiles, read_list
from robustclip.data.sources.folders import read_folder
from robustclip.data.sources.shapes import ShapesDataset
from robustclip.data.sources.wds import REMOTE, IndexedShards, list_shards, read_lines
from robustclip.data.views import Relabelled, labels_of

KINDS = ("wds", "torchvision", "folder", "list", "shapes")
BESIDE = ("wds", "folder", "list")
"""Kinds that may have text files with names and templates beside the data."""


@dataclass(frozen=True)
class Found:
    """A data set with its own labels.

    Args:
        dataset: gives image and label by position; None for remote shards.
        urls: of remote shards.
        keys: names of its own labels, such as folders; None where labels are numbers.
        folders: of a list: folder by label.
        names: class names in the order of its labels, if it brings any.
        templates: prompts that it brings.
    """

    dataset: Dataset[Any] | None
    urls: tuple[str, ...] = ()
    keys: Sequence[str] | None = None
    folders: dict[int, str] | None = None
    names: Sequence[str] | None = None
    templates: Sequence[str] | None = None

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
        if isinstance(self.dataset, ImageFiles):
            return self.dataset.relabelled(labels), named
        own = None if self.dataset is None else labels_of(self.dataset)
        if self.dataset is None or own is None:
            raise ValueError(f"{where} has the classes in another order, and labels that only decoding reveals")
        return Relabelled(self.dataset, own, labels), named


def open_kind(kind: str, location: str, *, root: str, split: str, is_asked: bool) -> Found:
    """Open a data set, without its images.

    Args:
        kind: one of `KINDS`.
        location: what follows the kind; a path is complete.
        root: folder of torchvision's data sets.
        split: of the data set.
        is_asked: whether the configuration names the split.

    Raises:
        ValueError: no such set, path or split.
    """
    if kind == "shapes":
        shapes = ShapesDataset(location, split)
        return Found(shapes, names=shapes.class_names, templates=shapes.templates)
    if kind == "torchvision":
        dataset = _open_torchvision(location, root, split, is_asked=is_asked)
        return Found(dataset, keys=_torchvision_keys(dataset))
    place = str(Path(location).parent) if kind == "list" else location
    names = read_lines(place, "classnames.txt")
    templates = read_lines(place, "zeroshot_classification_templates.txt")
    templates = templates and [template.replace("{c}", "{}") for template in templates]
    if kind == "folder":
        images = read_folder(location, split, is_asked=is_asked)
        return Found(ImageFiles(images.samples), (), images.keys, None, names, templates)
    if kind == "list":
        dataset, folders = read_list(location, split)
        return Found(dataset, (), None, folders, names, templates)
    urls = list_shards(location, split)
    shards = None if location.startswith(REMOTE) else IndexedShards([Path(url) for url in urls])
    return Found(shards, tuple(urls) if shards is None else (), None, None, names, templates)


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


def _torchvision_keys(dataset: Dataset[Any]) -> list[str] | None:
    """Class names of one of torchvision's data sets, in the order of its labels, if it has any."""
    for attribute in ("wnids", "classes", "categories"):
        if names := getattr(dataset, attribute, None):
            return [str(name) for name in names]
    return None
