"""What every attack is: a search for worse images inside a norm ball and [0, 1]."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

Forward = Callable[[Tensor], Tensor]
"""Images ``(B, 3, H, W)`` in [0, 1] to outputs ``(B, ...)``."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets to one loss per sample ``(B,)``; the attack maximises its sum."""

Radius = float | str
"""A length in [0, 1] pixel units: ``0.0157`` or ``"4/255"``."""

BOX_TOLERANCE = 1e-6  # decoders and resizers round; anything further out means normalised images


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per sample in fp32: logits ``(B, C)`` and labels ``(B,)`` to ``(B,)``."""
    return F.cross_entropy(outputs.float(), targets, reduction="none")


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


class Attack(ABC):
    """Perturbs images inside a norm ball and [0, 1]. Immutable: one instance may serve everywhere."""

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

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({settings})"
