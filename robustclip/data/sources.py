"""From a line of configuration to a labelled data set and its zero-shot task."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from robustclip.data.catalog import CATALOG, lookup
from robustclip.data.shapes import ShapesDataset
from robustclip.data.shards import REMOTE, IndexedShards, list_shards, read_lines
from robustclip.types import Task

KINDS = ("wds", "torchvision", "folder", "shapes")
DEFAULT_TEMPLATES = ("This is a photo of a {}",)


@dataclass(frozen=True)
class DataSource:
    """One data set in a configuration; a plain string stands for one with only ``source`` given.

    Args:
        source: ``wds:PATH-or-URL``, ``torchvision:CLASS``, ``folder:PATH``, ``shapes:NAME``, or a name of the
            catalogue, which brings the papers' class names and prompts.
        name: of the task in metrics and results, ``[a-z0-9_]+``; null derives it from the source.
        split: null for ``train`` in training and ``test`` in evaluation.
        class_names: in label order; null takes those beside the data, else the catalogue's.
        templates: prompts with ``{}``; null takes those beside the data, else the catalogue's.
        native_size: attack images at their own size instead of a crop of the model's; null asks the catalogue.
        length: number of samples; only needed to train from a remote source.
    """

    source: str
    name: str | None = None
    split: str | None = None
    class_names: list[str] | None = None
    templates: list[str] | None = None
    native_size: bool | None = None
    length: int | None = None


@dataclass(frozen=True)
class OpenedSource:
    """A data set that was found: its task, and either random access or the URLs of its shards.

    Args:
        task: what the text tower needs.
        split: which part of the data set.
        native_size: whether images keep their size.
        dataset: gives image and label by position; None for remote shards.
        urls: of remote shards.
        length: number of samples if known.
    """

    task: Task
    split: str
    native_size: bool
    dataset: Dataset[tuple[Any, int]] | None
    urls: tuple[str, ...] = ()
    length: int | None = None


def open_source(wanted: DataSource | str, *, root: str, split: str) -> OpenedSource:
    """Finds a data set; reads names and labels, no image.

    Args:
        wanted: the configuration.
        root: relative paths start here.
        split: default split.

    Raises:
        ValueError: no such kind, set, path, split or name, or class names and labels that do not fit.
    """
    wanted = DataSource(wanted) if isinstance(wanted, str) else wanted
    kind, separator, location = wanted.source.partition(":")
    entry = None
    if not separator:
        entry = lookup(wanted.source)
        kind, _, location = entry.source.partition(":")
    if kind not in KINDS:
        known = ", ".join(f"{kind}:" for kind in KINDS)
        raise ValueError(f"data source {wanted.source!r} must begin with one of {known} or be a name of the catalogue")
    name = wanted.name or (entry.name if entry else _slug(location))
    split = wanted.split or split
    if kind == "wds" or kind == "folder":
        location = location if location.startswith((*REMOTE, "/")) else str(Path(root).expanduser() / location)
    dataset, urls = _open(kind, location, root=root, split=split)
    names_beside, templates_beside = _beside(kind, location, dataset)
    if entry is None:  # what lies beside the data goes first; the catalogue only fills in
        entry = CATALOG.get(name)
        # Label orders differ between the copies of a set, so names are only taken for the copy that they belong to.
        is_same_copy = entry is not None and entry.source.startswith(f"{kind}:")
        class_names = wanted.class_names or names_beside or (entry.class_names if entry and is_same_copy else None)
        templates = wanted.templates or templates_beside or (entry.templates if entry else DEFAULT_TEMPLATES)
    else:
        class_names, templates = wanted.class_names or entry.class_names, wanted.templates or entry.templates
    if class_names is None:
        raise ValueError(f"data source {wanted.source!r} brings no class names; give `class_names`")
    if names_beside and len(class_names) != len(names_beside):
        counts = f"{len(class_names)} class names for it, but {len(names_beside)} lie beside the data"
        raise ValueError(f"data source {wanted.source!r} has {counts}")
    if dataset is not None:
        _check_labels(wanted.source, dataset, len(class_names))
    task = Task(name, tuple(class_names), tuple(templates))
    is_small = kind == "shapes" or (entry is not None and entry.native_size)
    native_size = is_small if wanted.native_size is None else wanted.native_size
    return OpenedSource(task, split, native_size, dataset, urls, wanted.length)


def labels_of(dataset: Dataset[Any]) -> Sequence[int] | None:
    """Labels of every sample where the data set tells them without decoding."""
    for attribute in ("labels", "targets", "_labels", "y"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):  # type: ignore[arg-type]
            return [int(label) for label in labels]
    return None


def _open(kind: str, location: str, *, root: str, split: str) -> tuple[Dataset[Any] | None, tuple[str, ...]]:
    if kind == "shapes":
        return ShapesDataset(location, split), ()
    if kind == "torchvision":
        return _open_torchvision(location, root, split), ()
    if kind == "folder":
        return _open_folder(location, split), ()
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
    offered = {"root": root, "split": split, "train": split == "train", "download": False}
    try:
        dataset: Dataset[Any] = cls(**{key: value for key, value in offered.items() if key in takes})
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"torchvision:{name} does not open below {root!r}: {' '.join(str(error).split())}") from error
    return dataset


def _open_folder(location: str, split: str) -> Dataset[Any]:
    from torchvision.datasets import ImageFolder

    folder = Path(location) / split if (Path(location) / split).is_dir() else Path(location)
    try:
        return _Folder(ImageFolder(str(folder)))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"folder {folder} needs one sub-folder of images per class: {error}") from error


class _Folder(Dataset[Any]):
    """torchvision's image folder, with labels and places told."""

    def __init__(self, images: Any) -> None:
        self.images, self.labels = images, images.targets
        self.classes = [name.replace("_", " ") for name in images.classes]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]

    def where(self, index: int) -> str:
        """Path of an image, for messages."""
        return str(self.images.samples[index][0])


def _beside(
    kind: str, location: str, dataset: Dataset[Any] | None
) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    """Class names and templates that come with the data."""
    if kind in ("wds", "folder"):
        templates = read_lines(location, "zeroshot_classification_templates.txt")
        names = read_lines(location, "classnames.txt") or getattr(dataset, "classes", None)
        return names, templates and [template.replace("{c}", "{}") for template in templates]
    if isinstance(dataset, ShapesDataset):
        return dataset.class_names, dataset.templates
    return None, None


def _check_labels(source: str, dataset: Dataset[Any], class_count: int) -> None:
    labels = labels_of(dataset)
    if labels is not None and not labels:
        raise ValueError(f"data source {source!r} has no samples")
    if labels and max(labels) >= class_count:
        index = max(range(len(labels)), key=labels.__getitem__)
        where = getattr(dataset, "where", "sample {}".format)(index)
        raise ValueError(f"{where} has label {labels[index]}, but there are {class_count} class names")


def _slug(location: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "_", location.rstrip("/").rsplit("/", 1)[-1].lower()).strip("_") or "data"
