"""Opens one data set of a configuration: labelled images with their zero-shot task."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip import IMAGENET_CLASSNAMES
from torch.utils.data import Dataset

from robustclip.data.catalog import CATALOG, CatalogEntry, lookup, named
from robustclip.data.class_labels import NameLists, check_names, warn_of_missing
from robustclip.data.data_source import DataSource
from robustclip.data.descriptions import read_descriptions
from robustclip.data.sources import KINDS
from robustclip.data.sources.own import CLASS_PATH, open_own
from robustclip.data.sources.source import CheckedImages, Relabelled, labels_of, where_of
from robustclip.data.task_parts import Part, Role, benchmark, narrowed, part_by_ranges, part_by_seed, part_by_shift
from robustclip.data.template_sets import OPENAI, clip_benchmark_templates
from robustclip.paths import local_path
from robustclip.types import UNKNOWN, Crop, Task

if TYPE_CHECKING:
    from robustclip.data.corrupted_sets import Copy

DEFAULT_TEMPLATES = ("This is a photo of a {}",)


@dataclass(frozen=True)
class OpenedSource:
    """A data set that is ready to be read, at random by position or from remote shards.

    Args:
        sources: its description in the configuration; several descriptions if it is joined from several sets.
        task: class names and templates.
        split: name of the split.
        native_size: whether images keep their size.
        border: number of pixels that are cut off on every side.
        crop: resize before the centre crop; None for that of the data module.
        dataset: gives image and label by position; None for remote shards.
        urls: addresses of remote shards.
        length: number of samples if known.
        keys: distinct keys of the classes, such as WordNet ids.
        part: description of the classes and images that are kept; empty for all.
        is_unknown: whether the classes of all images are unknown.
        copy: origin of a corrupted copy of a test set; None for other sets.
    """

    sources: tuple[DataSource, ...]
    task: Task
    split: str
    native_size: bool
    border: int
    crop: Crop | None
    dataset: Dataset[tuple[Any, int]] | None
    urls: tuple[str, ...] = ()
    length: int | None = None
    keys: tuple[str, ...] = ()
    part: str = ""
    is_unknown: bool = False
    copy: "Copy | None" = None

    @property
    def class_count(self) -> int | None:
        """Number of labels; None if the classes of all images are unknown."""
        return None if self.is_unknown else len(self.task.label_names)

    @property
    def has_unknown(self) -> bool:
        """Whether the class of any image is unknown."""
        return self.is_unknown or UNKNOWN in (labels_of(self.dataset) or ())


def open_source(source: DataSource | str, *, root: str, split: str, role: Role | None = None) -> OpenedSource:
    """Opens a data set: reads its names and labels, but no image.

    Args:
        source: description in the configuration.
        root: folder that relative paths start at.
        split: default split.
        role: use of the images; None derives it from the default split.

    Raises:
        ValueError: an unknown kind, set, path, split or name, or class names that do not match the labels.
    """
    source = DataSource(source) if isinstance(source, str) else source
    local_path(root, "root")
    role = role or ("train" if split == "train" else "test")
    opened = _part_of(_open_whole(source, root=root, split=split), role)
    if role != "unknown":
        check_names(opened.task.label_names, source.where)
    return opened


def _part_of(whole: OpenedSource, role: Role) -> OpenedSource:
    """Keeps the classes and images that the configuration selects."""
    (source,) = whole.sources
    selection = (source.classes, source.images, source.shift, source.known, source.known_seed)
    is_whole = all(setting is None for setting in selection)
    if is_whole and role != "unknown":
        return whole
    if whole.dataset is None:
        if not is_whole:
            raise ValueError(f"{source.where} is remote: classes, images, shift and known must be null")
        return replace(whole, is_unknown=True)
    task, labels = whole.task, labels_of(whole.dataset)
    if labels is None:
        remedy = "read it as wds:, folder: or list:, or give it `targets`"
        raise ValueError(f"{source.where} gives no labels without decoding; {remedy}")
    if source.known_seed is not None and task.groups is not None:  # labels become positions among all class names
        if any(len(group) > 1 for group in task.groups):
            raise ValueError(f"set {task.name!r} has labels of several class names; `known_seed` must be null")
        labels = [task.groups[label][0] for label in labels]
        task = replace(task, groups=None)
    part = _selected_part(source, task, whole.keys, role)
    dataset = Relabelled(whole.dataset, labels, part.new_labels)
    if not dataset.labels:
        raise ValueError(f"{source.where} has no sample of the selected part, {part.description}")
    task = narrowed(task, part.classes) if part.classes else task
    return replace(whole, task=task, dataset=dataset, part=part.description, is_unknown=role == "unknown")


def _selected_part(source: DataSource, task: Task, keys: Sequence[str], role: Role) -> Part:
    count = len(task.label_names)
    if source.shift is None and source.known is None and source.known_seed is None:
        return part_by_ranges(source.classes, source.images, count, role)
    if source.classes is not None or source.images is not None:
        raise ValueError(f"{source.where} has classes or images beside shift or known; give one of both")
    if source.known_seed is None:
        return part_by_shift(source.shift or "closed", benchmark(task.name, count, source.known), role)
    if source.known is None or source.shift not in (None, "closed"):
        raise ValueError(f"{source.where} has a `known_seed`: give `known`, and no shift but `closed`")
    return part_by_seed(keys if len(keys) == count else task.class_names, source.known, source.known_seed, role)


def _open_whole(source: DataSource, *, root: str, split: str) -> OpenedSource:
    """Opens all classes and images of a set."""
    kind, location, entry = _located(source)
    known_set = entry or (CATALOG.get(source.name) if source.name else named(_slug(location)))
    split = source.split or split
    if kind:
        opened = KINDS[kind](location, root, source.split is not None).open(split)
    else:
        opened = open_own(source.source, split, root)
    configured = _class_names(source)
    if entry is not None and configured is None and opened.keys is None:
        configured = entry.class_names  # a set that is named in the configuration has the catalogue's class names
    is_same_copy = known_set is not None and (
        known_set.source.startswith(f"{kind}:") or (kind == "torchvision" and named(_slug(location)) is known_set)
    )
    dataset, names = opened.named(NameLists(configured, None, known_set), source.where, is_same_copy=is_same_copy)
    own_templates = opened.templates if entry is None else None  # as for class names
    templates = _templates(source, known_set, names.names)
    templates = templates or own_templates or (known_set.templates if known_set else DEFAULT_TEMPLATES)
    name = source.name or (known_set.name if known_set else _slug(location))
    task = Task(name, names.names, tuple(templates), names.groups, _descriptions(source, names.names, root))
    if dataset is not None:
        dataset = _checked_dataset(source, dataset, task, is_own=not kind)
        labels = labels_of(dataset)  # None where only decoding reveals them
        if labels is not None and (names.labels is not None or opened.folders or opened.keys):
            warn_of_missing(labels, task.label_names, source.where)
    is_small = opened.native_size or bool(known_set and known_set.native_size)
    native_size = is_small if source.native_size is None else source.native_size
    border = (known_set.border if known_set else 0) if source.border is None else source.border
    keys = known_set.keys if known_set else ()
    pixels = native_size, border, source.crop
    return OpenedSource((source,), task, split, *pixels, dataset, opened.urls, source.length, keys)


def _located(source: DataSource) -> tuple[str, str, CatalogEntry | None]:
    """Splits a source into kind, location and the entry of the catalogue; the kind of an own class is empty.

    Raises:
        ValueError: the source has none of the known forms.
    """
    if not isinstance(source.source, str):
        return "", source.title, None
    kind, separator, location = source.source.partition(":")
    if not separator and CLASS_PATH.fullmatch(source.source):
        return "", source.source.rpartition(".")[2], None
    entry = None
    if not separator:
        entry = lookup(source.source)
        kind, _, location = entry.source.partition(":")
    if kind not in KINDS:
        known = ", ".join(f"{kind}:" for kind in KINDS)
        raise ValueError(
            f"{source.where} must begin with one of {known} such as folder:/my/photos, or be a name of the catalogue "
            "or the path of a class, such as my_module.MySet"
        )
    return kind, location, entry


def _class_names(source: DataSource) -> Sequence[str] | Mapping[Any, str] | None:
    """Returns the class names of the configuration."""
    names = source.class_names
    if isinstance(names, Mapping):
        return {str(folder): name for folder, name in names.items()}  # YAML reads 0 as a number
    return list(IMAGENET_CLASSNAMES) if names == "openai" else names


def _descriptions(source: DataSource, names: tuple[str, ...], root: str) -> tuple[tuple[str, ...], ...] | None:
    """Returns the sentences of each class in the configured file; None without such a file."""
    if source.descriptions is None:
        return None
    if source.templates is not None:
        raise ValueError(f"{source.where} has `templates` and `descriptions`, which replace them; give one of both")
    return read_descriptions(Path(root).expanduser() / source.descriptions, names, source.where)


def _templates(source: DataSource, entry: CatalogEntry | None, names: tuple[str, ...]) -> Sequence[str] | None:
    """Returns the templates of the configuration."""
    if source.templates == "openai":
        return OPENAI
    if source.templates == "clip_benchmark":
        return clip_benchmark_templates(entry, names, source.where)
    return [source.templates] if isinstance(source.templates, str) else source.templates


def _checked_dataset(source: DataSource, dataset: Dataset[Any], task: Task, *, is_own: bool) -> Dataset[Any]:
    """Refuses labels that are no class; wraps images whose labels are only known when they are read."""
    labels, class_count = labels_of(dataset), len(task.label_names)
    if labels is not None and not labels:
        raise ValueError(f"data source {source.title!r} has no samples")
    if labels and max(labels) >= class_count:
        index = max(range(len(labels)), key=labels.__getitem__)
        raise ValueError(
            f"{where_of(dataset, index)} has label {labels[index]}, but there are {class_count} class names"
        )
    return CheckedImages(dataset, class_count, task.name) if is_own or labels is None else dataset


def _slug(location: str) -> str:
    """Derives the name of a task from a path or URL."""
    parts = [part for part in location.split("/") if part not in ("", "resolve", "tree", "main")]  # of Hugging Face
    return re.sub(r"[^a-z0-9_]+", "_", parts[-1].lower() if parts else "").strip("_") or "data"
