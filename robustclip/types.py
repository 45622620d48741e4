"""The vocabulary that every other module shares; imports nothing of ours."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

TASK_NAME = re.compile(r"[a-z0-9_]+")


class Batch(NamedTuple):
    """One batch of labelled images.

    Attributes:
        images: ``(B, 3, H, W)`` float in [0, 1], not normalised.
        labels: ``(B,)`` int64 class numbers of the batch's task.
        index: ``(B,)`` int64 sample ids, unique within a data set and independent of batching.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # the field is worth more than tuple.index


@dataclass(frozen=True)
class Task:
    """A zero-shot classification problem: what the text tower needs to know of a data set.

    Args:
        name: matches ``[a-z0-9_]+``; it names metrics and results.
        class_names: ``C`` names, position is the label.
        templates: prompts, each with ``{}`` where the class name goes.

    Raises:
        ValueError: a malformed name or template, or no classes.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ("This is a photo of a {}",)

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

    @property
    def prompts(self) -> list[list[str]]:
        """``C`` lists of ``T`` prompts."""
        return [[template.replace("{}", name) for template in self.templates] for name in self.class_names]
