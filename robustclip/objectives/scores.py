"""Scores that rate how much an image looks like one of a task's classes; higher means known.

Cosines are ``logits / scale`` with the model's scale (inverse temperature).
"""

import json
import re
from abc import ABC, abstractmethod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import class_at
from robustclip.types import Task

KNN: Literal["knn"] = "knn"  # score from the features of a bank, see evaluation/nearest_neighbours.py
NAME = re.compile(r"[a-z0-9_]+")


class Model(Protocol):
    """The part of a `RobustMethod` that a score may call."""

    def image_features(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1] to unit features ``(B, D)``."""

    def class_features(self, task: Task) -> Tensor:
        """Unit features ``(C, D)``, one row per class of the task."""

    def logits(self, images: Tensor, task: str) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1] to logits ``(B, C)`` of a test task.

        Args:
            images: clean or attacked images.
            task: name of the test task.
        """


class Score(ABC):
    """Rates how much an image looks like one of a task's classes; a subclass sets `name` and defines `value`.

    - ``name``: key in the result, of a-z, 0-9 and ``_``.
    - ``value(outputs, scale)``: outputs of `forward` in fp64 to ``(B,)``, higher for known classes.
    - ``evidence(outputs, scale)``: increases with the value, and an attack moves it; default the value.
    - ``forward(model, images, task)``: what an attack differentiates; default the logits of the task of that name.
    - ``prepare(model, task)``: runs once per known task before its images, without gradients.
    - ``settings``: go into the result; default the public attributes of the object, so tensors belong in private ones.
    """

    name: str = ""

    @abstractmethod
    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """The score ``(B,)`` as its paper reports it.

        Args:
            outputs: outputs of `forward`, by default logits ``(B, C)``.
            scale: inverse temperature of the model's logits, a scalar.
        """

    def evidence(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """An increasing function ``(B,)`` of the value whose gradient does not vanish where a softmax is one-hot.

        Args:
            outputs: see `value`.
            scale: see `value`.
        """
        return self.value(outputs, scale)

    def forward(self, model: Model, images: Tensor, task: str) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1] to the outputs that `value` takes.

        Args:
            model: tested model.
            images: clean or attacked images.
            task: name of the known task.
        """
        return model.logits(images, task)

    def prepare(self, model: Model, task: Task) -> None:  # noqa: B027  # most scores need nothing
        """Computes what `forward` needs for a known task, which it may keep under the task's name.

        Args:
            model: tested model.
            task: known task with its classes and templates.
        """

    @property
    def settings(self) -> dict[str, Any]:
        """Parameters of the score in JSON types."""
        public = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        settings: dict[str, Any] = json.loads(json.dumps(public, default=repr))
        return settings


class MCM(Score):
    """Highest softmax probability of the cosines, https://arxiv.org/abs/2211.13445; UEO's score."""

    name = "mcm"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Maximum concept matching at temperature 1."""
        return confidence(outputs / scale)

    def evidence(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Log-odds of the highest probability."""
        return log_odds(outputs / scale)


class MSP(Score):
    """Highest softmax probability of the logits, https://arxiv.org/abs/1610.02136."""

    name = "msp"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Maximum softmax probability."""
        return confidence(outputs)

    def evidence(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Log-odds of the highest probability."""
        return log_odds(outputs)


class MaxLogit(Score):
    """Highest logit, https://arxiv.org/abs/1911.11132."""

    name = "max_logit"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Highest logit, ``max_c z_c``."""
        return outputs.amax(-1)


class Energy(Score):
    """Negative free energy, https://arxiv.org/abs/2010.03759; CRoFT's score."""

    name = "energy"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Negative free energy, ``log sum_c exp z_c``."""
        return outputs.logsumexp(-1)


class Entropy(Score):
    """Negative entropy of the softmax."""

    name = "entropy"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Negative entropy, ``sum_c p_c log p_c`` in [-log C, 0], ``p = softmax(z)``."""
        log_p = F.log_softmax(outputs, dim=-1)
        return (log_p.exp() * log_p).sum(-1)


SCORES: dict[str, Score] = {score.name: score for score in (MCM(), MSP(), MaxLogit(), Energy(), Entropy())}


def score_of(score: str | Score) -> Score:
    """Finds a score by its name or by the path of its class, and checks the name of an own score.

    Args:
        score: name, class path or object, such as ``mcm``, ``my_module.MyScore`` or ``MyScore(width=3)``.

    Raises:
        ValueError: there is no such score, or its name is taken or not valid.
    """
    if isinstance(score, str):
        if score in SCORES:
            return SCORES[score]
        if "." not in score:
            ours = ", ".join((*SCORES, KNN))
            raise ValueError(f"scores: there is no score {score!r}; ours are {ours}, and yours is written module.Class")
        own: Score = class_at(score, Score, "scores")()
        return score_of(own)
    is_taken = score.name == KNN or (score.name in SCORES and SCORES[score.name] is not score)
    if is_taken or not NAME.fullmatch(score.name):
        reason = "is the name of one of ours" if is_taken else "must consist of a-z, 0-9 and _"
        raise ValueError(f"scores: {type(score).__name__}.name {reason}, got {score.name!r}")
    return score


def confidence(logits: Tensor) -> Tensor:
    """Highest softmax probability ``(B,)`` of logits ``(B, C)``."""
    return logits.softmax(-1).amax(-1)


def log_odds(logits: Tensor) -> Tensor:
    """Log-odds ``(B,)`` of the highest softmax probability of logits ``(B, C)``; their sigmoid is `confidence`.

    ``u = z_(1) - log sum_{c != (1)} exp z_c``, so ``exp z_(1) / sum_c exp z_c = 1 / (1 + exp(-u))``. Infinite for a
    single class.
    """
    highest = logits.max(-1, keepdim=True)
    others = logits.scatter(-1, highest.indices, -torch.inf)
    return highest.values[..., 0] - others.logsumexp(-1)
