"""From a line of configuration to a labelled data set and its zero-shot task."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch.utils.data import Dataset

from robustclip.arguments import Count, CountOrZero, checked
from robustclip.data.catalog import CATALOG, lookup, named
from robustclip.data.class_labels import Words, check_names, warn_of_missing
from robustclip.data.sources.kinds import BESIDE, KINDS, open_kind
from robustclip.data.sources.wds import REMOTE
from robustclip.data.task_parts import (
    Part,
    Role,
    Shift,
    benchmark,
    narrowed,
    part_by_ranges,
    part_by_seed,
    part_by_shift,
)
from robustclip.data.views import Relabelled, labels_of, where_of
from robustclip.paths import local_path, located
from robustclip.types import UNKNOWN, Task

DEFAULT_TEMPLATES = ("This is a photo of a {}",)


@checked
@dataclass(frozen=True)
class DataSource:
    """One data set in a configuration; a plain string stands for one with only ``source`` given.

    Args:
        source: ``wds:PATH-or-URL``, ``torchvision:CLASS``, ``folder:PATH``, ``list:PATH`` of a text file with
            ``{split}`` in its name, ``shapes:NAME``, or a name of the catalogue, which brings the papers' class names
            and prompts.
        name: of the task in metrics and results, ``[a-z0-9_]+``; null derives it from the source.
        split: null for ``train`` in training and ``test`` in evaluation.
        class_names: in label order, or a mapping from folders to names; null takes those beside the data, else the
            catalogue's; ``openai`` for OpenAI's names of the classes of ImageNet.
        templates: prompts with ``{}``; null takes those beside the data, else the catalogue's; ``openai`` for
            OpenAI's 80 templates.
        native_size: attack images at their own size instead of a crop of the model's; null asks the catalogue.
        border: pixels to cut off on every side of an image first; null asks the catalogue.
        length: number of samples; only needed to train from a remote source.
        classes: labels of the class list that is kept, such as ``0-14,25-27``; they are renumbered. Null for all.
        images: old labels of the images that are kept, those without a class as unknown; null for those of `classes`,
            or, in a set of unknown classes, for those of all others.
        shift: instead of both, what a benchmark trains on: ``closed``, ``partial``, ``open`` or ``open_partial``.
        known: number of known classes, the first of the list; null asks the benchmark that the name begins with.
        known_seed: draws them at random instead, from all names of the list; null for the first.
    """

    source: str
    name: str | None = None
    split: str | None = None
    class_names: list[str] | dict[str | int, str] | Literal["openai"] | None = None
    templates: Sequence[str] | Literal["openai"] | None = None
    native_size: bool | None = None
    border: CountOrZero | None = None
    length: Count | None = None
    classes: str | None = None
    images: str | None = None
    shift: Shift | None = None
    known: Count | None = None
    known_seed: int | None = None


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
        keys: what tells the class names apart.
        part: which of the classes and images, in words; empty for all.
        is_unknown: whether no image's class is known.
    """

    task: Task
    split: str
    native_size: bool
    border: int
    dataset: Dataset[tuple[Any, int]] | None
    urls: tuple[str, ...] = ()
    length: int | None = None
    keys: tuple[str, ...] = ()
    part: str = ""
    is_unknown: bool = False

    @property
    def class_count(self) -> int | None:
        """Labels are below it; None where they are all unknown."""
        return None if self.is_unknown else len(self.task.label_names)

    @property
    def has_unknown(self) -> bool:
        """Whether images are labelled as of no known class."""
        return self.is_unknown or (self.dataset is not None and UNKNOWN in (labels_of(self.dataset) or ()))


def open_source(wanted: DataSource | str, *, root: str, split: str, role: Role | None = None) -> OpenedSource:
    """Finds a data set; reads names and labels, no image.

    Args:
        wanted: the configuration.
        root: relative paths start here.
        split: default split.
        role: what the images are for; None goes by the default split.

    Raises:
        ValueError: no such kind, set, path, split or name, or class names and labels that do not fit.
    """
    wanted = DataSource(wanted) if isinstance(wanted, str) else wanted
    local_path(root, "root")
    role = role or ("train" if split == "train" else "test")
    opened = _part_of(_open_whole(wanted, root=root, split=split), wanted, role)
    if role != "unknown":
        check_names(opened.task.label_names, f"data source {wanted.source!r}")
    return opened


def _part_of(whole: OpenedSource, wanted: DataSource, role: Role) -> OpenedSource:
    """The classes and images that are wanted of a set."""
    where = f"data source {wanted.source!r}"
    is_whole = all(
        each is None for each in (wanted.classes, wanted.images, wanted.shift, wanted.known, wanted.known_seed)
    )
    if is_whole and role != "unknown":
        return whole
    if whole.dataset is None:
        if not is_whole:
            raise ValueError(f"{where} is remote: classes, images, shift and known must be null")
        return replace(whole, is_unknown=True)
    task, labels = whole.task, labels_of(whole.dataset)
    if labels is None:
        raise ValueError(f"{where} does not tell its labels without decoding; read it as wds:, folder: or list:")
    if wanted.known_seed is not None and task.groups is not None:
        task, labels = _by_name(task, labels)
    part = _wanted_part(wanted, task, whole.keys, role)
    dataset = Relabelled(whole.dataset, labels, part.new_labels)
    if not dataset.labels:
        raise ValueError(f"{where} has no sample of what is wanted, {part.words}")
    task = narrowed(task, part.classes) if part.classes else task
    return replace(whole, task=task, dataset=dataset, part=part.words, is_unknown=role == "unknown")


def _wanted_part(wanted: DataSource, task: Task, keys: Sequence[str], role: Role) -> Part:
    where, count = f"data source {wanted.source!r}", len(task.label_names)
    if wanted.shift is None and wanted.known is None and wanted.known_seed is None:
        return part_by_ranges(wanted.classes, wanted.images, count, role)
    if wanted.classes is not None or wanted.images is not None:
        raise ValueError(f"{where} has classes or images beside shift or known; give one of both")
    if wanted.known_seed is None:
        return part_by_shift(wanted.shift or "closed", benchmark(task.name, count, wanted.known), role)
    if wanted.known is None or wanted.shift not in (None, "closed"):
        raise ValueError(f"{where} has a `known_seed`: give `known`, and no shift but `closed`")
    return part_by_seed(keys if len(keys) == count else task.class_names, wanted.known, wanted.known_seed, role)


def _by_name(task: Task, labels: Sequence[int]) -> tuple[Task, list[int]]:
    """The same samples, labelled by the positions of their names in the whole list."""
    groups = task.groups or ()
    if any(len(group) > 1 for group in groups):
        raise ValueError(f"set {task.name!r} has labels of several class names; `known_seed` must be null")
    return replace(task, groups=None), [groups[label][0] for label in labels]


def _open_whole(wanted: DataSource, *, root: str, split: str) -> OpenedSource:
    where = f"data source {wanted.source!r}"
    given, wanted_templates = _wanted_words(wanted)
    kind, separator, location = wanted.source.partition(":")
    entry = None
    if not separator:
        entry = lookup(wanted.source)
        kind, _, location = entry.source.partition(":")
    if kind not in KINDS:
        known = ", ".join(f"{kind}:" for kind in KINDS)
        raise ValueError(f"{where} must begin with one of {known} or be a name of the catalogue")
    known_set = entry or (CATALOG.get(wanted.name) if wanted.name else named(_slug(location)))
    name = wanted.name or (known_set.name if known_set else _slug(location))
    split, is_asked = wanted.split or split, wanted.split is not None
    if kind in BESIDE:
        location = located(location, root, "data source", REMOTE if kind == "wds" else ())
    found = open_kind(kind, location, root=root, split=split, is_asked=is_asked)
    if entry is not None and given is None and found.keys is None:  # its prompts go before what is beside the data
        given = entry.class_names
    is_same_copy = known_set is not None and (
        known_set.source.startswith(f"{kind}:") or (kind == "torchvision" and named(_slug(location)) is known_set)
    )
    dataset, names = found.named(Words(given, None, known_set), where, is_same_copy=is_same_copy)
    own_templates = found.templates if entry is None else None  # what is beside the data goes before the catalogue
    templates = wanted_templates or own_templates or (known_set.templates if known_set else DEFAULT_TEMPLATES)
    task = Task(name, names.names, tuple(templates), names.groups)
    if dataset is not None:
        _check_labels(wanted.source, dataset, len(task.label_names))
    if names.labels is not None and dataset is not None:
        warn_of_missing(labels_of(dataset) or (), task.label_names, where)
    is_small = kind == "shapes" or (known_set is not None and known_set.native_size)
    native_size = is_small if wanted.native_size is None else wanted.native_size
    border = (known_set.border if known_set else 0) if wanted.border is None else wanted.border
    keys = known_set.keys if known_set else ()
    return OpenedSource(task, split, native_size, border, dataset, found.urls, wanted.length, keys)


def _wanted_words(wanted: DataSource) -> tuple[Sequence[str] | Mapping[Any, str] | None, Sequence[str] | None]:
    """Class names and templates that were asked for."""
    names, templates = wanted.class_names, wanted.templates
    if names == "openai":
        names = list(IMAGENET_CLASSNAMES)
    elif isinstance(names, Mapping):
        names = {str(folder): name for folder, name in names.items()}  # YAML reads 0 as a number
    return names, [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES] if templates == "openai" else templates


def _check_labels(source: str, dataset: Dataset[Any], class_count: int) -> None:
    labels = labels_of(dataset)
    if labels is not None and not labels:
        raise ValueError(f"data source {source!r} has no samples")
    if labels and max(labels) >= class_count:
        index = max(range(len(labels)), key=labels.__getitem__)
        raise ValueError(
            f"{where_of(dataset, index)} has label {labels[index]}, but there are {class_count} class names"
        )


def _slug(location: str) -> str:
    parts = [part for part in location.split("/") if part not in ("", "resolve", "tree", "main")]  # of Hugging Face
    return re.sub(r"[^a-z0-9_]+", "_", parts[-1].lower() if parts else "").strip("_") or "data"
