"""The data sets of a run: side by side in evaluation, one after the other in training."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from robustclip.data.sources.source import DataSource, OpenedSource, open_source
from robustclip.data.splits import Shots, few_shots, hold_out
from robustclip.data.views import Joined, labels_of

RESERVED = {"train": "the head of the training classes", "mean": "the average over data sets"}


def open_training(wanted: Sequence[DataSource | str], *, root: str) -> OpenedSource:
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
            raise ValueError(f"training set {source.task.name!r} is remote or tells no labels; train on it alone")
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


def open_tests(wanted: Sequence[DataSource | str], *, root: str) -> list[OpenedSource]:
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


def open_unknown(wanted: Sequence[DataSource | str], *, root: str, taken: Sequence[str]) -> list[OpenedSource]:
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
    names = source.task.label_names
    if len(names) == 1:
        raise ValueError(
            f"data set {source.task.name!r} has one class, {names[0]!r}, so that every answer is correct;"
            " check the path and `split`"
        )


def _check_names(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{count} data sets are named {name!r}; give each its own `name`")
        if name in RESERVED:
            raise ValueError(f"a data set cannot be named {name!r}, which names {RESERVED[name]}; set its `name`")
