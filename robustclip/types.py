"""Types that the whole package shares; this module imports no other of the package but `arguments`."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from robustclip.arguments import checked

TASK_NAME = re.compile(r"[a-z0-9_]+")
UNKNOWN = -1
"""Label of an image whose class is not among the task's class names."""


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

    Raises:
        ValueError: a name or template is malformed, there are no classes, or a group has an unknown position.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ("This is a photo of a {}",)
    groups: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not TASK_NAME.fullmatch(self.name):
            raise ValueError(f"task name must match [a-z0-9_]+, got {self.name!r}; set `name` for this data set")
        if not self.class_names:
            raise ValueError(f"task {self.name!r} has no class names; give `class_names`")
        if not self.templates:
            raise ValueError(f"task {self.name!r} has no templates; give `templates`")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"a template of task {self.name!r} must hold '{{}}' once, got {template!r}")
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
        """The ``C`` lists of ``T`` prompts, one list per class name."""
        return [[template.replace("{}", name) for template in self.templates] for name in self.class_names]
