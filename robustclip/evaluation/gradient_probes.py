"""Probes of the gradient: whether it exists, repeats, predicts the loss, uses the whole image, and is steady."""

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks import Attack, noise, perturbation_set
from robustclip.attacks.attack import Forward, gradient_of
from robustclip.attacks.sample_losses import margin
from robustclip.evaluation.seen_precision import SeenPrecision

# Gradient fidelity: the change of the loss against the integral of its gradient, along the attack's direction and along
# random signs of blocks of pixels, which also see what a gradient leaves out.
LENGTHS, BLOCK_LENGTH = (0.25 / 255, 0.05 / 255), 1 / 255
NODES = 8
TOLERANCE = 0.25  # relative to the change; along random signs, to the change by chance
# Relative to the largest logit, and in units of the model's precision; errors of up to 5.8 units were seen in bf16.
ROUNDING, ROUNDINGS = 1e-4, 6
BLOCKS, BLOCK_SEED = 8, 0xB10C  # blocks of an image's side
NEAR = 0.125 / 255  # length over which a network without a defence rises as its gradient promises
APPROACH = 3  # steps of a quarter of the radius that lead to the examined point


def gradients(images: Tensor, labels: Tensor, forward: Forward, attack: Attack | None) -> dict[str, Tensor]:
    """Examines the gradient of the margin at a point where the attack works.

    The point is reached by three steps of a quarter of the radius. From there the loss is followed along the sign of
    the gradient for two lengths, and along random signs for a grey level, which a model must bear outside of the
    perturbation set too.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: function from images to logits.
        attack: attack of the test, for radius and norm; None examines the clean images.

    Returns:
        ``faithful``: 1 if the integral of the gradient predicts the change of the loss along both directions, along the
        first for one of the lengths, up to rounding in the model's precision, else 0; nan where there is no gradient
        and the loss stays as it is. ``regrad``: relative L2 difference of two gradients of the batch. ``spread``: the
        squared sum of the gradient's absolute values over its number of pixels and sum of squares. ``steady``: the
        least over the largest size of the gradient within one step of the attack, a quarter of the radius. ``rise``:
        the rise of the margin over an eighth of a grey level along the gradient's sign, over that of a linear model.
    """
    with torch.inference_mode(False), torch.enable_grad():
        images, labels = images.clone(), labels.clone()
        point = _approached(images, labels, forward, attack)
        with SeenPrecision() as precision:
            value, gradient, logits = margin_gradient(point, labels, forward)
        rounding = max(ROUNDING, ROUNDINGS * precision.eps)
        again = margin_gradient(point, labels, forward)[1]
        has_gradient = gradient.flatten(1).abs().amax(1) > 0
        flat = gradient.flatten(1).double()
        by_chance = torch.stack([torch.zeros_like(value), gradient.flatten(1).norm(dim=1)])
        is_faithful = torch.ones_like(has_gradient)
        along = LENGTHS if rounding == ROUNDING else LENGTHS[:1]  # shorter changes vanish in coarser rounding
        paths = ((gradient.sign(), along), (_blocks(point), (BLOCK_LENGTH,)))
        for (direction, lengths), norm in zip(paths, by_chance, strict=True):
            holds = torch.zeros_like(has_gradient)
            for step in lengths:
                if not bool(holds.all()):  # the whole batch, as a model may know samples by their places
                    slack = rounding * logits.abs().amax(-1) + TOLERANCE * step * norm
                    holds |= _is_faithful(point, labels, forward, direction, value, slack, step)
            is_faithful &= holds
        return {
            "faithful": torch.where(has_gradient | ~is_faithful, is_faithful.float(), torch.nan),
            "regrad": ((again - gradient).norm() / gradient.norm().clamp(min=1e-30)).expand(len(images)),
            "spread": (flat.abs().sum(1) ** 2 / (flat.square().sum(1) * flat.shape[1])).float(),
            "steady": _steadiness(point, labels, forward, gradient, _step_of(attack)),
            "rise": _rise(point, labels, forward, value, gradient),
        }


def _step_of(attack: Attack | None) -> float:
    """Returns a quarter of the radius in L-infinity, else a grey level."""
    return attack.eps / 4 if attack is not None and attack.eps and attack.norm == "linf" else BLOCK_LENGTH


def _steadiness(point: Tensor, labels: Tensor, forward: Forward, gradient: Tensor, step: float) -> Tensor:
    """Divides the least size ``(B,)`` of the gradient along its own sign by the largest; nan without a gradient."""
    sizes = [gradient.flatten(1).abs().sum(1)]
    for node in range(1, NODES + 1):
        further = margin_gradient(point + step * node / NODES * gradient.sign(), labels, forward)[1]
        sizes.append(further.flatten(1).abs().sum(1))
    least, largest = torch.stack(sizes).aminmax(dim=0)
    return least / largest


def _rise(point: Tensor, labels: Tensor, forward: Forward, value: Tensor, gradient: Tensor) -> Tensor:
    """Divides the rise ``(B,)`` of the margin along the gradient's sign by the predicted rise; nan without any."""
    with torch.no_grad():
        further = margin(forward(point + NEAR * gradient.sign()).float(), labels)
    predicted = NEAR * gradient.flatten(1).abs().sum(1)
    return torch.where(predicted > 0, (further - value) / predicted, torch.nan)


def _approached(images: Tensor, labels: Tensor, forward: Forward, attack: Attack | None) -> Tensor:
    """Takes three steps of a quarter of the radius along the gradient of the margin."""
    if attack is None or not attack.eps:
        return images
    point = images
    for _ in range(APPROACH):
        gradient = margin_gradient(point, labels, forward)[1]
        moved = point + attack.eps / 4 * perturbation_set.direction(gradient, point, attack.norm)
        point = perturbation_set.project(moved, images, attack.eps, attack.norm)
    return point


def margin_gradient(images: Tensor, labels: Tensor, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the margin ``(B,)``, its gradient, and the logits; the gradient is zero where there is no graph.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: function from images to logits.
    """
    images = images.detach().clone().requires_grad_()
    logits = forward(images).float()
    value = margin(logits, labels)
    return value.detach(), gradient_of(value, images), logits.detach()


def _blocks(images: Tensor) -> Tensor:
    """Draws a sign for every block of pixels and colour of every image."""
    numbers = torch.arange(len(images), device=images.device)
    draws = noise.uniform(numbers, (images.shape[1], BLOCKS, BLOCKS), seed=BLOCK_SEED)
    return F.interpolate((draws - 0.5).sign(), images.shape[-2:])


def _is_faithful(
    point: Tensor,
    labels: Tensor,
    forward: Forward,
    direction: Tensor,
    value: Tensor,
    slack: Tensor,
    step: float,
) -> Tensor:
    """Compares the change ``(B,)`` of the margin over a step with the sum of the gradients on the way."""
    with torch.no_grad():
        change = margin(forward(point + step * direction).float(), labels) - value
    predicted = torch.zeros_like(value)
    for node in range(NODES):
        gradient = margin_gradient(point + step * (node + 0.5) / NODES * direction, labels, forward)[1]
        predicted += (gradient * direction).flatten(1).sum(1) * step / NODES
    allowed = TOLERANCE * torch.maximum(change.abs(), predicted.abs()) + slack
    return (change - predicted).abs() <= allowed
