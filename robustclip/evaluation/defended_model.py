"""A method with a test-time defence, as attacks see it and as it is judged."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustclip.attacks.attack import Forward, gradient_of
from robustclip.defences import Defence
from robustclip.evaluation.engine import Indexed
from robustclip.methods import RobustMethod
from robustclip.overrides import check_shape

TIE = 1e-6  # by which the label's logit is lowered where another class is as probable


def defence_of(method: RobustMethod) -> Defence:
    """Returns the defence of a method.

    Raises:
        ValueError: the method has none.
    """
    if method.defence is None:
        raise ValueError(f"{type(method).__name__} has no test-time defence; set model.defence")
    return method.defence


class Way(Indexed):
    """A defended method as attacks see it: the value is the mean of its logits over draws, the gradient the way's.

    Args:
        method: method with a defence.
        task: name of the task.
        name: name of the way.
        draws: numbers of the draws.
    """

    def __init__(self, method: RobustMethod, task: str, name: str, draws: Sequence[int] | range) -> None:
        self.method, self.defence, self.task = method, defence_of(method), task
        self.name, self.draws = name, draws

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Computes the mean logits ``(B, C)`` over all draws."""
        if self.name == "own" and len(self.draws) == 1:
            return self._own(images, index, self.draws[0]).float()
        with torch.no_grad():
            answers = [self._own(images, index, draw).float() for draw in self.draws]
            value = answers[0] if len(answers) == 1 else torch.stack(answers).mean(0)
        if not images.requires_grad or self.name in ("replay", "black_box"):
            return value
        carriers = [partial(self._carrier, index=index, draw=draw) for draw in self._carrying_draws]
        return OneByOne.apply(images, value, carriers)  # type: ignore[no-any-return]

    @property
    def _carrying_draws(self) -> Sequence[int] | range:
        """Draws that the gradient depends on; that of the undefended model depends on none."""
        return self.draws[:1] if self.name == "bare" else self.draws

    def _carrier(self, images: Tensor, *, index: Tensor | None, draw: int) -> Tensor:
        """Computes the logits whose gradient the attack gets in one draw."""
        if self.name == "bare":
            return self.method.logits(images, self.task)
        answer = {"own": self._own, "identity": self._identity, "surrogate": self._surrogate}[self.name]
        return answer(images, index, draw)

    def _own(self, images: Tensor, index: Tensor | None, draw: int) -> Tensor:
        return self.method.answers(images, self.task, index=index, draw=draw)

    def _identity(self, images: Tensor, index: Tensor | None, draw: int) -> Tensor:
        purified = self.defence.purified(self.method, images, self.task, index=index, draw=draw)
        return self.method.logits(Carried.apply(purified, images), self.task)

    def _surrogate(self, images: Tensor, index: Tensor | None, draw: int) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # other kernels of attention have no second derivative
            logits = self.defence.surrogate(self.method, images, self.task, index=index, draw=draw)
        check_shape(self.defence, "surrogate", logits, (len(images), len(self.method.heads[self.task])), "(B, C)")
        return logits


class Carried(torch.autograd.Function):
    """Returns a value exactly and passes its gradient to a carrier, another tensor of the same shape."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        """Returns the value."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Passes the gradient to the carrier alone."""
        return None, gradient


class OneByOne(torch.autograd.Function):
    """Returns a value exactly, with the mean gradient of carriers that run one by one in the backward pass.

    So only one of them has its activations in memory, however many draws there are.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, value: Tensor, carriers: Sequence[Forward]) -> Tensor:
        """Returns the value."""
        ctx.save_for_backward(images)
        ctx.carriers = carriers
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Averages the gradients of all carriers for the images."""
        (images,) = ctx.saved_tensors
        total = torch.zeros_like(images)
        for carrier in ctx.carriers:
            total += _gradient(carrier, images, gradient)
        return total / len(ctx.carriers), None, None


def _gradient(carrier: Forward, images: Tensor, of_logits: Tensor) -> Tensor:
    """Passes a gradient of the logits ``(B, C)`` back to the images; zero where the logits have no graph."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        return gradient_of((carrier(images).float() * of_logits).sum(-1), images)


class Judge(Indexed):
    """Decides by the answer of a defence, or by the mean probabilities over the judging draws of a random one.

    Args:
        method: method with a defence.
        task: name of the task.
        count: number of judging draws of a random defence.
        labels: ``(B,)``, with which ties count as misclassified.
        index: ``(B,)`` sample ids of the labels.
    """

    def __init__(self, method: RobustMethod, task: str, count: int, *, labels: Tensor, index: Tensor) -> None:
        self.method, self.task = method, task
        self.draws = range(count if defence_of(method).is_random else 1)
        self.labels, self.index = labels, index

    @torch.no_grad()
    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Returns the answer, or the logarithm of the mean probabilities, ``(B, C)``."""
        logits = judged(self._answers(images, index))
        if len(self.draws) == 1 or index is None:
            return logits
        labels = self.labels[(index[:, None] == self.index[None]).int().argmax(1)][:, None]
        is_tied = (logits == logits.amax(-1, keepdim=True)).sum(-1, keepdim=True) > 1
        return logits.scatter(1, labels, logits.gather(1, labels) - TIE * is_tied)

    @torch.no_grad()
    def share(self, images: Tensor) -> Tensor:
        """Computes the share ``(B,)`` of the draws that classify the images of all samples correctly."""
        return self._answers(images, self.index).argmax(-1).eq(self.labels).float().mean(0)

    def _answers(self, images: Tensor, index: Tensor | None) -> Tensor:
        return answers_of(self.method, images, self.task, index=index, draws=self.draws)


def answers_of(
    method: RobustMethod, images: Tensor, task: str, *, index: Tensor | None, draws: Sequence[int] | range
) -> Tensor:
    """Computes the logits ``(J, B, C)`` of a method with or without a defence, in several draws if it is random.

    Args:
        method: method with its classifiers.
        images: ``(B, 3, H, W)`` in [0, 1].
        task: name of the task.
        index: ``(B,)`` sample ids.
        draws: numbers of the draws; methods that are not random answer once.
    """
    is_random = method.defence is not None and method.defence.is_random
    numbers = draws if is_random else draws[:1]
    return torch.stack([method.answers(images, task, index=index, draw=number) for number in numbers]).float()


def judged(answers: Tensor) -> Tensor:
    """Returns the only answer, or the logarithm ``(B, C)`` of the mean probabilities of answers ``(J, B, C)``."""
    return answers[0] if len(answers) == 1 else answers.log_softmax(-1).logsumexp(0) - math.log(len(answers))
