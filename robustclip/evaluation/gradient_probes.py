"""Probes of the gradient: whether it exists, repeats, predicts the loss, and uses the whole image."""

import torch
from torch import Tensor

from robustclip.attacks import Attack, perturbation_set
from robustclip.attacks.attack import Forward, gradient_of
from robustclip.attacks.sample_losses import margin

# Gradient fidelity: the change of the loss along the attack's direction against the integral of its gradient.
LENGTHS = (0.25 / 255, 0.05 / 255)
NODES = 8
TOLERANCE, ROUNDING = 0.25, 1e-4  # relative to the change, and to the largest logit
APPROACH = 3  # steps of a quarter of the radius that lead to the examined point


def gradients(images: Tensor, labels: Tensor, forward: Forward, attack: Attack | None) -> dict[str, Tensor]:
    """Examines the gradient of the margin at a point where the attack works.

    The point is reached by three steps of a quarter of the radius. From there the loss is followed along the sign of
    the gradient, for two lengths that a model must bear outside of the perturbation set too.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: function from images to logits.
        attack: attack of the test, for radius and norm; None examines the clean images.

    Returns:
        ``faithful``: 1 if the integral of the gradient predicts the change of the loss for one of the lengths, else 0;
        nan without a gradient. ``regrad``: relative L2 difference of two gradients of the batch. ``spread``: the
        squared sum of the gradient's absolute values over its number of pixels and sum of squares.
    """
    with torch.inference_mode(False), torch.enable_grad():
        images, labels = images.clone(), labels.clone()
        point = _approached(images, labels, forward, attack)
        value, gradient, logits = margin_gradient(point, labels, forward)
        again = margin_gradient(point, labels, forward)[1]
        has_gradient = gradient.flatten(1).abs().amax(1) > 0
        flat = gradient.flatten(1).double()
        faithful = torch.full_like(value, torch.nan)
        faithful[has_gradient] = 0.0
        for step in LENGTHS:
            if bool((faithful == 0).any()):  # the whole batch, since a model may know its samples by their places
                scale = logits.abs().amax(-1)
                holds = _is_faithful(point, labels, forward, gradient.sign(), value, scale, step)
                faithful = torch.where(holds & has_gradient, 1.0, faithful)
        return {
            "faithful": faithful,
            "regrad": ((again - gradient).norm() / gradient.norm().clamp(min=1e-30)).expand(len(images)),
            "spread": (flat.abs().sum(1) ** 2 / (flat.square().sum(1) * flat.shape[1])).float(),
        }


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


def _is_faithful(
    point: Tensor,
    labels: Tensor,
    forward: Forward,
    direction: Tensor,
    value: Tensor,
    scale: Tensor,
    step: float,
) -> Tensor:
    """Compares the change ``(B,)`` of the margin over a step with the sum of the gradients on the way."""
    with torch.no_grad():
        change = margin(forward(point + step * direction).float(), labels) - value
    predicted = torch.zeros_like(value)
    for node in range(NODES):
        gradient = margin_gradient(point + step * (node + 0.5) / NODES * direction, labels, forward)[1]
        predicted += (gradient * direction).flatten(1).sum(1) * step / NODES
    allowed = TOLERANCE * torch.maximum(change.abs(), predicted.abs()) + ROUNDING * scale
    return (change - predicted).abs() <= allowed
