"""Scores that compare the classes of a task with further names, which are mined from lists of words."""

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Count, CountOrZero, Positive, PositiveShare, Share, checked
from robustclip.objectives.scores import Model, Score
from robustclip.objectives.word_lists import mined, normalised, read_words
from robustclip.types import Data, Task

NAMES_PER_CALL = 1024  # bounds the memory of a text side that encodes all names of a task at once


class _Head(NamedTuple):
    """Features ``(C + G M, D)`` of a task's classes and of G groups of names, the numbers of both."""

    weights: Tensor
    classes: int
    groups: int


@checked
class NegLabel(Score):
    """NegLabel (Jiang et al., ICLR 2024, https://arxiv.org/abs/2403.20078): classes against far names.

    Let ``P`` be the logits of the task's class names and ``Q_g`` those of a group of negative names. The score is the
    mean over G groups of the classes' share of a softmax, ``sigma(lse(P) - lse(Q_g))``; its log-odds are what an attack
    moves. Negatives are the words whose cosines with nearly all classes are low, see `mined`; names of classes are
    never taken. All names are encoded as `RobustMethod.class_features` encodes classes.

    A list of words that contains the names of the unknown classes helps the score, so a result states how many of
    these are among the negatives. The folder of a result has the negatives of every task.

    Departures from the authors' code: words are sorted, so that no order of files matters; the groups are drawn by a
    generator of their own, before the remainder is cut; and one group gives the share too, not a sum of logits.

    Args:
        nouns: files with one noun a line, or WordNet's ``data.noun``.
        adjectives: files with one adjective a line, or WordNet's ``data.adj``; a noun among them is a noun alone.
        dropped: files with one word a line that a filter such as NegRefine's has rejected, left out after the mining.
        left_out: lexicographer files of WordNet that are left out; null for those that the authors' lists lack.
        quantile: quantile of a word's cosines with the classes by which words are mined.
        share: share of the nouns, and of the adjectives, that are negatives.
        groups: number of groups; a remainder of the negatives is not used.
        temperature: temperature of the softmax; null for the model's own, 0.01 for OpenAI's models.
        seed: seed of the groups, and of the words that `CSP` appends.

    Raises:
        ValueError: no words, a file that cannot be read, a number out of range; in a test, no negative is left.
    """

    name = "neg_label"
    noun_templates: tuple[str, ...] = ("the nice {}",)
    adjective_templates: tuple[str, ...] = ("This is a {} photo",)
    absent: tuple[str, ...] = ("noun.animal", "noun.food")  # lexicographer files that the authors' lists lack
    limit: float | None = None  # cosine with a class above which a word is never taken

    def __init__(
        self,
        nouns: Sequence[str] = (),
        adjectives: Sequence[str] = (),
        dropped: Sequence[str] = (),
        left_out: Sequence[str] | None = None,
        quantile: Share = 0.95,
        share: PositiveShare = 0.15,
        groups: Count = 100,
        temperature: Positive | None = None,
        seed: CountOrZero = 0,
    ) -> None:
        if not nouns and not adjectives:
            raise ValueError(f"nouns of {self.name} must list a file of words, got none; set nouns or adjectives")
        absent = self.absent if left_out is None else left_out
        self._nouns = read_words(nouns, f"nouns of {self.name}", absent)
        known = {*self._nouns}
        self._adjectives = [
            word for word in read_words(adjectives, f"adjectives of {self.name}", absent) if word not in known
        ]
        self._dropped = {normalised(word) for word in read_words(dropped, f"dropped of {self.name}")}
        self.quantile, self.share, self.groups, self.temperature, self.seed = quantile, share, groups, temperature, seed
        self._candidates: list[Tensor] = []
        self._heads: dict[str, _Head] = {}
        self._negatives: dict[str, list[str]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the parameters, and numbers and digests of the words."""
        return {
            **super().settings,
            "words": {"nouns": _identity(self._nouns), "adjectives": _identity(self._adjectives)},
            "dropped": _identity(sorted(self._dropped)),
        }

    def setup(self, data: Data, tasks: Sequence[Task]) -> None:
        """Forgets the negatives of earlier tests."""
        self._candidates, self._heads, self._negatives = [], {}, {}

    def prepare(self, model: Model, task: Task) -> None:
        """Mines the negatives of a task, and encodes them and the class names.

        Raises:
            ValueError: no word is left.
        """
        kinds = [(self._nouns, self.noun_templates), (self.phrases(self._adjectives), self.adjective_templates)]
        if not self._candidates:
            self._candidates = [_encoded(model, task.name, names, templates) for names, templates in kinds]
        classes = _encoded(model, task.name, task.class_names, self.noun_templates)
        names, rows = [], []
        for words, (phrases, _), features in zip((self._nouns, self._adjectives), kinds, self._candidates, strict=True):
            places = self._mined(words, features, classes, task) if words else []
            names += [phrases[place] for place in places]
            rows.append(features[places])
        if not names:
            raise ValueError(
                f"{self.name} has no negative for {task.name}: share {self.share:g} keeps no word; give more"
            )
        groups = min(self.groups, len(names))
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.seed))
        negatives = torch.cat([part.to(classes) for part in rows if len(part)])
        used = order[: len(names) // groups * groups].to(classes.device)
        weights = torch.cat([classes, negatives[used]])
        self._heads[task.name], self._negatives[task.name] = _Head(weights, len(classes), groups), names

    def _mined(self, words: Sequence[str], features: Tensor, classes: Tensor, task: Task) -> list[int]:
        """Returns the positions of the negatives among the words of a kind, the farthest from the classes first."""
        places, _ = mined(features @ classes.T, self.quantile, self.share, limit=self.limit)
        refused = self._dropped | {normalised(name) for name in task.class_names}
        return [place for place in places if normalised(words[place]) not in refused]

    def phrases(self, adjectives: Sequence[str]) -> list[str]:
        """Returns the phrases that replace the adjectives in templates."""
        return list(adjectives)

    def further_names(self, task: str) -> Sequence[str]:
        """Returns the negatives of a task, nouns first, the farthest first."""
        return self._negatives[task]

    def forward(self, model: Model, images: Tensor, task: str) -> Tensor:
        """Computes the log-odds ``(B, G)`` of the classes against each group of negatives."""
        head = self._heads[task]
        scale = model.clip.logit_scale if self.temperature is None else 1 / self.temperature
        logits = scale * model.image_features(images) @ head.weights.T
        return group_odds(logits[:, : head.classes], logits[:, head.classes :].unflatten(1, (head.groups, -1)))

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the mean share of the classes, in [0, 1].

        Args:
            outputs: log-odds ``(B, G)``.
            scale: not used.
        """
        return outputs.sigmoid().mean(-1)

    def evidence(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Returns the log-odds of the mean share.

        Args:
            outputs: log-odds ``(B, G)``.
            scale: not used.
        """
        return F.logsigmoid(outputs).logsumexp(-1) - F.logsigmoid(-outputs).logsumexp(-1)


class CSP(NegLabel):
    """CSP (Chen et al., NeurIPS 2024, https://arxiv.org/abs/2410.08611): NegLabel with other names.

    Adjectives are combined with a word for many things, such as "scene", which is drawn for each; words with a cosine
    above 0.95 with a class are never taken; and names have several templates. In the authors' code a name's feature is
    the mean of features that are not of unit length; here they are, as for classes.

    By default WordNet's persons, quantities, groups and pertainyms are left out too. With ``quantile`` 1 and the words
    that a language model has rejected in ``dropped``, this is the first term of NegRefine (Ansari et al., ICCV 2025,
    https://arxiv.org/abs/2507.09795).
    """

    name = "csp"
    noun_templates = (
        *("a close-up photo of the nice {}.", "a photo with the nice {}.", "a good photo with the nice {}."),
        *("a photo of the nice {}.", "{}", "the {}", "the good {}", "the nice {}"),
    )
    adjective_templates = ("{}", "a nice photo of {}", "a good photo of {}", "a close-up photo of {}")
    absent = (*NegLabel.absent, "noun.person", "noun.quantity", "noun.group", "adj.pert")
    limit = 0.95
    superclasses = (
        *("environment", "space", "object", "scene", "place", "item", "area", "view", "thing", "pattern"),
        *("structure", "landscape", "vista", "creature"),
    )

    def phrases(self, adjectives: Sequence[str]) -> list[str]:
        """Returns each adjective with a drawn word, which depends on the adjective and the seed alone."""
        return [f"{word} {Random(f'{self.seed} {word}').choice(self.superclasses)}" for word in adjectives]


def group_odds(positives: Tensor, negatives: Tensor) -> Tensor:
    """Computes the log-odds ``lse(P) - lse(Q_g)``, ``(B, G)``, of the classes against every group of names, in fp64.

    Args:
        positives: logits ``P``, ``(B, C)``, of the classes.
        negatives: logits ``Q``, ``(B, G, M)``, of G groups of M names.
    """
    return positives.double().logsumexp(-1, keepdim=True) - negatives.double().logsumexp(-1)


def _encoded(model: Model, task: str, names: Sequence[str], templates: tuple[str, ...]) -> Tensor:
    """Encodes names as unit features ``(N, D)``; without names they are ``(0, 1)``."""
    pieces = [tuple(names[start : start + NAMES_PER_CALL]) for start in range(0, len(names), NAMES_PER_CALL)]
    features = [model.class_features(Task(task, piece, templates)) for piece in pieces]
    return torch.cat(features) if features else torch.empty(0, 1)


def _identity(words: Sequence[str]) -> dict[str, Any]:
    """Returns number and digest of a list of words."""
    return {"count": len(words), "digest": hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]}
