"""Who survives: the point-wise worst case over a list of attacks, sample by sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from robustclip.attacks.attack import BOX_TOLERANCE, Attack, Forward, Member, SkipsMisclassified
from robustclip.attacks.perturbation_set import distance
from robustclip.attacks.sample_losses import cross_entropy

ROBUST, WRONG = -1, -2  # in place of a member's number
SIZES = 8  # number of batch sizes that the model sees, so that compiled models and CUDA graphs see few shapes

StopRule = Literal["worst", "last"]


@dataclass
class Verdict:
    """What became of ``B`` samples under one attack or a list of them.

    Attributes:
        by: ``(B,)`` number of the member that broke the sample, `ROBUST`, or `WRONG` if it needed none.
        attacked: ``(B, 3, H, W)`` the image that broke it, else the first member's, or a later one's of a higher loss.
        prediction: ``(B,)`` class predicted for that image.
        loss: ``(B,)`` its cross-entropy.
        steps: ``(B,)`` gradients taken.
        dead: ``(B,)`` of these, gradients that were zero in every pixel.
        nans: ``(B,)`` evaluations with a logit or a gradient that is not finite.
        excess: ``(B,)`` by how much any image left ball or box; such images break nothing.
    """

    by: Tensor
    attacked: Tensor
    prediction: Tensor
    loss: Tensor
    steps: Tensor
    dead: Tensor
    nans: Tensor
    excess: Tensor

    @classmethod
    def before(cls, images: Tensor, labels: Tensor, logits: Tensor) -> "Verdict":
        """The verdict on clean images alone."""
        prediction, zeros = logits.argmax(-1), torch.zeros_like(labels)
        by = torch.where(prediction == labels, ROBUST, WRONG)
        loss = cross_entropy(logits, labels)
        faults = _faults(logits).long()
        return cls(by, images.clone(), prediction, loss, zeros, zeros.clone(), faults, torch.zeros_like(loss))

    def take(self, rows: Tensor) -> "Verdict":
        """The verdict on some of the samples."""
        return Verdict(*(tensor[rows] for tensor in vars(self).values()))

    def put(self, rows: Tensor, verdict: "Verdict") -> None:
        """Replaces the verdict on some of the samples."""
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
    cheap_forward: Forward | None = None,
    clean_logits: Tensor | None = None,
    check_every: int = 1,
) -> Verdict:
    """Attacks ``B`` samples with one member after another.

    With ``worst`` a sample is robust only if it is right clean and in every legal image that any member evaluates; what
    is broken is not computed any more. With ``last`` every sample is attacked to the end by every member, and only the
    images that they return count (the papers' protocol).

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: images to logits ``(B, C)`` in fp32, sample by sample; gives every verdict.
        members: the attacks, cheap ones first.
        index: ``(B,)`` sample ids, see `Attack`.
        seed: see `Attack`.
        stop: ``worst`` or ``last``.
        cheap_forward: the same model in lower precision. Attacks then run on it first, `forward` confirms what they
            break, and what survives is attacked again on `forward`.
        clean_logits: ``forward(images)`` if it is known.
        check_every: number of evaluations between two looks at what is broken; each look waits for the device.
    """
    with torch.inference_mode(False):
        images, labels = images.detach().clone(), labels.detach().clone()
        index = None if index is None else index.detach().clone()
        with torch.no_grad():
            logits = forward(images) if clean_logits is None else clean_logits.detach().clone()
        verdict = Verdict.before(images, labels, logits.float())
        passes = [forward] if cheap_forward is None else [cheap_forward, forward]
        for number, member in enumerate(members):
            # What survives low precision is attacked again in fp32; `last` has no survivors to speak of.
            for attacked in passes if stop == "worst" else passes[:1]:
                is_open = verdict.by == ROBUST if stop == "worst" or number else verdict.by <= ROBUST
                rows = is_open.nonzero()[:, 0]
                if not len(rows):
                    return verdict
                watch = _Watch(images[rows], labels[rows], verdict.take(rows), attacked, forward, member.attack)
                watch.number, watch.stop, watch.check_every, watch.capacity = number, stop, check_every, len(images)
                watch.run(None if index is None else index[rows], seed)
                verdict.put(rows, watch.verdict)
        return verdict


class _AllBroken(Exception):  # noqa: N818  # a signal
    """Nothing is left to attack."""


class _Watch(SkipsMisclassified):
    """The model as an attack sees it: notes what breaks a sample, and computes only samples that are not broken.

    The attack works on all its samples as if nothing had happened; those that are broken get constant logits and no
    gradient. So every attack stops early and none needs to know.
    """

    number: int
    stop: StopRule
    check_every: int
    capacity: int

    def __init__(
        self, images: Tensor, labels: Tensor, verdict: Verdict, attacked: Forward, forward: Forward, attack: Attack
    ) -> None:
        self.images, self.labels, self.verdict = images, labels, verdict
        self.attacked, self.forward, self.attack = attacked, forward, attack
        self.rows = torch.arange(len(images), device=images.device)
        self.calls = 0

    def run(self, index: Tensor | None, seed: int) -> None:
        """Runs the attack and settles the verdict on what it returns."""
        try:
            returned = self.attack(self.images, self, self.labels, index=index, seed=seed)
        except _AllBroken:
            return
        with torch.no_grad():
            seen = returned[self.rows]
            self._judge(seen, self.forward(self._pad(seen))[: len(seen)], is_final=True)

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) != len(self.images):  # the attack chose samples itself
            return self.attacked(images)
        counts = self.stop == "worst" and self.attack.is_anytime
        if counts and self.calls and self.calls % self.check_every == 0:
            self.rows = (self.verdict.by == ROBUST).nonzero()[:, 0]
            if not len(self.rows):
                raise _AllBroken
        self.calls += 1
        seen = images[self.rows]
        if seen.requires_grad:
            seen.register_hook(partial(self._note_gradient, self.rows))  # type: ignore[no-untyped-call]
        logits = self.attacked(self._pad(seen))[: len(seen)].float()
        if seen.requires_grad and not logits.requires_grad:
            logits = logits + 0 * seen.sum()  # a model that is cut off from its pixels has dead gradients
        self.verdict.nans[self.rows] += _faults(logits.detach())
        if counts:
            self._judge(seen.detach(), logits.detach(), is_final=False)
        if len(self.rows) == len(images):
            return logits
        return logits.new_zeros(len(images), logits.shape[1]).index_copy(0, self.rows, logits)

    @torch.no_grad()
    def _judge(self, seen: Tensor, logits: Tensor, *, is_final: bool) -> None:
        """Notes which of the open samples an image breaks."""
        rows, verdict = self.rows, self.verdict
        excess = self._excess(seen, self.images[rows])
        verdict.excess[rows] = torch.maximum(verdict.excess[rows], excess)
        is_open = verdict.by[rows] <= ROBUST
        breaks = is_open & (logits.argmax(-1) != self.labels[rows]) & (excess <= BOX_TOLERANCE)
        if self.attacked is not self.forward and not is_final:
            logits = logits.clone()
            breaks = self._confirm(seen, breaks, logits)
        loss = cross_entropy(logits, self.labels[rows])
        noted = breaks | (is_open & ((loss > verdict.loss[rows]) | (self.number == 0)) if is_final else breaks)
        number = torch.where(verdict.by[rows] == WRONG, WRONG, self.number)
        if self.stop == "last":  # an attack may also put a wrong sample right
            verdict.by[rows] = torch.where(is_open, ROBUST, verdict.by[rows])
        verdict.by[rows] = torch.where(breaks, number, verdict.by[rows])
        verdict.prediction[rows] = torch.where(noted, logits.argmax(-1), verdict.prediction[rows])
        verdict.loss[rows] = torch.where(noted, loss, verdict.loss[rows])
        verdict.attacked[rows] = torch.where(noted.view(-1, 1, 1, 1), seen, verdict.attacked[rows])

    def _confirm(self, seen: Tensor, breaks: Tensor, logits: Tensor) -> Tensor:
        """Lets fp32 decide; puts its logits in place."""
        found = breaks.nonzero()[:, 0]
        if len(found):
            logits[found] = self.forward(self._pad(seen[found]))[: len(found)].float()
        return breaks & (logits.argmax(-1) != self.labels[self.rows])

    def _excess(self, seen: Tensor, images: Tensor) -> Tensor:
        """How far images ``(N, 3, H, W)`` lie outside of ball and box, ``(N,)``."""
        outside = torch.maximum(-seen, seen - 1).flatten(1).amax(1).clamp(min=0)
        if self.attack.eps is None:
            return outside
        # Of an L2 norm the last digits depend on the order of its terms.
        slack = 0.0 if self.attack.norm == "linf" else 1e-5 * self.attack.eps
        beyond = (distance(seen, images, self.attack.norm) - self.attack.eps - slack).clamp(min=0)
        return torch.maximum(outside, beyond)

    def _pad(self, seen: Tensor) -> Tensor:
        """Repeats the first sample up to one of `SIZES` batch sizes."""
        size = math.ceil(self.capacity / SIZES)
        missing = -len(seen) % size
        return torch.cat([seen, seen[:1].expand(missing, -1, -1, -1)]) if missing else seen

    def _note_gradient(self, rows: Tensor, gradient: Tensor) -> None:
        largest = gradient.detach().abs().flatten(1).amax(1)
        self.verdict.steps[rows] += 1
        self.verdict.dead[rows] += largest == 0
        self.verdict.nans[rows] += ~torch.isfinite(largest)


def _faults(logits: Tensor) -> Tensor:
    """Which rows ``(B,)`` of logits ``(B, C)`` hold a number that is not finite."""
    return ~torch.isfinite(logits).all(-1)
