"""The data sets of a run: from lines of a configuration to labelled images and their zero-shot tasks."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch.utils.data import Dataset

from robustclip.arguments import Count, CountOrZero, checked
from robustclip.data.catalog import CATALOG, CatalogEntry, lookup, named
from robustclip.data.class_labels import Words, check_names, warn_of_missing
from robustclip.data.sources import KINDS
from robustclip.data.sources.own import CLASS_PATH, own_source
from robustclip.data.sources.source import CheckedImages, Joined, Relabelled, Source, labels_of, where_of
from robustclip.data.splits import Shots, few_shots, hold_out
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
from robustclip.paths import local_path
from robustclip.types import UNKNOWN, Task

RESERVED = {"train": "the head of the training classes", "mean": "the average over data sets"}
DEFAULT_TEMPLATES = ("This is a photo of a {}",)


@checked
@dataclass(frozen=True)
class DataSource:
    """One data set in a configuration; a plain string or an object stands for one with only ``source`` given.

    Args:
        source: ``wds:PATH-or-URL``, ``torchvision:CLASS``, ``folder:PATH``, ``list:PATH`` of a text file with
            ``{split}`` in its name, ``shapes:NAME``, a name of the catalogue, which brings the papers' class names and
            prompts, or a class of your own, ``my_module.MySet``, as a path, an object or a mapping of ``class_path``
            and ``init_args``: a `Source` or a ``torch.utils.data.Dataset``.
        name: of the task in metrics and results, ``[a-z0-9_]+``; null derives it from the source.
        split: null for ``train`` in training and ``test`` in evaluation.
        class_names: in label order, or a mapping from folders to names; null takes those beside the data, else the
            catalogue's; ``openai`` for OpenAI's names of the classes of ImageNet.
        templates: prompts with ``{}``, or one, such as ``a photo of {}``; null takes those beside the data, else the
            catalogue's; ``openai`` for OpenAI's 80 templates.
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

    source: str | Dataset | Source  # type: ignore[type-arg]  # the parser of the command line finds no Dataset[Any]
    name: str | None = None
    split: str | None = None
    class_names: list[str] | dict[str | int, str] | Literal["openai"] | None = None
    templates: str | Sequence[str] | None = None
    native_size: bool | None = None
    border: CountOrZero | None = None
    length: Count | None = None
    classes: str | None = None
    images: str | None = None
    shift: Shift | None = None
    known: Count | None = None
    known_seed: int | None = None

    @property
    def title(self) -> str:
        """The source as a configuration writes it; the class of an object."""
        return self.source if isinstance(self.source, str) else type(self.source).__name__

    @property
    def where(self) -> str:
        """The start of a message about this data set."""
        return f"data source {self.title!r}"


Wanted = DataSource | str
SetLike = Wanted | Dataset | Source  # type: ignore[type-arg]


def listed(given: SetLike | Sequence[SetLike]) -> tuple[Wanted, ...]:
    """The data sets of one setting, which may be a single one."""
    every = given if isinstance(given, list | tuple) else (given,)
    return tuple(each if isinstance(each, DataSource | str) else DataSource(each) for each in every)


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
        keys: distinct keys of the classes, such as WordNet ids.
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


def open_source(wanted: Wanted, *, root: str, split: str, role: Role | None = None) -> OpenedSource:
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
        check_names(opened.task.label_names, wanted.where)
    return opened


def _part_of(whole: OpenedSource, wanted: DataSource, role: Role) -> OpenedSource:
    """The classes and images that are wanted of a set."""
    where = wanted.where
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
        raise ValueError(
            f"{where} gives no labels without decoding; read it as wds:, folder: or list:, or give it `targets`"
        )
    if wanted.known_seed is not None and task.groups is not None:
        task, labels = _by_name(task, labels)
    part = _wanted_part(wanted, task, whole.keys, role)
    dataset = Relabelled(whole.dataset, labels, part.new_labels)
    if not dataset.labels:
        raise ValueError(f"{where} has no sample of what is wanted, {part.words}")
    task = narrowed(task, part.classes) if part.classes else task
    return replace(whole, task=task, dataset=dataset, part=part.words, is_unknown=role == "unknown")


def _wanted_part(wanted: DataSource, task: Task, keys: Sequence[str], role: Role) -> Part:
    where, count = wanted.where, len(task.label_names)
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
    """The task and labels of a set whose labels become positions in the whole list of class names."""
    groups = task.groups or ()
    if any(len(group) > 1 for group in groups):
        raise ValueError(f"set {task.name!r} has labels of several class names; `known_seed` must be null")
    return replace(task, groups=None), [groups[label][0] for label in labels]


def _open_whole(wanted: DataSource, *, root: str, split: str) -> OpenedSource:
    """Opens all classes and images of a set."""
    where, given = wanted.where, _class_names(wanted)
    kind, location, entry = _located(wanted)
    known_set = entry or (CATALOG.get(wanted.name) if wanted.name else named(_slug(location)))
    name = wanted.name or (known_set.name if known_set else _slug(location))
    split = wanted.split or split
    if isinstance(wanted.source, str) and kind:
        opened = KINDS[kind](location, root, wanted.split is not None).open(split)
    else:
        opened = own_source(wanted.source, split, root).open(split)
    if entry is not None and given is None and opened.keys is None:  # its prompts go before what is beside the data
        given = entry.class_names
    is_same_copy = known_set is not None and (
        known_set.source.startswith(f"{kind}:") or (kind == "torchvision" and named(_slug(location)) is known_set)
    )
    dataset, names = opened.named(Words(given, None, known_set), where, is_same_copy=is_same_copy)
    own_templates = opened.templates if entry is None else None  # what is beside the data goes before the catalogue
    templates = _templates(wanted) or own_templates or (known_set.templates if known_set else DEFAULT_TEMPLATES)
    task = Task(name, names.names, tuple(templates), names.groups)
    if dataset is not None:
        _check_labels(wanted.title, dataset, len(task.label_names))
    if names.labels is not None and dataset is not None:
        warn_of_missing(labels_of(dataset) or (), task.label_names, where)
    if dataset is not None and (not kind or labels_of(dataset) is None):
        dataset = CheckedImages(dataset, len(task.label_names), name)
    is_small = opened.native_size or (known_set is not None and known_set.native_size)
    native_size = bool(is_small) if wanted.native_size is None else wanted.native_size
    border = (known_set.border if known_set else 0) if wanted.border is None else wanted.border
    keys = known_set.keys if known_set else ()
    return OpenedSource(task, split, native_size, border, dataset, opened.urls, wanted.length, keys)


def _located(wanted: DataSource) -> tuple[str, str, CatalogEntry | None]:
    """Kind, location, and the entry of the catalogue that a source is a name of; no kind for a class of the user.

    Raises:
        ValueError: neither of these.
    """
    if not isinstance(wanted.source, str):
        return "", wanted.title, None
    kind, separator, location = wanted.source.partition(":")
    if not separator and CLASS_PATH.fullmatch(wanted.source):
        return "", wanted.source.rpartition(".")[2], None
    entry = None
    if not separator:
        entry = lookup(wanted.source)
        kind, _, location = entry.source.partition(":")
    if kind not in KINDS:
        known = ", ".join(f"{kind}:" for kind in KINDS)
        raise ValueError(
            f"{wanted.where} must begin with one of {known} such as folder:/my/photos, or be a name of the catalogue "
            "or the path of a class, such as my_module.MySet"
        )
    return kind, location, entry


def _class_names(wanted: DataSource) -> Sequence[str] | Mapping[Any, str] | None:
    """Class names of the configuration."""
    names = wanted.class_names
    if isinstance(names, Mapping):
        return {str(folder): name for folder, name in names.items()}  # YAML reads 0 as a number
    return list(IMAGENET_CLASSNAMES) if names == "openai" else names


def _templates(wanted: DataSource) -> Sequence[str] | None:
    """Templates of the configuration."""
    if wanted.templates == "openai":
        return [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES]
    return [wanted.templates] if isinstance(wanted.templates, str) else wanted.templates


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


def open_training(wanted: Sequence[Wanted], *, root: str) -> OpenedSource:
    """Finds the training set: one, or several of the same classes one after the other.

    Args:
        wanted: the configuration.
        root: relative paths start here.

    Raises:
        ValueError: as `open_source`, labels of several class names, or sets that do not go together.
    """
    if not wanted:
        raise ValueError("nothing to train on: `data.train` lists no data set")
    sources = [open_source(source, root=root, split="train") for source in wanted]
    for source in sources:
        if source.task.groups is not None:
            raise ValueError(f"training set {source.task.name!r} has labels of several class names; test on it")
        _check_has_classes(source)
    return sources[0] if len(sources) == 1 else _joined(sources)


def _joined(sources: Sequence[OpenedSource]) -> OpenedSource:
    first = sources[0]
    for source in sources:
        pair = f"training sets {first.task.name!r} and {source.task.name!r}"
        if source.dataset is None or labels_of(source.dataset) is None:
            raise ValueError(
                f"training set {source.task.name!r} is remote or gives no labels without decoding; train on it alone"
            )
        if source.task.class_names != first.task.class_names or source.task.templates != first.task.templates:
            raise ValueError(f"{pair} must have the same class names and templates; give `class_names` and `templates`")
        if (source.native_size, source.border) != (first.native_size, first.border):
            raise ValueError(f"{pair} must agree in `native_size` and `border`; give both")
    name = "_".join(dict.fromkeys(source.task.name for source in sources))
    dataset = Joined([source.dataset for source in sources if source.dataset is not None])
    part = "; ".join(dict.fromkeys(source.part for source in sources if source.part))
    return replace(first, task=replace(first.task, name=name), dataset=dataset, part=part)


def split_training(
    train: OpenedSource, holdout: float, shots: Shots | None
) -> tuple[list[int] | None, list[int] | None]:
    """Positions to train on and to validate on: takes the hold-out, and the few shots of what remains.

    Returns:
        None for all, and None for no hold-out, as of a remote set.

    Raises:
        ValueError: as `hold_out` and `few_shots`, or shots of a remote set.
    """
    if train.dataset is None:
        if shots is not None:
            raise ValueError(f"training set {train.task.name!r} is remote: `shots` must be null")
        return None, None
    kept, held = hold_out(train.dataset, holdout) if holdout else (None, None)
    return kept if shots is None else few_shots(train.dataset, kept, shots), held


def open_tests(wanted: Sequence[Wanted], *, root: str) -> list[OpenedSource]:
    """Finds data sets that are evaluated side by side.

    Args:
        wanted: the configuration.
        root: relative paths start here.

    Raises:
        ValueError: as `open_source`, or a name that is taken.
    """
    sources = [open_source(source, root=root, split="test") for source in wanted]
    for source in sources:
        if source.has_unknown:
            raise ValueError(f"set {source.task.name!r} has images of unknown classes; list these in `data.unknown`")
        _check_has_classes(source)
    _check_names([source.task.name for source in sources])
    return sources


def open_unknown(wanted: Sequence[Wanted], *, root: str, taken: Sequence[str]) -> list[OpenedSource]:
    """Finds sets of images whose classes no test task knows.

    Args:
        wanted: the configuration.
        root: relative paths start here.
        taken: names of test tasks; an unknown set of such a name gets ``_unknown`` behind it.

    Raises:
        ValueError: as `open_source`, or a name that is taken nevertheless.
    """
    sources = [open_source(source, root=root, split="test", role="unknown") for source in wanted]
    names = [each.task.name for each in sources]
    names = [f"{name}_unknown" if name in taken else name for name in names]
    _check_names([*taken, *names])
    return [replace(source, task=replace(source.task, name=name)) for source, name in zip(sources, names, strict=True)]


def _check_has_classes(source: OpenedSource) -> None:
    if len(names := source.task.label_names) == 1:
        where = f"data set {source.task.name!r} has one class, {names[0]!r}"
        raise ValueError(f"{where}, so that every answer is correct; check the path and `split`")


def _check_names(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{count} data sets are named {name!r}; give each its own `name`")
        if name in RESERVED:
            raise ValueError(f"a data set cannot be named {name!r}, which names {RESERVED[name]}; set its `name`")
