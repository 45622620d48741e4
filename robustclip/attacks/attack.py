"""The base class of attacks: searches for adversarial images inside a perturbation set and the valid pixel range."""

import copy
import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from robustclip.arguments import Checked
from robustclip.attacks.pixel_units import Radius, check_range, pixels
from robustclip.attacks.rows import replaced, selected
from robustclip.attacks.sample_losses import Loss, cross_entropy, predicted
from robustclip.overrides import check_overrides, check_shape

__all__ = ["Attack", "Forward", "Loss", "Member", "Radius", "Worst", "cross_entropy", "pixels"]

Forward = Callable[[Tensor], Tensor]
"""Maps images ``(B, 3, H, W)`` in [0, 1] to outputs ``(B, ...)``."""

Target = str | dict[str, str] | None
"""Type of a target: the name of a class in every task, or of one class per task by the task's name."""


class Attack(Checked, ABC):
    """Perturbs images inside a perturbation set and the valid pixel range; instances are immutable.

    Attributes:
        is_anytime: every image that the attack evaluates is in the perturbation set and the valid pixel range, so that
            each counts as an attack; its forward passes are of the whole batch, in order.
        is_wide: the search begins outside the perturbation set; these images do not count.
        is_black_box: the attack uses no gradients.
        eps: radius; None for attacks without a perturbation set.
        norm: ``linf``, ``l2`` or ``l1``.
        target: name of the class that the attack moves images to; None for any wrong class.
        aim: number of that class in the task that is attacked.

    Examples:
        >>> import torch
        >>> from robustclip import Attack
        >>> class Darken(Attack):
        ...     '''Reduces every pixel by the radius.'''
        ...
        ...     is_anytime = True
        ...     eps = 4 / 255
        ...
        ...     def perturb(self, images, forward, targets, loss, *, index, seed):
        ...         return (images - self.eps).clamp(0, 1)
        >>> attacked = Darken()(torch.ones(1, 3, 32, 32), lambda x: x.mean((2, 3)), torch.tensor([0]))
        >>> round(float(attacked.mean()) * 255)
        251
    """

    is_anytime: bool = False
    is_wide: bool = False
    is_black_box: bool = False
    eps: float | None = None
    norm: str = "linf"
    target: Target = None
    _aim: int | None = None

    def __call__(
        self,
        images: Tensor,
        forward: Forward,
        targets: Tensor,
        loss: Loss = cross_entropy,
        *,
        index: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Runs the attack on a batch of images.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], float32 or float64; not modified.
            forward: function from images to outputs; must be differentiable unless the attack is black-box.
            targets: second argument of the loss, for instance labels ``(B,)``.
            loss: loss per sample, which is maximised.
            index: ``(B,)`` sample ids. Random numbers then depend on ``(seed, id)`` alone, so that a result does not
                depend on batching, order, or number of processes. None draws from torch's generator.
            seed: selects another draw for the same ids.

        Returns:
            Adversarial images ``(B, 3, H, W)`` in [0, 1], detached.

        Raises:
            ValueError: images are outside [0, 1] or of another type, the attack has a target that no evaluation has
                looked up, or the subclass's `perturb` has other arguments or returns another shape.
        """
        if self.target is not None and self.aim is None:
            raise ValueError(f"target {self.target!r} is for attacks of an evaluation, which knows the classes by name")
        with torch.inference_mode(False), torch.enable_grad():
            images = images.detach().clone()
            check_range(images)
            if not len(images):
                return images
            index = None if index is None else index.detach().clone()
            check_overrides(self, Attack, ("perturb",))
            attacked = self.perturb(images, forward, targets.detach().clone(), loss, index=index, seed=seed)
            check_shape(self, "perturb", attacked, tuple(images.shape), "(B, 3, H, W) of its images")
            return attacked.detach()

    @abstractmethod
    def perturb(
        self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, *, index: Tensor | None, seed: int
    ) -> Tensor:
        """Searches for adversarial images.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], a copy.
            forward: function from images to outputs.
            targets: second argument of the loss, a copy.
            loss: loss per sample, which is maximised.
            index: ``(B,)`` sample ids that determine random numbers; None draws from torch's generator.
            seed: selects another draw for the same ids.

        Returns:
            Images ``(B, 3, H, W)``; gradients are enabled during the search.
        """

    def members(self, classes: int) -> list["Member"]:
        """Lists the attacks of which this one consists, in order, for a number of classes; by default itself."""
        return [Member(_snake_case(type(self).__name__), self)]

    def cost(self, classes: int) -> "Cost | None":
        """Passes per image of an attack that never stops early, for a task of that many classes; None if unknown."""
        return None

    def scaled(self, *, radius: float = 1.0, steps: float = 1.0) -> "Attack | None":
        """Returns a copy with radius and number of steps multiplied; None if the attack cannot be scaled.

        Args:
            radius: factor of the radius and the step size; L-infinity radii are at most 1.
            steps: factor of the number of steps or queries, which is at least one.
        """
        return None

    @property
    def aim(self) -> int | None:
        """Number of the target class; None for attacks without a target."""
        return self._aim

    def aimed_at(self, task: str, classes: Sequence[str]) -> "Attack":
        """Returns the attack with the number of its target class in a task; itself if it has no target.

        Args:
            task: name of the task.
            classes: names of its classes, in the order of the labels.

        Raises:
            ValueError: the attack has no target for this task, or the task has no such class.
        """
        if self.target is None:
            return self
        name = self.target if isinstance(self.target, str) else self.target.get(task)
        if name is None:
            raise ValueError(f"target names no class for the task {task!r}; it has {', '.join(self.target)}")
        if name not in classes:
            close = difflib.get_close_matches(name, classes, cutoff=0.4) or list(classes)[:3]
            raise ValueError(f"target: task {task!r} has no class {name!r}; near names are {', '.join(close)}")
        return self._changed(target=name, _aim=list(classes).index(name))

    def aimed_as(self, other: "Attack") -> Self:
        """Returns the attack with the target class of another one, which an evaluation has looked up."""
        return self if other.aim is None else self._changed(target=other.target, _aim=other.aim)

    def is_success(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Marks samples ``(B,)`` that are predicted as the target, or without a target as any wrong class.

        Without a target, a label that shares the largest logit with another class does not count as predicted.

        Args:
            outputs: logits ``(B, C)``.
            labels: ``(B,)``.
        """
        return predicted(outputs, labels) != labels if self.aim is None else outputs.argmax(-1) == self.aim

    def directed(self, loss: Loss) -> Loss:
        """Returns the loss to maximise; with a target, this is minus the loss of the target class.

        Args:
            loss: loss of outputs and labels.
        """
        aim = self.aim
        return loss if aim is None else lambda outputs, labels: -loss(outputs, torch.full_like(labels, aim))

    @property
    def settings(self) -> dict[str, Any]:
        """The public attributes of the attack, in JSON's types."""
        return {key: _jsonable(value) for key, value in vars(self).items() if not key.startswith("_")}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"

    def _set_target(self, target: Target) -> None:
        """Stores a target; without one, the settings of the attack do not mention it.

        Raises:
            ValueError: the loss is DLR, whose gradient vanishes for classes that are not among the highest.
        """
        if target is not None and self.settings.get("loss") == "dlr":
            raise ValueError("loss must be 'ce' or 'margin' where target is set, got 'dlr'")
        if target is not None:
            self.target = target

    def _changed(self, **attributes: Any) -> Self:
        twin = copy.copy(self)
        vars(twin).update(attributes)
        return twin


class Member(NamedTuple):
    """One attack of several, under its name in results.

    Attributes:
        name: name in snake case.
        attack: attack that runs.
        note: departure from the recipe for this task, such as another loss for few classes.
    """

    name: str
    attack: Attack
    note: str = ""


class Cost(NamedTuple):
    """Passes of the model per image.

    Attributes:
        gradient: forward and backward passes.
        forward: forward passes alone.
    """

    gradient: int
    forward: int


class Worst(NamedTuple):
    """The worst image of each sample so far: a misclassified one if there is any, of the highest value.

    Attributes:
        images: ``(B, 3, H, W)``.
        value: maximised quantity ``(B,)``.
        is_misclassified: ``(B,)``.
    """

    images: Tensor
    value: Tensor
    is_misclassified: Tensor

    @classmethod
    def clean(cls, images: Tensor) -> Self:
        """Starts from clean images with value minus infinity, so that any other image is worse."""
        value = torch.full((len(images),), -torch.inf, device=images.device)
        return cls(images, value, torch.zeros_like(value, dtype=torch.bool))

    def or_worse(self, other: Self, *, where: Tensor | None = None) -> Self:
        """Replaces the images of samples for which the other's image is worse.

        Args:
            other: other images of the same samples.
            where: ``(B,)``, samples that may be replaced; None for all.
        """
        is_worse = (other.is_misclassified & ~self.is_misclassified) | (
            (other.is_misclassified == self.is_misclassified) & (other.value > self.value)
        )
        is_worse = is_worse if where is None else is_worse & where
        return type(self)(
            replaced(self.images, other.images, is_worse),
            torch.where(is_worse, other.value, self.value),
            torch.where(is_worse, other.is_misclassified, self.is_misclassified),
        )


class SkipsMisclassified:
    """Marks models that skip misclassified samples of a batch themselves, such as the evaluation's."""


def restrict_to_correct(forward: Forward, is_misclassified: Tensor) -> Forward:
    """Restricts a model to the samples not yet misclassified; the others get zero logits without gradient.

    Args:
        forward: function from images to logits ``(B, C)``.
        is_misclassified: ``(B,)``.
    """
    if isinstance(forward, SkipsMisclassified) or not bool(is_misclassified.any()):
        return forward
    rows = (~is_misclassified).nonzero()[:, 0]

    def restricted(images: Tensor) -> Tensor:
        logits = forward(selected(images, rows))
        return logits.new_zeros(len(images), logits.shape[1]).index_copy(0, rows, logits)

    return restricted


def gradient_of(value: Tensor, images: Tensor) -> Tensor:
    """Computes the gradient of a summed value, zero where it does not depend on the images.

    Args:
        value: ``(B,)``.
        images: ``(B, 3, H, W)``.
    """
    if not value.requires_grad:
        return torch.zeros_like(images)
    return torch.autograd.grad(value.sum(), images, allow_unused=True, materialize_grads=True)[0]


def check_own_loss(attack: Attack, loss: Loss) -> None:
    """Refuses a caller's loss for attacks that define their own.

    Args:
        attack: attack on classification.
        loss: loss of the caller.

    Raises:
        ValueError: the loss is not the default, cross-entropy.
    """
    if loss is not cross_entropy:
        raise ValueError(f"{type(attack).__name__} defines its own loss; use PGD for a custom one")


def scaled_count(count: int, factor: float) -> int:
    """Multiplies a number of steps; at least 1 remains, unless it is 0.

    Args:
        count: number of steps.
        factor: factor of the number.
    """
    return max(round(count * factor), min(count, 1))


def _jsonable(value: Any) -> Any:
    if isinstance(value, Attack):
        return {"class": type(value).__name__, **value.settings}
    if isinstance(value, dict):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
