"""Robustness of each sample: its worst case over a list of attacks and over all images that they try."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from robustclip.attacks.attack import Attack, Forward, Member, SkipsMisclassified
from robustclip.attacks.perturbation_set import distance
from robustclip.attacks.pixel_units import BOX_TOLERANCE
from robustclip.attacks.rows import replaced, selected
from robustclip.attacks.sample_losses import cross_entropy, predicted

ROBUST, WRONG = -1, -2  # values of `by` without a successful member: robust, and misclassified without attack
SIZES = 8  # number of batch sizes, so that compiled models and CUDA graphs have few shapes

StopRule = Literal["worst", "last"]


class Rung(NamedTuple):
    """The tested model in one precision, or in one way through a defence.

    Attributes:
        forward: function from images to logits ``(B, C)``.
        context: makes a context for the whole attack, for flags that its backward passes need too.
        is_fp32: whether it computes in fp32; the model that decides always does.
    """

    forward: Forward
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    is_fp32: bool = False


class Indexed(ABC):
    """Base class of models whose answers depend on the sample ids ``(B,)``, a second argument."""

    @abstractmethod
    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Computes logits ``(B, C)`` in fp32.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            index: ``(B,)`` sample ids; None where an attack has chosen samples itself.
        """


@dataclass
class Verdict:
    """Result of one attack, or of a list of them, for ``B`` samples.

    Attributes:
        by: ``(B,)`` number of the member that succeeded, `ROBUST`, or `WRONG` if the clean image is misclassified. For
            attacks with a target class, `WRONG` marks images of that class and images that are predicted as it.
        attacked: ``(B, 3, H, W)`` the misclassified image, else the first member's, or a later one's of a higher loss.
        prediction: ``(B,)`` class predicted for that image.
        loss: ``(B,)`` cross-entropy of that image.
        steps: ``(B,)`` number of gradients computed.
        dead: ``(B,)`` number of these that were zero in every pixel.
        nans: ``(B,)`` number of evaluations with a logit or a gradient that is not finite.
        excess: ``(B,)`` largest distance of any image from the perturbation set and the valid pixel range; images
            outside do not count as misclassified.
        exact: ``(B,)`` number of evaluations in fp32 on which the verdict rests: those of an attack in fp32, and those
            that confirmed a success.
    """

    by: Tensor
    attacked: Tensor
    prediction: Tensor
    loss: Tensor
    steps: Tensor
    dead: Tensor
    nans: Tensor
    excess: Tensor
    exact: Tensor

    @classmethod
    def before(cls, images: Tensor, labels: Tensor, logits: Tensor, aim: int | None = None) -> "Verdict":
        """Makes the verdict on clean images, before any attack.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            labels: ``(B,)``.
            logits: ``(B, C)`` of the images.
            aim: number of the class that the attack moves images to; None for any wrong class.
        """
        prediction, zeros = logits.argmax(-1), torch.zeros_like(labels)
        is_attacked = prediction == labels if aim is None else (labels != aim) & (prediction != aim)
        by = torch.where(is_attacked, ROBUST, WRONG)
        loss = cross_entropy(logits, labels)
        faults = _faults(logits).long()
        excess, exact = torch.zeros_like(loss), zeros.clone()
        return cls(by, images.clone(), prediction, loss, zeros, zeros.clone(), faults, excess, exact)

    def take(self, rows: Tensor) -> "Verdict":
        """Returns the verdict on the samples of the given rows."""
        return Verdict(*(tensor[rows] for tensor in vars(self).values()))

    def put(self, rows: Tensor, verdict: "Verdict") -> None:
        """Replaces the verdict on some of the samples.

        Args:
            rows: positions of the samples.
            verdict: verdict on these samples, in the same order.
        """
        for name, tensor in vars(self).items():
            tensor[rows] = getattr(verdict, name)


def examine(
    images: Tensor,
    labels: Tensor,
    forward: Forward,
    members: Sequence[Member],
    *,
    index: Tensor | None = None,
    seed: int = 0,
    stop: StopRule = "worst",
    cheaper: Sequence[Rung] = (),
    clean_logits: Tensor | None = None,
    check_every: int = 1,
) -> Verdict:
    """Attacks ``B`` samples with one member after another.

    With ``worst``, a sample counts as robust only if it is classified correctly without attack and on every valid image
    that any member evaluates. Misclassified samples are not attacked further. With ``last``, every member attacks every
    sample to the end, and only the images that they return count (the papers' protocol).

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: function from images to logits ``(B, C)`` in fp32, sample by sample; it decides every verdict.
        members: attacks, from cheap to expensive.
        index: ``(B,)`` sample ids, see `Attack`.
        seed: see `Attack`.
        stop: ``worst`` or ``last``.
        cheaper: the same model in lower precisions, from the lowest. Attacks use these first, `forward` confirms every
            success, and samples that are still correct are attacked again, in the end with `forward`.
        clean_logits: ``forward(images)`` if it is known.
        check_every: number of evaluations between two checks for misclassified samples; each waits for the device.
    """
    with torch.inference_mode(False):
        images, labels = images.detach().clone(), labels.detach().clone()
        index = None if index is None else index.detach().clone()
        with torch.no_grad():
            logits = outputs(forward, images, index) if clean_logits is None else clean_logits.detach().clone()
        verdict = Verdict.before(images, labels, logits.float(), members[0].attack.aim if members else None)
        passes = [*cheaper, Rung(forward)]
        options: Any = {"index": index, "seed": seed, "stop": stop, "check_every": check_every}
        for number, member in enumerate(members):
            # Samples that are robust in low precision are attacked again in fp32; `last` has only one pass.
            for rung in passes if stop == "worst" else passes[:1]:
                is_open = verdict.by == ROBUST if stop == "worst" or number else verdict.by <= ROBUST
                rows = is_open.nonzero()[:, 0]
                if not len(rows):
                    return verdict
                attack_rows(verdict, rows, images, labels, rung, forward, member.attack, number=number, **options)
        return verdict


def attack_rows(
    verdict: Verdict,
    rows: Tensor,
    images: Tensor,
    labels: Tensor,
    rung: Rung,
    forward: Forward,
    attack: Attack,
    *,
    number: int,
    index: Tensor | None,
    seed: int,
    stop: StopRule,
    check_every: int,
) -> None:
    """Attacks some samples of a batch, and updates their verdicts.

    Args:
        verdict: verdict on all ``B`` samples.
        rows: positions of the samples to attack.
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        rung: model that the attack receives.
        forward: model that decides; see `examine`.
        attack: attack to run.
        number: number of the member in the verdict.
        index: ``(B,)`` sample ids, see `Attack`.
        seed: see `Attack`.
        stop: ``worst`` counts every image that the attack evaluates, ``last`` only the one that it returns.
        check_every: see `examine`.
    """
    ids = None if index is None else index[rows]
    watch = _Watch(images[rows], labels[rows], verdict.take(rows), rung, forward, attack, ids)
    watch.number, watch.stop, watch.check_every, watch.capacity = number, stop, check_every, len(images)
    watch.run(ids, seed)
    verdict.put(rows, watch.verdict)


def outputs(forward: Forward, images: Tensor, index: Tensor | None) -> Tensor:
    """Computes logits ``(B, C)`` by a model that may need the sample ids.

    Args:
        forward: function from images to logits, or an `Indexed` model.
        images: ``(B, 3, H, W)`` in [0, 1].
        index: ``(B,)`` sample ids.
    """
    return forward(images, index) if isinstance(forward, Indexed) else forward(images)


class _AllMisclassified(Exception):  # noqa: N818  # a signal
    """Signals that no sample is left to attack."""


class _Watch(SkipsMisclassified):
    """The model that an attack receives: records misclassified samples, and computes only the other samples.

    The attack always gets outputs for all of its samples; those already misclassified get constant logits without
    gradient. Thus every attack stops early without code of its own.
    """

    number: int
    stop: StopRule
    check_every: int
    capacity: int

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        verdict: Verdict,
        rung: Rung,
        forward: Forward,
        attack: Attack,
        index: Tensor | None,
    ) -> None:
        self.images, self.labels, self.verdict = images, labels, verdict
        self.rung, self.forward, self.attack, self.index = rung, forward, attack, index
        self.is_exact = rung.forward is forward
        self.rows = torch.arange(len(images), device=images.device)
        self.calls = 0

    @property
    def _open(self) -> Tensor | slice:
        """Index of the rows still attacked; a slice while these are all, which costs no copies."""
        return slice(None) if len(self.rows) == len(self.images) else self.rows

    def run(self, index: Tensor | None, seed: int) -> None:
        """Runs the attack and completes the verdict with the images that it returns."""
        try:
            with self.rung.context():
                returned = self.attack(self.images, self, self.labels, index=index, seed=seed)
        except _AllMisclassified:
            return
        with torch.no_grad():
            seen = returned[self.rows]
            self._judge(seen, self._outputs(self.forward, seen, self.rows), is_final=True)

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) != len(self.images):  # the attack has selected samples itself
            self.verdict.exact += int(self.is_exact)
            return self.rung.forward(images)
        counts = self.stop == "worst" and self.attack.is_anytime
        if counts and self.calls and self.calls % self.check_every == 0:
            self.rows = (self.verdict.by == ROBUST).nonzero()[:, 0]
            if not len(self.rows):
                raise _AllMisclassified
        self.calls += 1
        number = len(self.rows)
        padded = selected(images, self.rows, self._padded(number))  # a copy, which the model may change
        if padded.requires_grad:
            padded.register_hook(partial(self._record_gradient, self._open, number))  # type: ignore[no-untyped-call]
        index = None if self.index is None else self._pad(self.index[self.rows])
        logits = outputs(self.rung.forward, padded, index)[:number].float()
        self.verdict.exact[self._open] += int(self.is_exact or self.rung.is_fp32)
        if padded.requires_grad and not logits.requires_grad:
            logits = logits + 0 * padded.sum()  # a model that does not depend on its pixels has zero gradients
        self.verdict.nans[self._open] += _faults(logits.detach())
        if counts:
            self._judge(padded[:number].detach(), logits.detach(), is_final=False)
        if number == len(images):
            return logits
        return logits.new_zeros(len(images), logits.shape[1]).index_copy(0, self.rows, logits)

    @torch.no_grad()
    def _judge(self, seen: Tensor, logits: Tensor, *, is_final: bool) -> None:
        """Updates the verdict with the predictions for one image per open sample."""
        rows, verdict = self._open, self.verdict
        excess = self._excess(seen, self.images[rows])
        if is_final or not self.attack.is_wide:
            verdict.excess[rows] = torch.maximum(verdict.excess[rows], excess)
        is_open = verdict.by[rows] <= ROBUST
        is_misclassified = is_open & self.attack.is_success(logits, self.labels[rows]) & (excess <= BOX_TOLERANCE)
        if not self.is_exact:
            if not is_final:  # `forward` has computed the final logits
                logits = logits.clone()
                is_misclassified = self._confirm(seen, is_misclassified, logits)
            verdict.exact[rows] += is_misclassified
        if not is_final and seen.device.type == "cpu" and not bool(is_misclassified.any()):
            return  # other devices would have to be waited for
        loss = cross_entropy(logits, self.labels[rows])
        is_first_or_worse = (loss > verdict.loss[rows]) | (self.number == 0)
        is_kept = is_misclassified | (is_open & is_first_or_worse if is_final else is_misclassified)
        number = torch.where(verdict.by[rows] == WRONG, WRONG, self.number)
        if self.stop == "last":  # an attack may also turn a misclassified sample into a correct one
            verdict.by[rows] = torch.where(is_open, ROBUST, verdict.by[rows])
        verdict.by[rows] = torch.where(is_misclassified, number, verdict.by[rows])
        classes = predicted(logits, self.labels[rows]) if self.attack.aim is None else logits.argmax(-1)
        verdict.prediction[rows] = torch.where(is_kept, classes, verdict.prediction[rows])
        verdict.loss[rows] = torch.where(is_kept, loss, verdict.loss[rows])
        verdict.attacked[rows] = replaced(verdict.attacked[rows], seen, is_kept)

    def _confirm(self, seen: Tensor, is_misclassified: Tensor, logits: Tensor) -> Tensor:
        """Evaluates misclassified samples again in fp32, and writes the new logits into the old ones."""
        suspects = is_misclassified.nonzero()[:, 0]
        if len(suspects):
            logits[suspects] = self._outputs(self.forward, seen[suspects], self.rows[suspects]).float()
        return is_misclassified & self.attack.is_success(logits, self.labels[self._open])

    def _excess(self, seen: Tensor, images: Tensor) -> Tensor:
        """Computes the distance ``(N,)`` of images ``(N, 3, H, W)`` from perturbation set and valid pixel range."""
        pixels = seen.flatten(1)
        outside = torch.maximum(-pixels.amin(1), pixels.amax(1) - 1).clamp(min=0)
        if self.attack.eps is None:
            return outside
        # The last digits of an L2 norm depend on the order of its terms.
        slack = 0.0 if self.attack.norm == "linf" else 1e-5 * self.attack.eps
        beyond = (distance(seen, images, self.attack.norm) - self.attack.eps - slack).clamp(min=0)
        return torch.maximum(outside, beyond)

    def _outputs(self, model: Forward, seen: Tensor, rows: Tensor) -> Tensor:
        """Computes the logits ``(N, C)`` of images ``(N, 3, H, W)`` of the given rows, in a padded batch."""
        index = None if self.index is None else self._pad(self.index[rows])
        return outputs(model, self._pad(seen), index)[: len(seen)]

    def _pad(self, seen: Tensor) -> Tensor:
        """Repeats the first sample, so that batches have one of `SIZES` sizes only."""
        missing = self._padded(len(seen)) - len(seen)
        return torch.cat([seen, seen[:1].expand(missing, *seen.shape[1:])]) if missing else seen

    def _padded(self, number: int) -> int:
        """Rounds a number of samples up to one of `SIZES` batch sizes."""
        size = math.ceil(self.capacity / SIZES)
        return number + -number % size

    def _record_gradient(self, rows: Tensor | slice, number: int, gradient: Tensor) -> None:
        largest = gradient[:number].detach().abs().flatten(1).amax(1)
        self.verdict.steps[rows] += 1
        self.verdict.dead[rows] += largest == 0
        self.verdict.nans[rows] += ~torch.isfinite(largest)


def _faults(logits: Tensor) -> Tensor:
    """Marks the rows ``(B,)`` of logits ``(B, C)`` that contain a number that is not finite."""
    return ~torch.isfinite(logits).all(-1)
