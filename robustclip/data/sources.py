"""From a line of configuration to a labelled data set and its zero-shot task."""

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch.utils.data import Dataset

from robustclip.data.catalog import CATALOG, lookup
from robustclip.data.files import ImageFiles, open_folder, open_list
from robustclip.data.shapes import ShapesDataset
from robustclip.data.shards import REMOTE, IndexedShards, list_shards, read_lines
from robustclip.types import Task

KINDS = ("wds", "torchvision", "folder", "list", "shapes")
RESERVED = {"train": "the head of the training classes", "mean": "the average over data sets"}
DEFAULT_TEMPLATES = ("This is a photo of a {}",)


@dataclass(frozen=True)
class DataSource:
    """One data set in a configuration; a plain string stands for one with only ``source`` given.

    Args:
        source: ``wds:PATH-or-URL``, ``torchvision:CLASS``, ``folder:PATH``, ``list:PATH`` of a text file with
            ``{split}`` in its name, ``shapes:NAME``, or a name of the catalogue, which brings the papers' class names
            and prompts.
        name: of the task in metrics and results, ``[a-z0-9_]+``; null derives it from the source.
        split: null for ``train`` in training and ``test`` in evaluation.
        class_names: in label order; null takes those beside the data, else the catalogue's; ``openai`` for
            OpenAI's names of the classes of ImageNet.
        templates: prompts with ``{}``; null takes those beside the data, else the catalogue's; ``openai`` for
            OpenAI's 80 templates.
        native_size: attack images at their own size instead of a crop of the model's; null asks the catalogue.
        border: pixels to cut off on every side of an image first; null asks the catalogue.
        length: number of samples; only needed to train from a remote source.
    """

    source: str
    name: str | None = None
    split: str | None = None
    class_names: list[str] | Literal["openai"] | None = None
    templates: list[str] | Literal["openai"] | None = None
    native_size: bool | None = None
    border: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class OpenedSource:
    """A data set that was found: its task, and either random access or the URLs of its shards.

    Args:
        task: what the text tower needs.
        split: which part of the data set.
        native_size: whether images keep their size.
        border: pixels that are cut off on every side.
        dataset: gives image and label by position; None for remote shards.
        urls: of remote shards.
        length: number of samples if known.
    """

    task: Task
    split: str
    native_size: bool
    border: int
    dataset: Dataset[tuple[Any, int]] | None
    urls: tuple[str, ...] = ()
    length: int | None = None


def open_tests(wanted: Sequence[DataSource | str], *, root: str) -> list[OpenedSource]:
    """Finds data sets that are evaluated side by side.

    Args:
        wanted: the configuration.
        root: relative paths start here.

    Raises:
        ValueError: as `open_source`, or a name that is taken.
    """
    sources = [open_source(source, root=root, split="test") for source in wanted]
    for name, count in Counter(source.task.name for source in sources).items():
        if count > 1:
            raise ValueError(f"{count} data sets are named {name!r}; give each its own `name`")
        if name in RESERVED:
            raise ValueError(f"a data set cannot be named {name!r}, which names {RESERVED[name]}; set its `name`")
    return sources


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
    wanted_names, wanted_templates = _wanted_words(wanted)
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
    if kind in ("wds", "folder", "list"):
        location = location if location.startswith((*REMOTE, "/")) else str(Path(root).expanduser() / location)
    named = entry or CATALOG.get(name)
    dataset, urls = _open(kind, location, root=root, split=split, published=named.folders if named else ())
    names_beside, templates_beside = _beside(kind, location, dataset)
    has_own_labels = isinstance(dataset, ImageFiles) and dataset.classes is not None
    if named is None or has_own_labels or (wanted_names and len(wanted_names) != len(named.class_names)):
        groups = None
    else:
        groups = named.groups
    if entry is None:  # what lies beside the data goes first; the catalogue only fills in
        entry = named
        is_published = isinstance(dataset, ImageFiles) and not has_own_labels
        # Label orders differ between the copies of a set, so names are only taken for the copy that they belong to.
        is_same_copy = entry is not None and (entry.source.startswith(f"{kind}:") or is_published)
        names_of_labels = None if groups else names_beside
        class_names = wanted_names or names_of_labels or (entry.class_names if entry and is_same_copy else None)
        templates = wanted_templates or templates_beside or (entry.templates if entry else DEFAULT_TEMPLATES)
    else:
        class_names, templates = wanted_names or entry.class_names, wanted_templates or entry.templates
    if class_names is None:
        raise ValueError(f"data source {wanted.source!r} brings no class names; give `class_names`")
    task = Task(name, tuple(class_names), tuple(templates), groups)
    if names_beside and len(task.label_names) != len(names_beside):
        counts = f"{len(task.label_names)} class names for it, but {len(names_beside)} lie beside the data"
        raise ValueError(f"data source {wanted.source!r} has {counts}")
    if dataset is not None:
        _check_labels(wanted.source, dataset, len(task.label_names))
    is_small = kind == "shapes" or (entry is not None and entry.native_size)
    native_size = is_small if wanted.native_size is None else wanted.native_size
    border = (entry.border if entry else 0) if wanted.border is None else wanted.border
    return OpenedSource(task, split, native_size, border, dataset, urls, wanted.length)


def _wanted_words(wanted: DataSource) -> tuple[list[str] | None, list[str] | None]:
    """Class names and templates that were asked for."""
    names, templates = wanted.class_names, wanted.templates
    if names == "openai":
        names = list(IMAGENET_CLASSNAMES)
    return names, [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES] if templates == "openai" else templates


def labels_of(dataset: Dataset[Any]) -> Sequence[int] | None:
    """Labels of every sample where the data set tells them without decoding."""
    for attribute in ("labels", "targets", "_labels", "y"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):  # type: ignore[arg-type]
            return [int(label) for label in labels]
    return None


def _open(
    kind: str, location: str, *, root: str, split: str, published: Sequence[str]
) -> tuple[Dataset[Any] | None, tuple[str, ...]]:
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
    offered = {"root": root, "split": split, "train": split == "train", "download": False}
    try:
        dataset: Dataset[Any] = cls(**{key: value for key, value in offered.items() if key in takes})
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"torchvision:{name} does not open below {root!r}: {' '.join(str(error).split())}") from error
    return dataset


def _beside(
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
