"""Sets the data of a run up and reads a batch of every loader, before a long run does."""

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
LOOKED_AT = 16  # images of each evaluation set
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
    """A data set of the run, of which some images were read.

    Args:
        kind: ``test``, ``unknown``, ``training``, ``validation`` or ``hold-out``.
        task: its classes; of a set of unknown classes its name alone.
        loader: of the run.
        size: number of samples in the run; None for a stream of unknown length.
        batch: images that were read.
        load_seconds: to load one image.
        head_seconds: to encode the classes.
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
        """Name of its line."""
        return f"{self.kind}: {self.task.name}"


def examine(
    data: CLIPDataModule, stage: str, model: RobustMethod | None, *, limit: int | None = None, mark: str = PROBLEM
) -> Generator[Finding, None, list[DataSet]]:
    """Sets the data up for a stage and reads a batch of every loader; a data set that fails hides no other.

    Args:
        data: of the run.
        stage: ``test`` or ``fit``.
        model: classifies the images that are read; None for no classification.
        limit: samples of an evaluation set in the run; None for all.
        mark: of a data set that fails.

    Returns:
        The data sets with labels that can be read.
    """
    parts = yield from _set_up(data, stage, mark)
    readable = []
    for part, own_stage, kind in parts:
        part.max_samples = limit
        sizes = [_size(each) for each in _data_sets(part, own_stage, kind)]
        part.max_samples = min(LOOKED_AT, limit or LOOKED_AT)
        for each, size in zip(_data_sets(part, own_stage, kind), sizes, strict=True):
            each.size = size
            try:
                findings = list(_look_at(each, model))
                readable += [each] if each.batch is not None and each.kind != "unknown" else []
            except (ValueError, OSError) as error:
                findings = [Finding(each.title, mark, str(error))]
            yield from findings
    return readable


def _set_up(data: CLIPDataModule, stage: str, mark: str) -> Generator[Finding, None, list[Part]]:
    """Returns the data, or where it does not open as a whole, a module for each data set that opens alone."""
    try:
        data.setup(stage)
        return [(data, stage, None)]
    except (ValueError, OSError) as error:
        whole = Finding("data", mark, str(error))
    parts, problems = list[Part](), list[Finding]()
    for kind, sources, changes in _alone(data, stage):
        part, own_stage = copy.copy(data), "fit" if kind == "training" else "test"
        vars(part).update(changes)
        try:
            part.setup(own_stage)
            parts.append((part, own_stage, kind))
        except (ValueError, OSError) as error:
            names = ", ".join(each if isinstance(each, str) else each.title for each in sources)
            problems.append(Finding(f"{kind}: {names}", mark, str(error)))
    yield from problems or [whole]
    return parts


def _alone(data: CLIPDataModule, stage: str) -> Iterator[tuple[str, Sequence[DataSource | str], dict[str, Any]]]:
    """Kind and sources of every data set, and the attributes that leave out the others."""
    if stage == "fit":
        yield "training", data.train_sources, {"val_sources": (), "holdout": 0}
    for each in data.val_sources if stage == "fit" else data.test_sources:
        kind = "validation" if stage == "fit" else "test"
        yield kind, [each], {"test_sources": (each,), "unknown_sources": ()}
    for each in data.unknown_sources if stage == "test" else ():
        yield "unknown", [each], {"test_sources": (STAND_IN,), "unknown_sources": (each,)}


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


def _size(found: DataSet) -> int | None:
    try:
        return len(found.loader.dataset)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return None


def _look_at(found: DataSet, model: RobustMethod | None) -> Iterator[Finding]:
    """Reads the images of an evaluation set, or a batch of a training set, and classifies them."""
    start, bad = perf_counter(), found.loader.bad_samples
    batches = list(islice(found.loader, 1 if found.kind == "training" else None))
    count = sum(len(batch.labels) for batch in batches)
    found.load_seconds = (perf_counter() - start) / max(1, count + len(bad))
    size = "uncounted samples" if found.size is None else f"{found.size:,} samples"
    detail = f"{size}, {len(found.task.label_names)} classes; {count} of {count + len(bad)} images decode"
    notes = _absent(found)
    if bad:
        line = f"{bad[0].where} does not decode: {bad[0].why}; it is left out and counted"
        notes.append(Finding(found.title, WARNING, line))
    if batches:
        images, labels = (torch.cat(each) for each in zip(*(batch[:2] for batch in batches), strict=True))
        found.batch = batches[0]._replace(images=images, labels=labels, index=torch.arange(count))
        detail += f", {images.shape[-1]} x {images.shape[-2]} pixels" if images.ndim == 4 else ""
        if model is not None and images.ndim == 4 and not bool((labels == UNKNOWN).any()):
            start = perf_counter()
            model.prepare([found.task])
            found.head_seconds = perf_counter() - start
            with frozen(model), torch.no_grad():
                device = next(model.parameters()).device
                predicted = model.logits(images.to(device), found.task.name).argmax(-1).cpu()
            detail += f", {int((predicted == labels).sum())} of {count} are classified correctly"
            if len({*predicted.tolist()}) == 1 < len({*labels.tolist()}):  # a wrong model or order of names
                name = found.task.label_names[int(predicted[0])]
                line = f"all {count} images that were tried are classified as {name!r}"
                notes.append(Finding(found.title, INFO, line))
    yield Finding(found.title, OK if batches else PROBLEM, detail)
    yield from notes


def _absent(found: DataSet) -> list[Finding]:
    """Classes of a whole set without a sample."""
    images, classes = found.loader.dataset, found.task.label_names
    if not isinstance(images, Images) or found.kind in ("hold-out", "unknown"):
        return []
    labels = labels_of(images.source)
    absent = [] if labels is None else [classes[number] for number in sorted({*range(len(classes))} - {*labels})]
    named = ", ".join(absent[:NAMED]) + (", ..." if len(absent) > NAMED else "")
    line = f"{len(absent)} of {len(classes)} classes have no sample: {named}"
    return [Finding(found.title, WARNING, line)] if absent else []
