"""Are the data sets of a run what they should be? Looks at labels, and at a few images of each."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.data_sets import OpenedSource, open_source, open_training
from robustclip.data.samples import BadSample, Images, Loaded, StreamedImages
from robustclip.data.sources.source import labels_of
from robustclip.data.sources.streams import StreamedShards
from robustclip.data.splits import choose
from robustclip.data.task_parts import Role
from robustclip.methods import RobustMethod
from robustclip.models.layers import frozen
from robustclip.tools.findings import INFO, OK, PROBLEM, WARNING, Finding
from robustclip.types import Task

LOOKED_AT = 16  # images of each set
NAMED = 3  # classes that a line names


class Candidate(NamedTuple):
    """A data set that opens.

    Attributes:
        kind: ``test``, ``unknown``, ``training``, ``validation`` or ``hold-out``.
        source: the opened set.
        positions: of the samples that a run takes; None for all, or for a stream.
    """

    kind: str
    source: OpenedSource
    positions: list[int] | None = None

    @property
    def title(self) -> str:
        """For the reader."""
        return f"{self.kind}: {self.source.task.name}"


class Examined(NamedTuple):
    """A data set that can be read.

    Attributes:
        kind: of the candidate.
        task: of the set.
        size: samples that a run takes of it; None where nobody knows.
        images: ``(N, 3, H, W)`` decoded ones of one size.
        labels: ``(N,)``.
        load_seconds: to load one image.
        head_seconds: to encode the classes.
    """

    kind: str
    task: Task
    size: int | None
    images: Tensor
    labels: Tensor
    load_seconds: float
    head_seconds: float = 0.0


def examine(
    data: CLIPDataModule, stage: str, model: RobustMethod | None, *, lenient: bool = False
) -> Generator[Finding, None, list[Examined]]:
    """Opens and looks at every data set of a stage; one that fails hides no other.

    Args:
        data: of the run; is set up for the stage.
        stage: ``test`` or ``fit``.
        model: classifies the images that are looked at; None for no classification.
        lenient: what is wrong is a warning.

    Returns:
        The sets that can be read.
    """
    candidates, findings = _open(data, stage)
    examined = []
    for candidate in candidates:
        try:
            found, notes = _look_at(data, candidate, model)
            examined += [found] if found and candidate.kind != "unknown" else []
        except (ValueError, OSError) as error:
            notes = [Finding(candidate.title, PROBLEM, str(error))]
        findings += notes
    for finding in findings:
        yield finding._replace(mark=WARNING) if lenient and finding.mark == PROBLEM else finding
    return examined


def _open(data: CLIPDataModule, stage: str) -> tuple[list[Candidate], list[Finding]]:
    """The stage's sets; where one of them fails, the others."""
    candidates, findings = [], []
    for kind, title, opened in _openers(data, stage):
        try:
            candidates.append(Candidate(kind, opened()))
        except (ValueError, OSError) as error:
            findings.append(Finding(f"{kind}: {title}", PROBLEM, str(error)))
    if findings:
        return candidates, findings
    try:
        data.setup(stage)  # what concerns several sets: their names, the hold-out
    except (ValueError, OSError) as error:
        return candidates, [Finding("data", PROBLEM, str(error))]
    return [each for one in candidates for each in _positioned(data, one)], []


def _openers(data: CLIPDataModule, stage: str) -> Iterator[tuple[str, str, Callable[[], OpenedSource]]]:
    """Kind and title of every set of a stage, and what opens it."""

    def title(wanted: DataSource | str) -> str:
        return wanted if isinstance(wanted, str) else wanted.title

    evaluated: dict[str, tuple[Role, tuple[DataSource | str, ...]]]
    evaluated = {"test": ("test", data.wanted_test), "unknown": ("unknown", data.wanted_unknown)}
    if stage == "fit":
        yield (
            "training",
            ", ".join(map(title, data.wanted_train)),
            partial(open_training, data.wanted_train, root=data.root),
        )
        evaluated = {"validation": ("test", data.wanted_val)}
    for kind, (role, every) in evaluated.items():
        for each in every:
            yield kind, title(each), partial(open_source, each, root=data.root, split="test", role=role)


def _positioned(data: CLIPDataModule, candidate: Candidate) -> list[Candidate]:
    """Tells which samples a run takes, and splits the hold-out off."""
    dataset = candidate.source.dataset
    if dataset is None:
        return [candidate]
    if candidate.kind != "training":
        return [candidate._replace(positions=choose(dataset, None, data.max_samples))]
    held = [] if data.val_positions is None else choose(dataset, data.val_positions, data.max_samples)
    kept = candidate._replace(positions=data.train_positions)
    return [kept, *([candidate._replace(kind="hold-out", positions=held)] if held else [])]


def _look_at(
    data: CLIPDataModule, candidate: Candidate, model: RobustMethod | None
) -> tuple[Examined | None, list[Finding]]:
    name, task = candidate.title, candidate.source.task
    start = perf_counter()
    samples = _samples(data, candidate)
    seconds = (perf_counter() - start) / max(1, len(samples))
    good = [sample for sample in samples if not isinstance(sample, BadSample)]
    notes = _undecodable(data, candidate, samples) + _absent(candidate)
    if not good:
        return None, notes or [Finding(name, PROBLEM, "no image could be read")]
    size = _size(candidate)
    shapes = Counter(tuple(image.shape[-2:]) for image, _, _ in good)
    common = shapes.most_common(1)[0][0]
    chosen = [sample for sample in good if tuple(sample[0].shape[-2:]) == common]
    images, labels = torch.stack([sample[0] for sample in chosen]), torch.tensor([sample[1] for sample in chosen])
    found = Examined(candidate.kind, task, size, images, labels, seconds)
    count = "uncounted samples" if size is None else f"{size:,} samples"
    sizes = ", ".join(f"{width} x {height}" for height, width in list(shapes)[:NAMED])
    detail = f"{count} of {candidate.source.split!r}, {len(task.label_names)} classes, {sizes} pixels"
    detail += f"; {len(good)} of {len(samples)} images decode"
    if model is None or candidate.source.has_unknown:  # unknown classes cannot be classified rightly
        return found, [Finding(name, OK, detail), *notes]
    found, right, only = _classify(found, model)
    if only is not None:
        notes.append(Finding(name, INFO, f"all {len(labels)} images that were tried are taken for {only!r}"))
    return found, [Finding(name, OK, f"{detail}, {right} of {len(labels)} are classified rightly"), *notes]


def _samples(data: CLIPDataModule, candidate: Candidate) -> list[Loaded]:
    """A few samples, spread over the set; of a stream, its first."""
    source, transform = candidate.source, data.transform(candidate.source)
    if source.dataset is None:
        shards = StreamedShards(source.urls[:1], max_samples=LOOKED_AT)
        return list(StreamedImages(shards, transform, source.class_count))
    images = Images(source.dataset, transform, candidate.positions)
    places = torch.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).round().int()
    return [images[number] for number in places.tolist()]


def _undecodable(data: CLIPDataModule, candidate: Candidate, samples: Sequence[Loaded]) -> list[Finding]:
    bad = next((sample for sample in samples if isinstance(sample, BadSample)), None)
    if bad is None:
        return []
    is_left_out = candidate.kind == "training" or data.bad_samples == "skip"
    remedy = "it is left out and counted" if is_left_out else "`bad_samples: skip` leaves it out"
    line = f"{bad.where} does not decode: {bad.why}; {remedy}"
    return [Finding(candidate.title, WARNING if is_left_out else PROBLEM, line)]


def _absent(candidate: Candidate) -> list[Finding]:
    """Classes of the whole set without a sample."""
    dataset, classes = candidate.source.dataset, candidate.source.task.label_names
    has_no_classes = candidate.kind in ("hold-out", "unknown")
    labels = None if dataset is None or has_no_classes else labels_of(dataset)
    absent = [] if labels is None else [classes[number] for number in sorted({*range(len(classes))} - {*labels})]
    if not absent:
        return []
    named = ", ".join(absent[:NAMED]) + (", ..." if len(absent) > NAMED else "")
    line = f"{len(absent)} of {len(classes)} classes have no sample: {named}"
    return [Finding(candidate.title, WARNING, line)]


def _size(candidate: Candidate) -> int | None:
    if candidate.positions is not None:
        return len(candidate.positions)
    dataset = candidate.source.dataset
    return candidate.source.length if dataset is None else len(dataset)  # type: ignore[arg-type]


def _classify(found: Examined, model: RobustMethod) -> tuple[Examined, int, str | None]:
    """Clean predictions of the images that were looked at.

    Returns:
        The set with the time of its head; how many are right; the class if all of several classes are taken for it,
        which hints at a wrong model or order of names.
    """
    device = next(model.parameters()).device
    start = perf_counter()
    model.prepare([found.task])
    found = found._replace(head_seconds=perf_counter() - start)
    with frozen(model), torch.no_grad():
        predicted = model.logits(found.images.to(device), found.task.name).argmax(-1).cpu()
    is_one = len(set(predicted.tolist())) == 1 and len(set(found.labels.tolist())) > 1
    only = found.task.label_names[int(predicted[0])] if is_one else None
    return found, int((predicted == found.labels).sum()), only
