"""Opens the data sets of a run: the training set, test sets, and sets of unknown classes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from robustclip.data.corrupted_sets import Corruptions, with_copies
from robustclip.data.data_source import DataSource
from robustclip.data.opened_source import OpenedSource, open_source
from robustclip.data.sources.source import Joined, labels_of
from robustclip.data.splits import Shots, few_shots, hold_out

RESERVED = {"train": "the head of the training classes", "mean": "the average over data sets"}


def open_training(sources: Sequence[DataSource | str], *, root: str) -> OpenedSource:
    """Opens the training set; several data sets of the same classes are joined.

    Args:
        sources: descriptions in the configuration.
        root: folder that relative paths start at.

    Raises:
        ValueError: as `open_source`; a label has several class names; or the sets differ in classes or images.
    """
    if not sources:
        raise ValueError("nothing to train on: `data.train` lists no data set")
    opened = [open_source(source, root=root, split="train") for source in sources]
    for source in opened:
        if source.task.groups is not None:
            raise ValueError(f"training set {source.task.name!r} has labels of several class names; test on it")
        _check_has_classes(source)
    return opened[0] if len(opened) == 1 else _joined(opened)


def _joined(sources: Sequence[OpenedSource]) -> OpenedSource:
    first = sources[0]
    for source in sources:
        pair = f"training sets {first.task.name!r} and {source.task.name!r}"
        if labels_of(source.dataset) is None:
            raise ValueError(
                f"training set {source.task.name!r} is remote or gives no labels without decoding; train on it alone"
            )
        if (source.task.class_names, source.task.prompts) != (first.task.class_names, first.task.prompts):
            raise ValueError(f"{pair} must have the same class names and templates; give `class_names` and `templates`")
        if (source.native_size, source.border, source.crop) != (first.native_size, first.border, first.crop):
            raise ValueError(f"{pair} must agree in `native_size`, `border` and `crop`; give all three")
    name = "_".join(dict.fromkeys(source.task.name for source in sources))
    return replace(
        first,
        sources=tuple(origin for source in sources for origin in source.sources),
        task=replace(first.task, name=name),
        dataset=Joined([source.dataset for source in sources if source.dataset is not None]),
        part="; ".join(dict.fromkeys(source.part for source in sources if source.part)),
    )


def split_training(
    train: OpenedSource, holdout: float, shots: Shots | None
) -> tuple[list[int] | None, list[int] | None]:
    """Splits the training set into positions to train on and positions to validate on.

    Args:
        train: training set.
        holdout: share of every class that is held out for validation; 0 for none.
        shots: number and choice of the training images that are taken from the rest; None for all.

    Returns:
        Positions to train on, None for all; positions to validate on, None without a hold-out.

    Raises:
        ValueError: as `hold_out` and `few_shots`, or the set is remote and there are shots.
    """
    if train.dataset is None:
        if shots is not None:
            raise ValueError(f"training set {train.task.name!r} is remote: `shots` must be null")
        return None, None
    kept, held = hold_out(train.dataset, holdout) if holdout else (None, None)
    return kept if shots is None else few_shots(train.dataset, kept, shots), held


def open_tests(
    sources: Sequence[DataSource | str], *, root: str, corruptions: Corruptions | None = None
) -> list[OpenedSource]:
    """Opens data sets for evaluation.

    Args:
        sources: descriptions in the configuration.
        root: folder that relative paths start at.
        corruptions: corrupted copies to add; None for none.

    Raises:
        ValueError: as `open_source` and `with_copies`; images of unknown classes; or two sets of one name.
    """
    opened = [open_source(source, root=root, split="test") for source in sources]
    for source in opened:
        if source.has_unknown:
            raise ValueError(f"set {source.task.name!r} has images of unknown classes; list these in `data.unknown`")
        _check_has_classes(source)
    opened = with_copies(opened, corruptions, root=root)
    _check_task_names([source.task.name for source in opened])
    return opened


def open_unknown(sources: Sequence[DataSource | str], *, root: str, taken: Sequence[str]) -> list[OpenedSource]:
    """Opens sets of images whose classes belong to no test task.

    Args:
        sources: descriptions in the configuration.
        root: folder that relative paths start at.
        taken: names of test tasks; an unknown set of such a name gets the suffix ``_unknown``.

    Raises:
        ValueError: as `open_source`, or two sets of one name.
    """
    opened = [open_source(source, root=root, split="test", role="unknown") for source in sources]
    names = [source.task.name for source in opened]
    names = [f"{name}_unknown" if name in taken else name for name in names]
    _check_task_names([*taken, *names])
    return [replace(source, task=replace(source.task, name=name)) for source, name in zip(opened, names, strict=True)]


def _check_has_classes(source: OpenedSource) -> None:
    if len(names := source.task.label_names) == 1:
        where = f"data set {source.task.name!r} has one class, {names[0]!r}"
        raise ValueError(f"{where}, so that every answer is correct; check the path and `split`")


def _check_task_names(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{count} data sets are named {name!r}; give each its own `name`")
        if name in RESERVED:
            raise ValueError(f"a data set cannot be named {name!r}, which names {RESERVED[name]}; set its `name`")
