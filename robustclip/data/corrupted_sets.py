"""Adds corrupted copies of the test sets, one task per kind and severity."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from robustclip.arguments import checked
from robustclip.data.catalog import CATALOG
from robustclip.data.corruptions import KINDS, Corruption
from robustclip.data.opened_source import OpenedSource, open_source
from robustclip.data.sources.arrays import LABELS
from robustclip.data.sources.source import labels_of
from robustclip.paths import located

KindName = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]


@checked
@dataclass(frozen=True)
class Corruptions:
    """Corrupted copies of every test set, each a task of its own named ``SET_KIND_SEVERITY``.

    They are computed by `Corruption`, or read from published files, in the layout of ImageNet-C,
    ``KIND/SEVERITY/CLASS/IMAGE`` or ``CATEGORY/KIND/SEVERITY/CLASS/IMAGE``, or in that of CIFAR-10-C, ``KIND.npy`` and
    ``labels.npy``. The result gets a section of errors.

    Args:
        kinds: names of the kinds; ``all`` for the fifteen of ImageNet-C.
        severities: numbers from 1 to 5.
        files: folder of published images, with one test set; null computes them.
        frost: folder of photographs of frost, as in the authors' code; null draws a texture.

    Raises:
        ValueError: no kind or severity, or one is listed twice; or photographs of frost beside published files.
    """

    kinds: Literal["all"] | list[KindName] = "all"
    severities: tuple[Literal[1, 2, 3, 4, 5], ...] = (1, 2, 3, 4, 5)
    files: str | None = None
    frost: str | None = None

    def __post_init__(self) -> None:
        for key, values in (("kinds", self.names), ("severities", self.severities)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"corruptions.{key} must be listed once each, got {list(values)}")
        if self.files is not None and self.frost is not None:
            raise ValueError("corruptions.frost must be null where corruptions.files gives images; unset one of them")

    @property
    def names(self) -> list[str]:
        """Names of the kinds."""
        return [*KINDS] if self.kinds == "all" else [*self.kinds]


@dataclass(frozen=True)
class Copy:
    """The origin of a corrupted copy of a test set.

    Args:
        of: name of the test set.
        kind: kind of the corruption.
        severity: severity of the corruption.
        corruption: transform that computes the images; None for published images.
    """

    of: str
    kind: str
    severity: int
    corruption: Corruption | None

    @property
    def axis(self) -> dict[str, Any]:
        """Value for the protocol of a result, in JSON's types."""
        if self.corruption is None:
            return {"of": self.of, "kind": self.kind, "severity": self.severity, "constants": "published files"}
        return {"of": self.of, **self.corruption.identity}


def with_copies(tests: Sequence[OpenedSource], settings: Corruptions | None, *, root: str) -> list[OpenedSource]:
    """Puts the corrupted copies of every test set behind it.

    Args:
        tests: opened test sets.
        settings: kinds and severities; None for no copies.
        root: folder that relative paths start at.

    Raises:
        ValueError: published images do not exist, have other classes, or would be those of several test sets; or a
            folder of photographs has none.
    """
    if settings is None:
        return list(tests)
    if settings.files is not None and len(tests) != 1:
        raise ValueError(f"data.corruptions.files has copies of one set, but data.test lists {len(tests)}; give one")
    pairs = [(kind, severity) for kind in settings.names for severity in settings.severities]
    return [one for test in tests for one in (test, *(_copy(test, *pair, settings, root) for pair in pairs))]


def _copy(test: OpenedSource, kind: str, severity: int, settings: Corruptions, root: str) -> OpenedSource:
    task = replace(test.task, name=f"{test.task.name}_{kind}_{severity}")
    if settings.files is not None:
        folder = Path(located(settings.files, root, "data.corruptions.files"))
        files = _published(test, folder, kind, severity)
        _check_counts(test, files, folder, kind, severity)
        return replace(files, task=task, copy=Copy(test.task.name, kind, severity, None))
    frost = None if settings.frost is None else Path(located(settings.frost, root, "data.corruptions.frost"))
    corruption = Corruption(kind, severity, frost)
    _ = corruption.identity  # reads the photographs, so that a wrong folder ends a run before it starts
    return replace(test, task=task, copy=Copy(test.task.name, kind, severity, corruption))


def _published(test: OpenedSource, folder: Path, kind: str, severity: int) -> OpenedSource:
    """Opens the published images of a kind and severity, which were cropped before they were corrupted."""
    if (folder / LABELS).is_file() or (folder / f"{kind}.npy").is_file():
        return _of_arrays(test, folder / f"{kind}.npy", severity)
    places = [folder / kind / str(severity), folder / KINDS[kind].category / kind / str(severity)]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        raise ValueError(f"data.corruptions.files needs {places[0]} or {places[1]}, found none; list other kinds")
    opened = _opened_like(test, source=f"folder:{place}", split=None)
    if opened.task.class_names != test.task.class_names or opened.task.groups != test.task.groups:
        counts = f"{len(opened.task.label_names)} against {len(test.task.label_names)}"
        raise ValueError(
            f"{place} must have the classes of data.test, {test.task.name!r}, found others ({counts}); set its"
            " class_names"
        )
    return opened


def _check_counts(test: OpenedSource, files: OpenedSource, folder: Path, kind: str, severity: int) -> None:
    """Refuses published images that are fewer or more than those of the test set, such as a part of a download."""
    ours, theirs = (Counter(labels_of(source.dataset) or ()) for source in (test, files))
    if ours and theirs and ours != theirs:
        label = next(label for label in sorted({*ours, *theirs}) if ours[label] != theirs[label])
        raise ValueError(
            f"{folder} must have as many images of every class as data.test, {test.task.name!r}; for {kind} at severity"
            f" {severity}, found {theirs[label]} of {test.task.label_names[label]!r} instead of {ours[label]}"
        )


def _opened_like(test: OpenedSource, **changes: Any) -> OpenedSource:
    """Opens published images with the other settings of the test set, at the size that they have."""
    changes |= {"name": test.task.name, "border": 0, "crop": "clip"}  # which leaves images of the model's size alone
    return open_source(replace(test.sources[0], **changes), root=".", split="test")


def _of_arrays(test: OpenedSource, file: Path, severity: int) -> OpenedSource:
    """Opens one severity of a NumPy file, whose labels are numbers in the order of the published classes."""
    if test.part or test.task.groups is not None:
        raise ValueError(f"{file} is for a whole set with one name per class; unset classes, images and shift")
    names = [*test.task.class_names]
    opened = _opened_like(test, source=f"npy:{file}", split=str(severity), class_names=names)
    entry = CATALOG.get(test.task.name)
    is_published_order = entry is not None and [*entry.class_names] == names
    if not is_published_order and labels_of(opened.dataset) != labels_of(test.dataset):
        raise ValueError(
            f"{file.parent / LABELS} must have the labels of data.test, {test.task.name!r}, found others; test that set"
            " in its published order, or a set of the catalogue"
        )
    return opened
