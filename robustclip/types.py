"""Types that the whole package shares."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor
from torch.utils.data import DataLoader

from robustclip.arguments import checked
from robustclip.names import TASK_NAME

UNKNOWN = -1
"""Label of an image whose class is not among the task's class names."""


Crop = Literal["tecoa", "clip", "squash"]
"""Name of the resize before a centre crop: that of TeCoA's and PMG-AFT's code, of CLIP, or of SigLIP."""


class Resize(NamedTuple):
    """The antialiased resize before a centre crop.

    Attributes:
        ratio: short side after the resize over the side of the crop.
        interpolation: ``bilinear`` or ``bicubic``.
        is_squashed: whether both sides get the size of the crop, so that the whole image is kept and its shape is not.
    """

    ratio: float
    interpolation: Literal["bilinear", "bicubic"]
    is_squashed: bool = False

    def short_side(self, size: int) -> int:
        """Returns the short side in pixels before a crop of ``size`` pixels."""
        return round(size * self.ratio)


RESIZES: Mapping[Crop, Resize] = MappingProxyType(
    {
        "tecoa": Resize(256 / 224, "bilinear"),
        "clip": Resize(1.0, "bicubic"),
        "squash": Resize(1.0, "bicubic", is_squashed=True),
    }
)


class Pairs(NamedTuple):
    """Images with a caption each.

    Attributes:
        images: ``(B, 3, H, W)`` float in [0, 1], not normalised.
        captions: ``B`` texts.
        index: ``(B,)`` int64 positions in the set of pairs.
    """

    images: Tensor
    captions: tuple[str, ...]
    index: Tensor  # type: ignore[assignment]  # the field is worth more than tuple.index


class Batch(NamedTuple):
    """One batch of labelled images.

    Attributes:
        images: ``(B, 3, H, W)`` float in [0, 1], not normalised; or ``(B, D)`` float32, embeddings by the frozen tower
            that stand in their place, for methods that take these.
        labels: ``(B,)`` int64 class numbers of the batch's task, or `UNKNOWN`.
        index: ``(B,)`` int64 sample ids, unique within a data set and independent of batching.
        captions: ``B`` texts, empty where an image has none; None where the data have no captions.
        anchors: image-text pairs of another set; None where there is none.
        digests: ``B`` hashes of the images' pixels; None but in evaluation of images.

    Examples:
        >>> import torch
        >>> from robustclip import Batch
        >>> batch = Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2))
        >>> batch.captions is None
        True
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]
    captions: tuple[str, ...] | None = None
    anchors: Pairs | None = None
    digests: tuple[str, ...] | None = None


@checked
@dataclass(frozen=True)
class Task:
    """A zero-shot classification problem: the class names and templates of a data set.

    Args:
        name: matches ``[a-z0-9_]+``; it names metrics and results.
        class_names: ``C`` names; position is the label, unless there are groups.
        templates: prompts, each with ``{}`` in place of the class name.
        groups: per label the positions of its class names, for labels of several names; a label's logit is the highest
            of its names. None if every name is a label.
        descriptions: ``C`` lists of sentences in place of prompts from templates; None for templates.

    Raises:
        ValueError: a name or template is malformed, there are no classes, a group has an unknown position, or
            descriptions are not of all classes.

    Examples:
        >>> from robustclip import Task
        >>> task = Task("pets", ("cat", "dog"), ("a photo of a {}.", "a drawing of a {}."))
        >>> task.class_names.index("dog")
        1
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ("This is a photo of a {}",)
    groups: tuple[tuple[int, ...], ...] | None = None
    descriptions: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not TASK_NAME.fullmatch(self.name):
            raise ValueError(f"task name must match [a-z0-9_]+, got {self.name!r}; set `name` for this data set")
        if not self.class_names:
            raise ValueError(f"task {self.name!r} has no class names; give `class_names`")
        if not self.templates:
            raise ValueError(f"task {self.name!r} has no templates; give `templates`")
        for template in self.templates:
            if template.count("{}") != 1:
                example = "such as 'a photo of {}'"
                raise ValueError(f"a template of task {self.name!r} must hold '{{}}' once, {example}, got {template!r}")
        if self.descriptions is not None and (
            len(self.descriptions) != len(self.class_names) or not all(self.descriptions)
        ):
            raise ValueError(f"descriptions of task {self.name!r} must be sentences of each class name")
        for group in () if self.groups is None else self.groups:
            if not group or not all(0 <= member < len(self.class_names) for member in group):
                names = f"positions among the {len(self.class_names)} class names"
                raise ValueError(f"a group of task {self.name!r} must hold {names}, got {group}")

    @property
    def label_names(self) -> tuple[str, ...]:
        """The text of every label, with the names of a group joined by "or"."""
        if self.groups is None:
            return self.class_names
        return tuple(" or ".join(self.class_names[member] for member in group) for group in self.groups)

    @property
    def prompts(self) -> list[list[str]]:
        """The ``C`` lists of ``T`` prompts, one list per class name; descriptions may be of different numbers."""
        if self.descriptions is not None:
            return [list(sentences) for sentences in self.descriptions]
        return [[template.replace("{}", name) for template in self.templates] for name in self.class_names]


class Share(NamedTuple):
    """One of several disjoint parts of every test set, each evaluated by a run of its own.

    Attributes:
        number: number of the part, from 0.
        count: number of parts.
    """

    number: int
    count: int  # type: ignore[assignment]  # the field is worth more than tuple.count


class TrainingImages(NamedTuple):
    """Images of a training with labels, which later tests recognise.

    Attributes:
        total: number of images; 0 if they are not known.
        digests: of the pixels of a choice of them.
    """

    total: int = 0
    digests: tuple[str, ...] = ()

    def joined(self, other: "TrainingImages") -> "TrainingImages":
        """Returns the images of both trainings; itself if they are the same."""
        added = [digest for digest in other.digests if digest not in self.digests]
        return TrainingImages(self.total + other.total, (*self.digests, *added)) if added else self

    @classmethod
    def read(cls, content: Mapping[str, Any] | None) -> "TrainingImages":
        """Reads them as `_asdict` gives them, from JSON or a checkpoint; none if they are not known.

        Raises:
            ValueError: the content is damaged.
        """
        try:
            return cls(int(content["total"]), tuple(map(str, content["digests"]))) if content else cls()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"trained_on must hold `total` and `digests`: {error!r:.80}") from error


class Data(Protocol):
    """The members of a data module that methods, callbacks and tools use.

    `CLIPDataModule` has them all. An own module inherits from ``Data`` and ``LightningDataModule``, sets the tasks of
    its stages, and yields a `Batch` from its loaders; the rest has defaults.

    Attributes:
        val_tasks: tasks of the validation loaders, in their order.
        test_tasks: tasks of the test loaders, in their order.
        unknown_names: names of the sets of unknown classes, in their order; none is the name of a test task.
        train_has_unknown: whether training images are labelled `UNKNOWN`.
        feature_model: model whose embeddings stand in place of this stage's images, with its ``fingerprint``; None for
            images.
        bad_sample_counts: images that this process could not decode in its latest evaluation, by task.
    """

    val_tasks: list[Task] = []  # read, never changed
    test_tasks: list[Task] = []
    unknown_names: Sequence[str] = ()
    train_has_unknown: bool = False
    feature_model: Mapping[str, Any] | None = None
    bad_sample_counts: Mapping[str, int] = MappingProxyType({})

    @property
    def train_task(self) -> Task:
        """Classes of the training set."""
        raise ValueError(f"{type(self).__name__} has no `train_task`; set it to the Task of the training classes")

    def protocol(self, task: str) -> dict[str, Any]:
        """Returns split, preprocessing, attack space and samples of a test or unknown set, for a result's protocol."""
        return {"split": task, "sample_ids": "all", "preprocessing": type(self).__name__, "attack_space": "native"}

    def test_size(self, task: str) -> int | None:
        """Returns the number of samples of a test task that are evaluated; None if it is not known."""
        return None

    def connect(self, *, limit: int | None = None, done: "Done | None" = None, share: Share | None = None) -> None:
        """Takes the settings of an evaluation, before loaders are made.

        Args:
            limit: evaluate a fixed choice of this many samples of each task; None for all.
            done: returns the sample ids that an earlier start of the test has finished, by task; test loaders leave
                them out. It is called when test loaders are made. None for no ids.
            share: part of every test and unknown set that the loaders of a test yield, the same samples for any number
                of processes; None for all samples.

        Raises:
            ValueError: a limit or a share that the data module does not apply.
        """
        if limit is not None:
            raise ValueError(f"{type(self).__name__} has no `connect`, so that max_samples must be null, got {limit}")
        if share is not None:
            raise ValueError(f"{type(self).__name__} has no `connect`, so that shards must be 1, got {share.count}")

    def done_dataloader(self, task: str) -> DataLoader[Any] | None:
        """Loads the samples of a test task that ``done`` lists, in order and with digests; None for no sample."""
        return None

    def plain_train_dataloader(self) -> DataLoader[Any]:
        """Loads the training images once and in order, on all processes together, without augmentation."""
        raise ValueError(f"{type(self).__name__} has no `plain_train_dataloader`; return a loader in order from it")

    def training_images(self, limit: int) -> TrainingImages:
        """Returns the number of training images, and digests of some of them as tests of this data module see them.

        Args:
            limit: largest number of digests.
        """
        return TrainingImages()

    def unknown_dataloaders(self) -> Mapping[str, Iterable[Batch]]:
        """Loads every set of unknown classes, by its name; all labels are `UNKNOWN`."""
        return {}

    def unknown_class_names(self, name: str) -> Sequence[str]:
        """Returns the class names of the data set of a set of unknown classes, if they are known.

        Known classes may be among them.
        """
        return ()

    def captioned_images(self) -> Any:
        """Returns a named set that yields images ``(B, 3, H, W)`` and ``B`` lists of captions; None if it has none."""
        return None


Done = Callable[[str], frozenset[int]]
MEMBERS = tuple(name for name in vars(Data) if not name.startswith("_"))


def data_of(trainer: Any) -> Data:
    """Returns the data module of a trainer.

    Raises:
        ValueError: the trainer has no data module, or one that lacks a member of `Data`.
    """
    data: Data | None = trainer.datamodule
    if data is None:
        raise ValueError("the trainer has no data module; give one as `datamodule`, such as CLIPDataModule(...)")
    for name in MEMBERS:
        if inspect.getattr_static(data, name, MEMBERS) is MEMBERS:  # without running a property, which may open files
            raise ValueError(f"{type(data).__name__} lacks {name!r}; let it inherit from robustclip.types.Data first")
    return data
