"""Scores that rate how much an image looks like one of a task's classes; higher means known.

Cosines are ``logits / scale`` with the model's scale (inverse temperature).
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Count, Positive, checked, class_at
from robustclip.types import Data, Task

NAME = re.compile(r"[a-z0-9_]+")


class Model(Protocol):
    """The part of a `RobustMethod` that a score may call.

    Attributes:
        clip: towers, whose ``logit_scale`` is the inverse temperature.
    """

    clip: Any

    def image_features(self, images: Tensor) -> Tensor:
        """Encodes images ``(B, 3, H, W)`` in [0, 1] as unit features ``(B, D)``."""

    def class_features(self, task: Task) -> Tensor:
        """Returns unit features ``(C, D)``, one row per class of the task."""

    def logits(self, images: Tensor, task: str) -> Tensor:
        """Computes the logits ``(B, C)`` of images ``(B, 3, H, W)`` in [0, 1] for a test task.

        Args:
            images: clean or attacked images.
            task: name of the test task.
        """

    def grid_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images ``(B, 3, H, W)`` in [0, 1] and their P positions as unit rows ``(B, D)`` and ``(B, P, D)``.

        Raises:
            ValueError: the model has no features of positions.
        """

    def grid_logits(self, images: Tensor, task: str) -> Tensor:
        """Computes the logits ``(B, 1 + P, C)`` of images ``(B, 3, H, W)`` in [0, 1] and of their P positions.

        Args:
            images: clean or attacked images.
            task: name of the test task.

        Raises:
            ValueError: the model has no features of positions.
        """


class Score(ABC):
    """Rates how much an image looks like one of a task's classes; a subclass sets `name` and defines `value`.

    - ``name``: key in the result, of a-z, 0-9 and ``_``.
    - ``value(outputs, scale)``: outputs of `forward` in fp64 to ``(B,)``, higher for known classes.
    - ``evidence(outputs, scale)``: increases with the value, and an attack moves it; default the value.
    - ``forward(model, images, task)``: what an attack differentiates; default the logits of the task of that name.
    - ``setup(data, tasks)``: runs when a test is set up, forgets earlier tests, and refuses data that do not fit.
    - ``prepare(model, task)``: runs once per known task before its images, without gradients.
    - ``settings``: go into the result; default the public attributes of the object, so tensors belong in private ones.
    - ``further_names(task)``: names beside the classes that the score compares with; they go into the result's folder.
    - ``variants``: names of further columns that ``columns`` adds, such as the score with other parameters.
    """

    name: str = ""
    reads_positions: bool = False  # whether `forward` calls `grid_logits`, whose pass gives the image's features too

    @abstractmethod
    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Computes the score ``(B,)`` as its paper reports it.

        Args:
            outputs: outputs of `forward`, by default logits ``(B, C)``.
            scale: inverse temperature of the model's logits, a scalar.
        """

    def evidence(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Computes a function ``(B,)`` that rises with the value and keeps a gradient where a softmax is one-hot.

        Args:
            outputs: see `value`.
            scale: see `value`.
        """
        return self.value(outputs, scale)

    def forward(self, model: Model, images: Tensor, task: str) -> Tensor:
        """Computes the outputs that `value` takes, from images ``(B, 3, H, W)`` in [0, 1].

        Args:
            model: tested model.
            images: clean or attacked images.
            task: name of the known task.
        """
        return model.logits(images, task)

    def setup(self, data: Data, tasks: Sequence[Task]) -> None:  # noqa: B027
        """Forgets what earlier tests have prepared, and checks the data of a new one.

        Args:
            data: data module, set up.
            tasks: known tasks.
        """

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

    def further_names(self, task: str) -> Sequence[str]:
        """Returns the names, beside the classes of a prepared task, that the score compares images with."""
        return ()

    @property
    def variants(self) -> Sequence[str]:
        """Names of further columns ``<name>/<variant>``; after `prepare`, of those that are measured."""
        return ()

    def columns(self, outputs: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Computes the value, and the variants if there are any, ``(B,)`` by the names of their columns.

        Args:
            outputs: see `value`.
            scale: see `value`.
        """
        return {self.name: self.value(outputs, scale)}


class MCM(Score):
    """Highest softmax probability of the cosines, https://arxiv.org/abs/2211.13445; UEO's score."""

    name = "mcm"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the maximum concept matching at temperature 1."""
        return confidence(outputs / scale)

    def evidence(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the log-odds of the highest probability."""
        return log_odds(outputs / scale)


class MSP(Score):
    """Highest softmax probability of the logits, https://arxiv.org/abs/1610.02136."""

    name = "msp"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the maximum softmax probability."""
        return confidence(outputs)

    def evidence(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the log-odds of the highest probability."""
        return log_odds(outputs)


class MaxLogit(Score):
    """Highest logit, https://arxiv.org/abs/1911.11132."""

    name = "max_logit"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the highest logit, ``max_c z_c``."""
        return outputs.amax(-1)


class Energy(Score):
    """Negative free energy, https://arxiv.org/abs/2010.03759; CRoFT's score."""

    name = "energy"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the negative free energy, ``log sum_c exp z_c``."""
        return outputs.logsumexp(-1)


class Entropy(Score):
    """Negative entropy of the softmax."""

    name = "entropy"

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the negative entropy, ``sum_c p_c log p_c`` in [-log C, 0], ``p = softmax(z)``."""
        log_p = F.log_softmax(outputs, dim=-1)
        return (log_p.exp() * log_p).sum(-1)


class LogitGap(Score):
    """Highest cosine less the mean of the next ones, https://arxiv.org/abs/2510.20134.

    Args:
        n: number of the highest cosines, with the first; null for the paper's shares, a fifth of 50 or more classes and
            half of fewer, but at least 2.
    """

    name = "logit_gap"

    def __init__(self, n: int | None = None) -> None:
        if n is not None and n < 2:
            raise ValueError(f"n of logit_gap must be at least 2, got {n}")
        self.n = n

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the gap of the highest cosine, ``s_(1) - mean(s_(2), ..., s_(n))``."""
        classes = outputs.shape[-1]
        n = self.n or max(2, round((0.2 if classes >= 50 else 0.5) * classes))
        if n > classes:
            raise ValueError(f"n of logit_gap must be at most the {classes} classes, got {n}")
        highest = (outputs / scale).topk(n).values
        return highest[..., 0] - highest[..., 1:].mean(-1)


class GEN(Score):
    """Generalised entropy of the highest probabilities, GEN (Liu et al., CVPR 2023).

    Args:
        gamma: exponent, the authors' 0.1; at 1 the score is minus the Gini impurity of these probabilities.
        m: number of the highest probabilities, the authors' 100; all if there are fewer classes.
    """

    name = "gen"

    def __init__(self, gamma: float = 0.1, m: int = 100) -> None:
        if not gamma > 0 or m < 1:
            raise ValueError(f"gamma of gen must be above 0 and m at least 1, got {gamma:g} and {m}")
        self.gamma, self.m = gamma, m

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns ``-sum_k (p_(k) (1 - p_(k)))^gamma`` over the ``m`` highest probabilities, ``p = softmax(z)``."""
        highest = outputs.topk(min(self.m, outputs.shape[-1])).values
        log_p = highest - outputs.logsumexp(-1, keepdim=True)
        # The highest probability may be 1 in floating point; the others are at most a half.
        log_rest = torch.cat([F.logsigmoid(-log_odds(outputs))[..., None], torch.log1p(-log_p[..., 1:].exp())], -1)
        return -(self.gamma * (log_p + log_rest)).exp().sum(-1)


Removal = Literal["together", "each"]
"""Way of setting several cosines to a low value: all at once, or one by one."""


@checked
class DeltaEnergy(Score):
    """Rise of the energy when the highest cosines are set to a low value, https://arxiv.org/abs/2510.11296.

    ``E1 - E0`` with ``E0 = -log sum_k exp(s_k / tau)`` and ``E1`` the same with ``count`` cosines set to ``low``. With
    one of them and no low value it is ``-log(1 - p)`` of the highest softmax probability ``p`` at the same temperature:
    it only rescales `MSP`, with its ranking, AUROC and FPR95, or `MCM` at temperature 1. So does the default at scale
    100, where ``exp(0)`` is nothing beside the other terms. At lower scales, and with two cosines and more, the scores
    are others. The paper's text could not be had, so all parameters are this project's choice, and ``has_grid``
    measures the sensible ones.

    Args:
        count: number of the highest cosines that are set to the low value.
        crop: set them ``together``, or ``each`` alone, averaging the energies.
        low: the low value; null removes the cosines. Towers with negative cosines, such as SigLIP, need null.
        temperature: ``tau``; null for the model's own, 0.01 for OpenAI's models.
        has_grid: report AUROC and FPR95 also for 1, 2 and 5 cosines, both ways and temperatures 1 and the model's own.
    """

    name = "delta_energy"

    def __init__(
        self,
        count: Count = 1,
        crop: Removal = "together",
        low: float | None = 0.0,
        temperature: Positive | None = None,
        has_grid: bool = False,
    ) -> None:
        if low is not None and not low < 1:
            raise ValueError(f"low of delta_energy must be a cosine below 1 or null, got {low:g}")
        self.count, self.crop, self.low, self.temperature, self.has_grid = count, crop, low, temperature, has_grid
        self._classes = 0

    def setup(self, data: Data, tasks: Sequence[Task]) -> None:
        """Notes the smallest number of classes, which bounds the grid."""
        self._classes = min((len(task.label_names) for task in tasks), default=0)

    @property
    def grid(self) -> dict[str, "DeltaEnergy"]:
        """Scores with other parameters, by the names of the variants."""
        crops: list[tuple[int, Removal]] = [(1, "together"), (2, "together"), (2, "each"), (5, "together"), (5, "each")]
        return {
            f"{count}_{crop}_{'own' if tau is None else f'{tau:g}'}": DeltaEnergy(count, crop, self.low, tau)
            for count, crop in crops
            for tau in (None, 1.0)
            if self.has_grid and count < self._classes
        }

    @property
    def variants(self) -> list[str]:
        """Returns the names of the grid, with count, crop and temperature."""
        return list(self.grid)

    def columns(self, outputs: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Computes the score and its grid."""
        grid = {f"{self.name}/{name}": score.value(outputs, scale) for name, score in self.grid.items()}
        return super().columns(outputs, scale) | grid

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the rise of the energy; above 0 where the highest cosines are above the low value."""
        classes, least = outputs.shape[-1], self.count + (self.low is None)
        if classes < least:
            raise ValueError(f"count of delta_energy must leave classes: it is {self.count} for {classes} of them")
        # Cosines over the temperature; multiplying by 1 where both scales agree keeps the logits exact.
        ordered = (outputs * (1 if self.temperature is None else 1 / (scale * self.temperature))).sort(-1, True).values
        low = (
            -torch.inf if self.low is None else self.low * (scale if self.temperature is None else 1 / self.temperature)
        )
        places = torch.arange(classes, device=outputs.device)
        if self.crop == "together":
            cropped = ordered.masked_fill(places < self.count, float(low))
            return ordered.logsumexp(-1) - cropped.logsumexp(-1)
        energies = [ordered.masked_fill(places == place, float(low)).logsumexp(-1) for place in range(self.count)]
        return ordered.logsumexp(-1) - torch.stack(energies).mean(0)


SCORES: dict[str, Score] = {
    score.name: score for score in (MCM(), MSP(), MaxLogit(), Energy(), Entropy(), LogitGap(), GEN(), DeltaEnergy())
}


def score_of(score: str | Score, further: Mapping[str, type[Score]] | None = None) -> Score:
    """Finds a score by its name or by the path of its class, and checks the name of an own score.

    Args:
        score: name, class path or object, such as ``mcm``, ``my_module.MyScore`` or ``MyScore(width=3)``.
        further: classes by further names.

    Raises:
        ValueError: there is no such score, or its name is taken or not valid.
    """
    classes = {name: type(ours) for name, ours in SCORES.items()} | dict(further or {})
    if isinstance(score, str):
        if score in classes:
            return SCORES[score] if score in SCORES else classes[score]()
        if "." not in score:
            ours = ", ".join(classes)
            raise ValueError(f"scores: there is no score {score!r}; ours are {ours}, and yours is written module.Class")
        own: Score = class_at(score, Score, "scores")()
        return score_of(own, further)
    is_taken = classes.get(score.name, type(score)) is not type(score)
    if is_taken or not NAME.fullmatch(score.name):
        reason = "is the name of one of ours" if is_taken else "must consist of a-z, 0-9 and _"
        raise ValueError(f"scores: {type(score).__name__}.name {reason}, got {score.name!r}")
    return score


def confidence(logits: Tensor) -> Tensor:
    """Returns the highest softmax probability ``(B, ...)`` of logits ``(B, ..., C)``."""
    return logits.softmax(-1).amax(-1)


def log_odds(logits: Tensor) -> Tensor:
    """Returns the log-odds ``(B,)`` of the highest softmax probability of logits; their sigmoid is `confidence`.

    ``u = z_(1) - log sum_{c != (1)} exp z_c``, so ``exp z_(1) / sum_c exp z_c = 1 / (1 + exp(-u))``. Infinite for a
    single class.
    """
    highest = logits.max(-1, keepdim=True)
    others = logits.scatter(-1, highest.indices, -torch.inf)
    return highest.values[..., 0] - others.logsumexp(-1)
