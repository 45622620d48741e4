"""Probes by other models and other gradients than the tested model's own: images moved over, and gradients borrowed."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustclip.attacks import PGD, Attack, Member, noise
from robustclip.attacks.attack import Forward
from robustclip.attacks.perturbation_set import Norm, start
from robustclip.evaluation.defended_model import Carried
from robustclip.evaluation.engine import ROBUST, Rung, Verdict, attack_rows
from robustclip.evaluation.gradient_probes import margin_gradient
from robustclip.evaluation.probes import STEPS, largest, norm_of

LEVELS = 255  # of an 8-bit image
GRID_TOLERANCE = 1e-3  # in grey levels, of images that come from 8-bit files
STAND_IN_STEPS = 10  # of each attack with a borrowed gradient
NEIGHBOURS = 2  # images around the attacked one whose mean gradient an attack follows
NEIGHBOUR_SEED = 0x9E1B


class StandIn(NamedTuple):
    """An attack with another gradient than the tested model's own.

    Attributes:
        model: model that the attack receives.
        judge: model that decides.
        attack: the attack.
    """

    model: Forward
    judge: Forward
    attack: Attack


def transferred_attack(members: Sequence[Member]) -> Attack | None:
    """Returns the attack on another model whose images are moved over; it runs to its end. None without a radius.

    Args:
        members: attacks of the test.
    """
    first = largest([member.attack for member in members])
    if first is None or not first.eps:
        return None
    return PGD(first.eps, first.eps / 4, STEPS, norm_of(first), keep="best", loss="ce")


def transfers(
    images: Tensor,
    labels: Tensor,
    forward: Forward,
    sources: Sequence[Forward],
    attack: Attack | None,
    *,
    index: Tensor,
    seed: int,
) -> list[int | str]:
    """Returns 1 for each sample that an image made on another model misclassifies, else 0.

    An image counts only if it deceives its source, which answers correctly without attack; else the cell is empty. On a
    source with the answers and the gradients of the tested model, the attack is one more of the test's own.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: tested model.
        sources: models without the defence, as functions from images to logits; none gives empty cells.
        attack: attack of the sources; None gives empty cells.
        index: ``(B,)`` ids of the samples.
        seed: seed of the attack.
    """
    if attack is None or not sources:
        return [""] * len(images)
    with torch.inference_mode(False):
        images, labels, index = images.clone(), labels.clone(), index.clone()
        is_broken, is_tried = (torch.zeros_like(labels, dtype=torch.bool) for _ in range(2))
        near = start(images, attack.eps or 0, attack.norm, index, seed)
        for source in sources:
            is_tried |= is_alike(forward, source, near, labels)
            moved = attack(images, source, labels, index=index, seed=seed)
            with torch.no_grad():
                deceives = (source(images).argmax(-1) == labels) & (source(moved).argmax(-1) != labels)
                is_tried |= deceives
                is_broken |= deceives & (forward(moved).argmax(-1) != labels)
    pairs = zip(is_broken.tolist(), is_tried.tolist(), strict=True)
    return [int(broken) if tried else "" for broken, tried in pairs]


def is_alike(forward: Forward, source: Forward, images: Tensor, labels: Tensor) -> bool:
    """Returns whether two models have the same logits and gradients of the margin.

    Args:
        forward: one model.
        source: other model.
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
    """
    with torch.inference_mode(False):
        one, other = (margin_gradient(images.clone(), labels.clone(), model)[1:] for model in (forward, source))
    return all(float((a - b).norm()) <= 1e-4 * float(a.norm()) for a, b in zip(one, other, strict=True))


def stand_in_outcomes(
    images: Tensor,
    labels: Tensor,
    forward: Forward,
    sources: Sequence[Forward],
    members: Sequence[Member],
    *,
    index: Tensor,
    seed: int,
) -> list[int | str]:
    """Returns 1 for each sample that falls to an attack with a borrowed gradient, else 0; empty cells without a radius.

    The value that these attacks see is always the tested model's. The gradients are those of `_stand_ins`.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: tested model.
        sources: models without the defence, as functions from images to logits.
        members: attacks of the test.
        index: ``(B,)`` ids of the samples.
        seed: seed of the attacks.
    """
    attack = largest([member.attack for member in members])
    if attack is None or not attack.eps:
        return [""] * len(images)
    with torch.inference_mode(False):
        images, labels, index = images.clone(), labels.clone(), index.clone()
        with torch.no_grad():
            verdict = Verdict.before(images, labels, forward(images).float())
        options: dict[str, Any] = {"index": index, "seed": seed, "stop": "worst", "check_every": 1}
        for number, stand_in in enumerate(_stand_ins(images, forward, sources, attack)):
            rows = (verdict.by == ROBUST).nonzero()[:, 0]
            if not len(rows):
                break
            rung, judge = Rung(stand_in.model, is_fp32=True), stand_in.judge
            attack_rows(verdict, rows, images, labels, rung, judge, stand_in.attack, number=number, **options)
    return [int(number >= 0) for number in verdict.by.tolist()]


def _stand_ins(images: Tensor, forward: Forward, sources: Sequence[Forward], attack: Attack) -> Iterator[StandIn]:
    """Yields attacks with the gradient of the sources, at the rounded image, and as a mean over nearby images."""
    eps, norm = attack.eps or 0.0, norm_of(attack)
    for source in sources:
        yield StandIn(borrowed(forward, source), forward, _pgd(eps, norm))
    # Rounding stays in the perturbation set if the image has 8 bits and the radius is a number of grey levels.
    levels = int(eps * LEVELS + GRID_TOLERANCE)
    is_on_grid = bool(((images * LEVELS) - (images * LEVELS).round()).abs().max() < GRID_TOLERANCE)
    if norm == "linf" and levels and is_on_grid:
        yield StandIn(on_grid(forward), on_grid(forward), _pgd(levels / LEVELS, norm))
    yield StandIn(smoothed(forward, attack.eps or 0.0 if norm == "linf" else 1 / LEVELS), forward, _pgd(eps, norm))


def _pgd(eps: float, norm: Norm) -> Attack:
    return PGD(eps, eps / 4, STAND_IN_STEPS, norm, loss="margin")


def borrowed(forward: Forward, source: Forward) -> Forward:
    """Makes a model with the answers of one model and the gradients of another.

    Args:
        forward: model that answers.
        source: model whose gradient an attack gets.
    """

    def model(images: Tensor) -> Tensor:
        with torch.no_grad():
            value = forward(images).float()
        return Carried.apply(value, source(images).float()) if images.requires_grad else value

    return model


def on_grid(forward: Forward) -> Forward:
    """Makes a model that rounds images to 8 bits first, which passes the gradient on."""

    def model(images: Tensor) -> Tensor:
        return forward(Carried.apply((images.detach() * LEVELS).round() / LEVELS, images))

    return model


def smoothed(forward: Forward, reach: float) -> Forward:
    """Makes a model whose gradient is the mean over images around the given one.

    Args:
        forward: model that answers.
        reach: largest distance of a pixel to that of a nearby image.
    """

    def nearby(images: Tensor) -> Tensor:
        numbers = torch.arange(NEIGHBOURS, device=images.device)
        moves = reach * (2 * noise.uniform(numbers, tuple(images.shape[1:]), seed=NEIGHBOUR_SEED) - 1)
        return torch.stack([forward((images + move).clamp(0, 1)).float() for move in moves]).mean(0)

    return borrowed(forward, nearby)
