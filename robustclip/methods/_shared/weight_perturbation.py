"""Adversarial weight perturbation, an option of every method with a training attack."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from robustclip.arguments import NonNegative, checked
from robustclip.models.lora import is_factor

if TYPE_CHECKING:
    from robustclip.methods.base import RobustMethod

MATRIX = re.compile(r"(.*\.)?(\w*weight|proj)")
EMBEDDING = re.compile(r"embedding|pos_embed")
Terms = dict[str, Tensor]


@checked
@dataclass(frozen=True)
class AWP:
    """Adversarial weight perturbation (Wu et al., NeurIPS 2020, https://arxiv.org/abs/2004.05884).

    The gradient of a step is taken at the weights ``W_l + v_l``, where one step upwards of the method's loss has moved
    every matrix and convolution kernel ``W_l`` that is trained:

        v_l = gamma |W_l| g_l / |g_l|,    g_l = gradient of the loss at W, for the whole batch of all processes

    The attack runs once, at ``W``, and its images serve both passes. After the backward pass the weights are ``W``
    again, bit for bit, and the optimiser moves them. Norms, biases, embeddings and frozen weights are not moved; with
    LoRA, its factors are ``W_l``. A step costs a forward and a backward pass more.

    Departures: the authors' code moves the weights back after the optimiser's step, which decays them at ``W + v``; it
    climbs the loss of adversarial images alone, and here the whole loss is climbed. The accumulated batches of a step
    have a ``v`` each.

    Args:
        gamma: length of ``v_l`` relative to ``W_l``; 5e-3 is the paper's for CIFAR-10.
    """

    gamma: NonNegative = 5e-3


class WeightPerturbation:
    """Moves the weights of a method for one training pass, and moves them back.

    Args:
        awp: settings.
        method: method with a training attack.

    Raises:
        ValueError: the method has no attack, or steps its optimisers itself.
    """

    def __init__(self, awp: AWP, method: "RobustMethod") -> None:
        if method.attack is None or not method.automatic_optimization:
            raise ValueError(f"awp must be null for {type(method).__name__}, which does not train on attacked images")
        self.awp = awp
        self._saved: list[tuple[nn.Parameter, Tensor]] = []
        self._images: list[Tensor] = []  # attacked images of the first pass, in their order
        self._is_second = False

    def check(self, method: "RobustMethod") -> None:
        """Refuses a fit in which the weights cannot be moved.

        Raises:
            ValueError: nothing trained can be moved, the strategy shards the weights, or gradients are scaled in fp16.
        """
        if not matrices(method):
            raise ValueError(
                "awp must be null where no matrix or convolution is trained; norms and prompts do not move"
            )
        if not isinstance(method.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError("awp needs whole weights on every process; set trainer.strategy to auto or ddp")
        if (precision := method.trainer.precision).startswith("16"):
            raise ValueError(
                f"awp must be null in trainer.precision {precision}, which rounds gradients to 0; take bf16"
            )

    def attacked(self, attack: Callable[[], Tensor]) -> Tensor:
        """Runs an attack in the first pass, and returns its images in the second one.

        Args:
            attack: function that returns the attacked images.
        """
        if self._is_second:
            return self._images.pop(0)
        self._images.append(attack())
        return self._images[-1]

    def loss(self, method: "RobustMethod", loss: Callable[[], Terms]) -> Terms:
        """Moves the weights, and returns the terms of the loss there; `restore` follows the backward pass.

        Args:
            method: method with its trainer.
            loss: function that returns the terms, called twice.
        """
        self._images, buffers = [], [(buffer, buffer.clone()) for buffer in method.buffers()]
        chosen = matrices(method)
        total = torch.stack(list(loss().values())).sum()
        gradients = torch.autograd.grad(total, chosen, allow_unused=True)
        with torch.no_grad():
            for buffer, value in buffers:  # statistics of BatchNorm count a batch once
                buffer.copy_(value)
            moves = directions(chosen, mean_of_processes(method, chosen, gradients), self.awp.gamma)
            self._saved = [(weight, weight.detach().clone()) for weight in chosen]
            for weight, move in zip(chosen, moves, strict=True):
                weight.add_(move)
        self._is_second = True
        try:
            return loss()
        except BaseException:
            self.restore()
            raise
        finally:
            self._is_second = False

    def restore(self) -> None:
        """Gives the weights their values before `loss`."""
        with torch.no_grad():
            for weight, value in self._saved:
                weight.copy_(value)
        self._saved, self._images = [], []

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the weights at the end of the context, also after an error."""
        try:
            yield
        finally:
            self.restore()


def matrices(method: "RobustMethod") -> list[nn.Parameter]:
    """Lists the trained matrices and convolution kernels of a method, or the factors of LoRA."""
    trained = method.trained_names
    return [
        parameter
        for name, parameter in method.named_parameters()
        if name in trained
        and parameter.ndim >= 2
        and (is_factor(name) or (MATRIX.fullmatch(name) and not EMBEDDING.search(name)))
    ]


def directions(weights: Sequence[Tensor], gradients: Sequence[Tensor], gamma: float) -> list[Tensor]:
    """Computes ``gamma |W| g / |g|`` for every weight; 0 where the gradient is 0.

    Args:
        weights: ``W``, one per layer.
        gradients: ``g``, of the shapes of the weights.
        gamma: relative length.
    """
    return [
        gradient * torch.where((length := _norm(gradient)) > 0, gamma * _norm(weight) / length, 0).to(gradient)
        for weight, gradient in zip(weights, gradients, strict=True)
    ]


def _norm(tensor: Tensor) -> Tensor:
    """Computes the Frobenius norm in fp32 at least."""
    norm: Tensor = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).norm()
    return norm


def mean_of_processes(
    method: "RobustMethod", weights: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor]:
    """Averages gradients over all processes, so that all of them move the weights alike.

    Args:
        method: method with its trainer.
        weights: weights of the gradients.
        gradients: gradients of this process; None stands for 0.
    """
    own = [
        torch.zeros_like(weight) if gradient is None else gradient
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    if method.trainer.world_size == 1:
        return own
    joined: Any = method.trainer.strategy.reduce(torch.cat([part.flatten() for part in own]), reduce_op="mean")
    parts = joined.split([part.numel() for part in own])
    return [part.view_as(weight) for part, weight in zip(parts, own, strict=True)]
