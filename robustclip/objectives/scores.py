"""How much an image looks like one of the known classes: logits to a score ``(B,)``, higher for the known.

Cosines are ``logits / scale`` with the model's scale (inverse temperature).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ScoreName = Literal["mcm", "msp", "max_logit", "energy", "entropy", "knn"]
KNN: Literal["knn"] = "knn"  # of features and a bank of others, not of logits

Of = Callable[[Tensor, Tensor], Tensor]
"""Logits ``(B, C)`` and scale, a scalar, to ``(B,)``."""


class Score(NamedTuple):
    """A score and what an attack on it pushes.

    Attributes:
        value: as the papers report it.
        evidence: an increasing function of the value whose gradient does not vanish where a softmax is one-hot.
    """

    value: Of
    evidence: Of


def confidence(logits: Tensor) -> Tensor:
    """The highest softmax probability of logits ``(B, C)``, ``(B,)``."""
    return logits.softmax(-1).amax(-1)


def log_odds(logits: Tensor) -> Tensor:
    """``z_(1) - log sum_{c != (1)} exp z_c``: `confidence` is the sigmoid of it, and hence increases with it.

    ``p = exp z_(1) / sum_c exp z_c = 1 / (1 + exp(-u))`` with ``u`` the log-odds; infinite where there is one class.
    """
    highest = logits.max(-1, keepdim=True)
    others = logits.scatter(-1, highest.indices, -torch.inf)
    return highest.values[..., 0] - others.logsumexp(-1)


def negative_entropy(logits: Tensor) -> Tensor:
    """``sum_c p_c log p_c``, ``p = softmax(logits)``, in [-log C, 0]."""
    log_p = F.log_softmax(logits, dim=-1)
    return (log_p.exp() * log_p).sum(-1)


def plain(value: Of) -> Score:
    """An attack pushes the value itself."""
    return Score(value, value)


SCORES: dict[ScoreName, Score] = {
    # Maximum concept matching at temperature 1, https://arxiv.org/abs/2211.13445; UEO's score
    "mcm": Score(lambda z, scale: confidence(z / scale), lambda z, scale: log_odds(z / scale)),
    # Hendrycks & Gimpel, https://arxiv.org/abs/1610.02136
    "msp": Score(lambda z, scale: confidence(z), lambda z, scale: log_odds(z)),
    "max_logit": plain(lambda z, scale: z.amax(-1)),  # https://arxiv.org/abs/1911.11132
    "energy": plain(lambda z, scale: z.logsumexp(-1)),  # https://arxiv.org/abs/2010.03759, negated; CRoFT's score
    "entropy": plain(lambda z, scale: negative_entropy(z)),
}
