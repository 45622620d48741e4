"""Sets up the data of a run and reads a batch of every loader, before a long run does."""

import copy
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any, NamedTuple

import torch

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.loader import ImageLoader
from robustclip.data.samples import Images
from robustclip.data.sources.source import labels_of
from robustclip.methods import RobustMethod
from robustclip.models.layers import frozen
from robustclip.types import UNKNOWN, Batch, Task

OK, INFO, WARNING, PROBLEM = "ok", "info", "warning", "problem"
IMAGES_READ = 16  # images of each evaluation set
NAMED = 3  # classes that a line names
STAND_IN = "shapes:colours"  # test set beside a set of unknown classes that is opened alone

Part = tuple[CLIPDataModule, str, str | None]
"""A data module that is set up, its stage, and the kind of its only set; None for all sets."""


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        check: name of the check.
        mark: ``ok``, ``info``, ``warning`` or ``problem``.
        detail: result of the check.
    """

    check: str
    mark: str
    detail: str


@dataclass
class DataSet:
    """A data set of the run, with its first images.

    Args:
        kind: ``test``, ``unknown``, ``training``, ``validation`` or ``hold-out``.
        task: classes of the set; for unknown classes only the name of the set.
        loader: loader of the run.
        size: number of samples in the run; None for a stream of unknown length.
        batch: the first images; None if none was read.
        load_seconds: seconds to load one image.
        head_seconds: seconds to encode the classes.
    """

    kind: str
    task: Task
    loader: ImageLoader
    size: int | None = None
    batch: Batch | None = None
    load_seconds: float = 0.0
    head_seconds: float = 0.0

    @property
    def title(self) -> str:
        """Name of the data set in the report."""
        return f"{self.kind}: {self.task.name}"


def examine(
    data: CLIPDataModule, stage: str, model: RobustMethod | None, *, limit: int | None = None, mark: str = PROBLEM
) -> Generator[Finding, None, list[DataSet]]:
    """Sets up the data of a stage and reads a batch of every loader; a data set that fails hides no other.

    Args:
        data: data of the run.
        stage: ``test`` or ``fit``.
        model: model that classifies the first images; None for no classification.
        limit: samples of an evaluation set in the run; None for all.
        mark: mark of a data set that fails.

    Returns:
        The readable data sets with labels.
    """
    parts = yield from _set_up(data, stage, mark)
    readable = []
    for part, own_stage, kind in parts:
        part.max_samples = limit
        sizes = [_size(data_set.loader) for data_set in _data_sets(part, own_stage, kind)]
        part.max_samples = min(IMAGES_READ, limit or IMAGES_READ)
        for data_set, size in zip(_data_sets(part, own_stage, kind), sizes, strict=True):
            data_set.size = size
            try:
                yield from _first_images(data_set, model)
                readable += [data_set] if data_set.batch is not None and data_set.kind != "unknown" else []
            except (ValueError, OSError) as error:
                yield Finding(data_set.title, mark, str(error))
    return readable


def _set_up(data: CLIPDataModule, stage: str, mark: str) -> Generator[Finding, None, list[Part]]:
    """Returns the data, or a module for each data set that opens alone if the data does not open as a whole."""
    try:
        data.setup(stage)
        return [(data, stage, None)]
    except (ValueError, OSError) as error:
        problems = [Finding("data", mark, str(error))]
    parts: list[Part] = []
    for kind, sources, changes in _single_sets(data, stage):
        part, own_stage = copy.copy(data), "fit" if kind == "training" else "test"
        vars(part).update(changes)
        try:
            part.setup(own_stage)
            parts.append((part, own_stage, kind))
        except (ValueError, OSError) as error:
            names = ", ".join(source if isinstance(source, str) else source.title for source in sources)
            problems.append(Finding(f"{kind}: {names}", mark, str(error)))
    yield from problems[1:] or problems  # the error of the whole matters only where every set opens alone
    return parts


def _single_sets(data: CLIPDataModule, stage: str) -> Iterator[tuple[str, Sequence[DataSource | str], dict[str, Any]]]:
    """Gives kind and sources of every data set, and attributes of the data module that leave out the others."""
    if stage == "fit":
        yield "training", data.train_sources, {"val_sources": (), "holdout": 0}
    kind, sources = ("validation", data.val_sources) if stage == "fit" else ("test", data.test_sources)
    for source in sources:
        yield kind, [source], {"test_sources": (source,), "unknown_sources": ()}
    for source in data.unknown_sources if stage == "test" else ():
        yield "unknown", [source], {"test_sources": (STAND_IN,), "unknown_sources": (source,)}


def _data_sets(data: CLIPDataModule, stage: str, kind: str | None) -> Iterator[DataSet]:
    if stage == "fit":
        yield DataSet("training", data.train_task, data.train_dataloader())
        for task, loader in zip(data.val_tasks, data.val_dataloader(), strict=True):
            yield DataSet("validation" if data.val_sources else "hold-out", task, loader)
        return
    for task, loader in zip(data.test_tasks, data.test_dataloader(), strict=True):
        if kind != "unknown":
            yield DataSet(kind or "test", task, loader)
    for name, loader in data.unknown_dataloaders().items():
        yield DataSet("unknown", Task(name, ("unknown",)), loader)


def _size(loader: ImageLoader) -> int | None:
    try:
        return len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return None


def _first_images(data_set: DataSet, model: RobustMethod | None) -> Iterator[Finding]:
    """Reads the images of an evaluation set, or a batch of a training set, and classifies them."""
    title, task, loader, start = data_set.title, data_set.task, data_set.loader, perf_counter()
    batches = list(islice(loader, 1 if data_set.kind == "training" else None))
    count, bad = sum(len(batch.labels) for batch in batches), loader.bad_samples
    data_set.load_seconds = (perf_counter() - start) / max(1, count + len(bad))
    size = "uncounted samples" if data_set.size is None else f"{data_set.size:,} samples"
    detail = f"{size}, {len(task.label_names)} classes; {count} of {count + len(bad)} images decode"
    notes = list(_missing_classes(data_set))
    if bad:
        line = f"{bad[0].where} does not decode: {bad[0].why}; it is left out and counted"
        notes.append(Finding(title, WARNING, line))
    if batches:
        images, labels = (torch.cat(parts) for parts in zip(*(batch[:2] for batch in batches), strict=True))
        data_set.batch = batches[0]._replace(images=images, labels=labels, index=torch.arange(count))
        pixels = getattr(getattr(loader.dataset, "transform", None), "description", "own preprocessing")
        detail += f", {images.shape[-1]} x {images.shape[-2]} pixels ({pixels})" if images.ndim == 4 else ""
        if model is not None and images.ndim == 4 and not bool((labels == UNKNOWN).any()):
            start = perf_counter()
            model.prepare([task])
            data_set.head_seconds = perf_counter() - start
            with frozen(model), torch.no_grad():
                device = next(model.parameters()).device
                predicted = model.logits(images.to(device), task.name).argmax(-1).cpu()
            detail += f", {int((predicted == labels).sum())} of {count} are classified correctly"
            if len({*predicted.tolist()}) == 1 < len({*labels.tolist()}):  # a wrong model or order of names
                name = task.label_names[int(predicted[0])]
                notes.append(Finding(title, INFO, f"all {count} images that were tried are classified as {name!r}"))
    yield Finding(title, OK if batches else PROBLEM, detail)
    yield from notes


def _missing_classes(data_set: DataSet) -> Iterator[Finding]:
    """Names the classes of a whole set without a sample."""
    images, classes = data_set.loader.dataset, data_set.task.label_names
    if not isinstance(images, Images) or data_set.kind in ("hold-out", "unknown"):
        return
    labels = labels_of(images.source)
    missing = [] if labels is None else [classes[number] for number in sorted({*range(len(classes))} - {*labels})]
    if missing:
        names = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        yield Finding(data_set.title, WARNING, f"{len(missing)} of {len(classes)} classes have no sample: {names}")
