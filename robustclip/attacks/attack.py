"""What every attack is: a search for worse images inside a norm ball and [0, 1]."""

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from robustclip.arguments import Checked, fitted
from robustclip.attacks.sample_losses import Loss, cross_entropy

__all__ = ["Attack", "Forward", "Loss", "Member", "Radius", "Worst", "cross_entropy", "pixels"]

Forward = Callable[[Tensor], Tensor]
"""Images ``(B, 3, H, W)`` in [0, 1] to outputs ``(B, ...)``."""

Radius = float | str
"""A length in [0, 1] pixel units: ``0.0157`` or ``"4/255"``."""

BOX_TOLERANCE = 1e-6  # decoders and resizers round; anything further out means normalised images


def pixels(value: Radius, *, name: str, limit: float | None = 1.0) -> float:
    """Turns ``0.0157``, ``"4/255"`` or ``"0.5/255"`` into a float.

    Args:
        value: the length.
        name: of the argument, for the error message.
        limit: largest sensible value; None for norms that grow with the number of pixels.

    Raises:
        ValueError: not a number, negative, or above the limit, as when grey levels are meant.
    """
    try:
        value = fitted(value, Radius)
        parts = [Fraction(part.strip()) for part in value.split("/")] if isinstance(value, str) else [Fraction(value)]
        number = float(parts[0] / parts[1]) if len(parts) == 2 else float(parts[0])
        if len(parts) > 2:
            raise ValueError
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{name} must be a number or a fraction such as '4/255', got {value!r}") from None
    if number < 0 or (limit is not None and number > limit):
        grey = f"; write '{number:g}/255' for grey levels" if number > 0 and "/" not in str(value) else ""
        raise ValueError(f"{name} is measured in [0, 1] pixel units, got {value!r}{grey}")
    return number


def check_range(images: Tensor) -> None:
    """Refuses images outside [0, 1], without a host synchronisation on accelerators.

    Raises:
        ValueError: on the CPU; elsewhere the device reports a failed assertion.
    """
    if images.numel() == 0:
        return
    low, high = torch.aminmax(images)
    if images.device.type != "cpu":
        torch._assert_async((low >= -BOX_TOLERANCE) & (high <= 1 + BOX_TOLERANCE), "attacks work on images in [0, 1]")
    elif not (float(low) >= -BOX_TOLERANCE and float(high) <= 1 + BOX_TOLERANCE):
        found = f"[{float(low):.4g}, {float(high):.4g}]"
        raise ValueError(f"attacks work on images in [0, 1], got {found}; normalisation belongs in the model")


class Attack(Checked, ABC):
    """Perturbs images inside a norm ball and [0, 1]. Immutable: one instance may serve everywhere.

    Attributes:
        is_anytime: every image that it evaluates lies in ball and box, so each of them counts as an attack. Its
            forward passes are of the whole batch, in order.
        is_black_box: it asks for no gradients.
        eps: radius; None for attacks without a ball.
        norm: ``linf`` or ``l2``.
    """

    is_anytime: bool = False
    is_black_box: bool = False
    eps: float | None = None
    norm: str = "linf"

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
        """Runs the attack.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1]; left untouched.
            forward: images to outputs; must be differentiable unless the attack is black-box.
            targets: second argument of the loss, for instance labels ``(B,)``.
            loss: per-sample loss to maximise.
            index: ``(B,)`` sample ids. Random numbers are then a function of ``(seed, id)`` alone, so that a
                result does not depend on batching, order, or number of processes. None draws from torch's generator.
            seed: changes the draw for the same ids.

        Returns:
            Attacked images ``(B, 3, H, W)`` in [0, 1], detached.

        Raises:
            ValueError: images outside [0, 1].
        """
        with torch.inference_mode(False), torch.enable_grad():
            images = images.detach().clone()
            check_range(images)
            index = None if index is None else index.detach().clone()
            return self.perturb(images, forward, targets.detach().clone(), loss, index=index, seed=seed).detach()

    @abstractmethod
    def perturb(
        self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, *, index: Tensor | None, seed: int
    ) -> Tensor:
        """The search itself; arguments as in `__call__`, with gradients enabled and inputs already copied."""

    def members(self, classes: int) -> list["Member"]:
        """The attacks that it consists of, in order, for a task of that many classes; by default itself."""
        return [Member(_snake_case(type(self).__name__), self)]

    def cost(self, classes: int) -> "Cost | None":
        """Passes per image of an attack that never stops early, for a task of that many classes; None if unknown."""
        return None

    def scaled(self, *, radius: float = 1.0, steps: float = 1.0) -> "Attack | None":
        """A copy with radius and number of steps multiplied; None where it is not known how.

        Args:
            radius: factor of the radius and the step size; L-infinity radii stop at 1.
            steps: factor of the number of steps or queries, of which at least one remains.
        """
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """The public attributes, in JSON's types."""
        return {key: _jsonable(value) for key, value in vars(self).items() if not key.startswith("_")}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"

    def _changed(self, **attributes: Any) -> Self:
        twin = copy.copy(self)
        vars(twin).update(attributes)
        return twin


class Member(NamedTuple):
    """One attack of several, under the name that it has in results.

    Attributes:
        name: in snake case.
        attack: what runs.
        note: what differs from the rule for this task, such as another loss for few classes.
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
    """Per sample the worst image so far: a misclassified one wins, then the higher value.

    Attributes:
        images: ``(B, 3, H, W)``.
        value: ``(B,)`` of what is maximised.
        is_broken: ``(B,)``, misclassified.
    """

    images: Tensor
    value: Tensor
    is_broken: Tensor

    @classmethod
    def none_yet(cls, images: Tensor) -> Self:
        """Clean images that everything beats."""
        value = torch.full((len(images),), -torch.inf, device=images.device)
        return cls(images, value, torch.zeros_like(value, dtype=torch.bool))

    def or_worse(self, other: Self, *, where: Tensor | None = None) -> Self:
        """Takes the other's image for samples where that is worse, and where allowed ``(B,)``."""
        is_worse = (other.is_broken & ~self.is_broken) | (
            (other.is_broken == self.is_broken) & (other.value > self.value)
        )
        is_worse = is_worse if where is None else is_worse & where
        return type(self)(
            torch.where(is_worse.view(-1, 1, 1, 1), other.images, self.images),
            torch.where(is_worse, other.value, self.value),
            torch.where(is_worse, other.is_broken, self.is_broken),
        )


class SkipsMisclassified:
    """Base of models that leave out misclassified samples of a batch on their own, such as the evaluation's."""


def on_open(forward: Forward, is_broken: Tensor) -> Forward:
    """Restricts a model to the samples that are not misclassified yet; the others get zero logits without gradient.

    Args:
        forward: images to logits ``(B, C)``.
        is_broken: ``(B,)``, misclassified.
    """
    if isinstance(forward, SkipsMisclassified) or not bool(is_broken.any()):
        return forward
    rows = (~is_broken).nonzero()[:, 0]

    def restricted(images: Tensor) -> Tensor:
        logits = forward(images[rows])
        return logits.new_zeros(len(images), logits.shape[1]).index_copy(0, rows, logits)

    return restricted


def gradient_of(value: Tensor, images: Tensor) -> Tensor:
    """Gradient of the summed value ``(B,)``; zero where it does not depend on the images."""
    if not value.requires_grad:
        return torch.zeros_like(images)
    return torch.autograd.grad(value.sum(), images, allow_unused=True, materialize_grads=True)[0]


def check_own_loss(attack: Attack, loss: Loss) -> None:
    """Refuses a caller's loss for attacks on classification that bring their own.

    Raises:
        ValueError: a loss other than the default.
    """
    if loss is not cross_entropy:
        raise ValueError(f"{type(attack).__name__} brings its own loss; use PGD for a custom one")


def scaled_radius(eps: float, factor: float, norm: str) -> float:
    """Multiplied radius, at most 1 for L-infinity."""
    return min(eps * factor, 1.0) if norm == "linf" else eps * factor


def scaled_count(count: int, factor: float) -> int:
    """Multiplied number of steps, at least 1 unless there were none."""
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
