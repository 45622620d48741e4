"""Models whose robustness is known, and one that has learnt something."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

L2_ROUNDING = 1e-6  # relative; absolute where the radius is about the rounding of the pixels themselves


def assert_inside(attacked: Tensor, images: Tensor, eps: float, norm: str) -> None:
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    if norm == "linf":  # the bounds as fp32 has them
        assert (attacked >= images - eps).all()
        assert (attacked <= images + eps).all()
    elif norm == "l1":  # exact but for the sum itself
        length = (attacked.double() - images.double()).abs().flatten(1).sum(1)
        assert (length <= eps * (1 + 1e-12) + 1e-15).all()
    else:
        length = (attacked.double() - images.double()).flatten(1).norm(dim=1)
        assert (length <= eps * (1 + L2_ROUNDING) + L2_ROUNDING).all()


class Victim(NamedTuple):
    """A model with images and labels."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def accuracy(self, images: Tensor) -> float:
        return float((self.model(images).argmax(1) == self.labels).float().mean())


@cache
def learnt() -> Victim:
    """A small convolutional net that distinguishes six noisy patterns, with 300 images."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    patterns = torch.rand(6, 3, 16, 16) / 4 + 0.375
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    ).append(nn.Linear(8 * 36, 6))

    def draw(size: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(size) % 6
        return (patterns[labels] + torch.randn(size, 3, 16, 16) / 4).clamp(0, 1), labels

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        images, labels = draw(128)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    victim = Victim(model.requires_grad_(False), *draw(300))
    torch.set_rng_state(state)
    return victim


class Linear(NamedTuple):
    """Logits ``W x + b`` with images and labels that it gets right."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def robust(self, eps: float, norm: str) -> Tensor:
        """Which samples ``(B,)`` no perturbation breaks: for each wrong class the worst one has a closed form.

        With ``w = W_y - W_t``, the margin ``w x + b_y - b_t`` falls at most by ``eps |w|_2``, or for L-infinity by the
        sum over pixels of ``|w|`` times the room that ball and box leave in the direction of ``-sign(w)``. For L2 the
        box must be out of reach.
        """
        weight, bias = self.model[1].weight, self.model[1].bias  # type: ignore[index]
        margins = self.model(self.images)
        is_robust = torch.ones(len(self.images), dtype=torch.bool)
        for target in range(len(bias)):
            slope = weight[self.labels] - weight[target]
            flat = self.images.flatten(1)
            room = torch.where(slope > 0, flat.clamp(max=eps), (1 - flat).clamp(max=eps))
            fall = (slope.abs() * room).sum(1) if norm == "linf" else eps * slope.norm(dim=1)
            left = margins.gather(1, self.labels[:, None])[:, 0] - margins[:, target] - fall
            is_robust &= (left > 0) | (self.labels == target)
        return is_robust


def linear(classes: int, *, interior: bool = True, size: int = 60) -> Linear:
    """A random linear model; interior images are further than 0.25 from the box."""
    generator = torch.Generator().manual_seed(classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    model[1].weight.data = torch.randn(classes, 48, generator=generator)
    model[1].bias.data = torch.randn(classes, generator=generator) / 4
    model[1].bias.data -= model[1].weight.data.sum(1) / 2  # grey images lie between the classes
    images = torch.rand(size, 3, 4, 4, generator=generator)
    images = 0.25 + images / 2 if interior else images.where(images > 0.1, 0).where(images < 0.9, 1)
    model.requires_grad_(False)
    return Linear(model, images, model(images).argmax(1))
