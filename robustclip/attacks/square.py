"""Square Attack (Andriushchenko et al., https://arxiv.org/abs/1912.00049): random search over square patches."""

import math
from functools import cache, partial

import torch
from torch import Tensor

from robustclip.arguments import Count, PositiveShare
from robustclip.attacks import perturbation_set
from robustclip.attacks.attack import (
    Attack,
    Cost,
    Forward,
    Loss,
    Member,
    Target,
    Worst,
    check_own_loss,
    restrict_to_correct,
    scaled_count,
)
from robustclip.attacks.pixel_units import Radius, pixels, scaled_radius
from robustclip.attacks.sample_losses import LOSSES, LossName, select_loss

SCHEDULE_QUERIES = 10_000  # number of queries for which the paper defines when the patch area halves
HALVE_AREA_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
BLOCK = 64  # queries drawn at once, and between two checks for misclassified samples; part of the meaning of a seed
DRAWS = 9  # per query: row, column (twice for l2 and l1), orientation, and one sign per colour
SMALLEST_SIDE, TILES = 3, 5  # for l2 and l1; the paper's section 3.4
ORDERS = {"l2": 2, "l1": 1}
DECAY = {"l2": 2, "l1": 4}  # power by which pyramids fall from their centre
COLOURS = 3


class Square(Attack):
    """Square Attack, a random search that queries the model without gradients; every sample has its own patches.

    L-infinity: vertical stripes of ``+-eps``; then each query sets a random square to ``+-eps`` per colour. L2: a grid
    of two-sided pyramids; then each query moves the norm of one square to another. L1 (Croce & Hein,
    https://arxiv.org/abs/2103.01208): the same with steeper pyramids, whose sum of changes is shared out, and with the
    projection onto perturbation set and valid pixel range at once. A candidate is kept if it is worse for the model.

    Departures from the authors' code: squares may touch the last row and column, except in L1; every sample
    draws its own squares; misclassified samples are attacked until the end of their block of 64 queries.

    Args:
        eps: radius of the perturbation set; L-infinity radii in [0, 1] pixel units, such as ``4/255``.
        queries: evaluations of the model per image, including the first.
        norm: ``linf``, ``l2`` or ``l1``.
        p_init: share of the image that the first squares cover.
        loss: ``margin``, ``ce`` or ``dlr``.
        target: name of the class that images of other classes are moved to, or a class per task by the task's name;
            null for any wrong class. The loss to maximise is minus that of the target.

    Raises:
        ValueError: the radius is not in [0, 1], there is no query, or the share is outside (0, 1].

    Examples:
        >>> import torch
        >>> from robustclip import Square
        >>> images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
        >>> attack = Square("4/255", queries=20)
        >>> attacked = attack(images, lambda x: x.mean((2, 3)), labels)  # the mean colour as logits
        >>> bool((attacked - images).abs().max() <= 4 / 255 + 1e-6)
        True
    """

    is_anytime = True
    is_black_box = True
    eps: float

    def __init__(
        self,
        eps: Radius = "4/255",
        queries: Count = 5000,
        norm: perturbation_set.Norm = "linf",
        p_init: PositiveShare = 0.8,
        loss: LossName = "margin",
        target: Target = None,
    ) -> None:
        self.eps, self.norm = pixels(eps, name="eps", limit=1.0 if norm == "linf" else None), norm
        self.queries, self.p_init, self.loss = queries, p_init, loss
        self._set_target(target)

    def members(self, classes: int) -> list[Member]:
        """Returns the attack itself, with the margin as its loss where DLR has too few classes."""
        loss, note = select_loss(self.loss, classes)
        return [Member("square", self._changed(loss=loss) if note else self, note)]

    def cost(self, classes: int) -> Cost:
        """Passes per image by the settings."""
        return Cost(0, self.queries)

    def scaled(self, *, radius: float = 1.0, steps: float = 1.0) -> "Square":
        """Returns a copy with radius and number of queries multiplied; the schedule of areas follows the queries."""
        return self._changed(eps=scaled_radius(self.eps, radius, self.norm), queries=scaled_count(self.queries, steps))

    @torch.no_grad()
    def perturb(
        self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, *, index: Tensor | None, seed: int
    ) -> Tensor:
        """Starts, and tries one patch per query; stops early once every sample is misclassified."""
        check_own_loss(self, loss)
        loss = self.directed(LOSSES[self.loss])

        def evaluate(attacked: Tensor, model: Forward = forward) -> Worst:
            outputs = model(attacked)
            return Worst(attacked, loss(outputs, targets), self.is_success(outputs, targets))

        is_linf = self.norm == "linf"
        options = (self.eps, index, seed)
        worst = evaluate(_stripes(images, *options) if is_linf else _tiles(images, *options, self.norm))
        propose = _square if is_linf else partial(_moved_square, ball=self.norm)
        for first in range(0, self.queries - 1, BLOCK):
            draws = perturbation_set.uniform(
                images, (BLOCK, DRAWS), index, perturbation_set.stream(seed, 1 + first // BLOCK)
            )
            is_open = ~worst.is_misclassified
            if not bool(is_open.any()):
                break
            model = restrict_to_correct(forward, worst.is_misclassified)
            for query in range(first, min(first + BLOCK, self.queries - 1)):
                share = area(query, self.queries, self.p_init)
                candidate = propose(images, worst.images, draws[:, query - first], share, self.eps)
                worst = worst.or_worse(evaluate(candidate, model), where=is_open)
        return worst.images


def area(query: int, queries: int, p_init: float) -> float:
    """Computes the share of the image that the square of a query covers, by the paper's schedule.

    Args:
        query: number of the query, from 0.
        queries: number of all queries, to which the schedule is rescaled.
        p_init: share of the first squares.
    """
    rescaled = query * SCHEDULE_QUERIES // queries
    return p_init / 2.0 ** sum(rescaled > after for after in HALVE_AREA_AFTER)


def _stripes(images: Tensor, eps: float, index: Tensor | None, seed: int) -> Tensor:
    """Draws columns of ``+-eps`` per colour, added to the images."""
    draw = perturbation_set.uniform(
        images, (images.shape[1], 1, images.shape[3]), index, perturbation_set.stream(seed, 0)
    )
    return (images + eps * _signs(draw)).clamp(0, 1)


def _square(images: Tensor, worst: Tensor, draws: Tensor, share: float, eps: float) -> Tensor:
    """Sets one square of each image to ``+-eps`` per colour; draws ``(B, 9)`` from [0, 1)."""
    height, width = images.shape[2:]
    side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
    top, left = _corner(draws[:, 0], height, side), _corner(draws[:, 1], width, side)
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + side)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + side)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    signs = _signs(draws[:, -COLOURS:])[:, : images.shape[1], None, None]
    return torch.where(inside, (images + eps * signs).clamp(0, 1), worst)


def _tiles(images: Tensor, eps: float, index: Tensor | None, seed: int, ball: str) -> Tensor:
    """Draws a grid of pyramids with a sign per tile and colour; in L2 of norm eps, in L1 of norm 1 per tile at most."""
    batch, colours, height, width = images.shape
    side = max(min(height, width) // TILES, 1)
    down, across = height // side, width // side
    draw = perturbation_set.uniform(images, (colours * down * across + 1,), index, perturbation_set.stream(seed, 0))
    signs = _signs(draw[:, 1:]).view(batch, colours, down, across)
    bumps = _turned(pyramids(side, images.device, ball), draw[:, 0])[:, None].repeat(1, 1, down, across)
    tiled = bumps * signs.repeat_interleave(side, 2).repeat_interleave(side, 3)
    delta = torch.zeros_like(images)
    top, left = (height - side * down) // 2, (width - side * across) // 2
    delta[:, :, top : top + side * down, left : left + side * across] = tiled
    return _on_surface(images, delta, eps, ball)


def _moved_square(images: Tensor, worst: Tensor, draws: Tensor, share: float, eps: float, *, ball: str) -> Tensor:
    """Empties one square of each perturbation and adds its norm, and the unused norm, to another square."""
    height, width = images.shape[2:]
    side = max(round(math.sqrt(share * height * width)), SMALLEST_SIDE)
    side = min(side + (side + 1) % 2, height, width)  # odd, so that a pyramid has a centre
    delta, order, colours = worst - images, ORDERS[ball], images.shape[1]
    size = delta.abs() ** order
    spent = perturbation_set.norm(delta).square() if ball == "l2" else size.sum((1, 2, 3), keepdim=True)
    unspent = (eps**order - spent).clamp(min=0)
    # In L1 squares stay off the last row and column, as the authors' do: large ones then coincide, which is stronger.
    places = 0 if ball == "l1" else 1
    filled = _window(delta, draws[:, 0], draws[:, 1], side, places)
    emptied = _window(delta, draws[:, 2], draws[:, 3], side, places)
    rest = delta.index_put(emptied, delta.new_zeros(()))
    union = rest.index_put(filled, delta.new_zeros(()))  # both squares emptied
    in_both = (size - union.abs() ** order).sum((2, 3), keepdim=True).clamp(min=0)
    bump = _turned(pyramids(side, delta.device, ball), draws[:, 4])[:, None]
    bump = bump * _signs(draws[:, -COLOURS:])[:, :colours, None, None]
    length = (unspent / colours + in_both) ** (1 / order)
    # In L1 the new square is larger than what is free, and the projection takes from all pixels, as the authors' does.
    length = length * colours if ball == "l1" else length
    new = (_unit(bump + _unit(delta[filled], ball), ball) * length).to(delta.dtype)
    return _on_surface(images, rest.index_put(filled, new), eps, ball)


def _on_surface(images: Tensor, delta: Tensor, eps: float, ball: str) -> Tensor:
    """Adds a perturbation: in L2 scaled to the radius and clipped, in L1 projected."""
    if ball == "l1":
        return perturbation_set.project(images + delta, images, eps, ball)
    return (images + eps * perturbation_set.unit(delta)).clamp(0, 1)


@cache
def pyramids(side: int, device: torch.device, ball: str = "l2") -> Tensor:
    """Computes the paper's eta ``(side, side)``: a pyramid over the upper half, its negative over the lower, of norm 1.

    Args:
        side: side of the square, in pixels.
        device: device of the result.
        ball: ``l2`` or ``l1``.
    """
    upper = _pyramid(side // 2, side, device, ball)
    both = torch.cat([upper, -_pyramid(side - side // 2, side, device, ball)])
    return _unit(both, ball)


def _pyramid(height: int, width: int, device: torch.device, ball: str) -> Tensor:
    """Sums ``(k + 1)**-power`` over the square rings ``k`` that contain a cell, of norm 1 (paper, equation 2)."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    ring = torch.maximum((rows - height // 2).abs()[:, None], (columns - width // 2).abs()[None, :])
    weights = 1 / torch.arange(1, max(height, width) // 2 + 2, device=device) ** DECAY[ball]
    bump = weights.flip(0).cumsum(0).flip(0)[ring]
    return _unit(bump, ball)


def _window(
    delta: Tensor, down: Tensor, across: Tensor, side: int, further: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the indices of one square per sample, over all colours."""
    batch, colours, height, width = delta.shape
    cells = torch.arange(side, device=delta.device)
    rows = (down * (height - side + further)).long()[:, None] + cells
    columns = (across * (width - side + further)).long()[:, None] + cells
    samples = torch.arange(batch, device=delta.device)[:, None, None, None]
    channels = torch.arange(colours, device=delta.device)[None, :, None, None]
    return samples, channels, rows[:, None, :, None], columns[:, None, None, :]


def _corner(draw: Tensor, length: int, side: int) -> Tensor:
    return (draw * (length - side + 1)).long()


def _signs(draw: Tensor) -> Tensor:
    return torch.where(draw < 0.5, -1.0, 1.0)


def _turned(patch: Tensor, draw: Tensor) -> Tensor:
    """Selects the patch ``(S, S)`` or its transpose per sample, ``(B, S, S)``."""
    return torch.where((draw < 0.5)[:, None, None], patch, patch.T)


def _unit(patches: Tensor, ball: str) -> Tensor:
    """Scales patches ``(..., S, S)`` to norm 1 each; zero remains zero."""
    length: Tensor = torch.linalg.vector_norm(patches, ord=ORDERS[ball], dim=(-2, -1), keepdim=True)
    return patches / length.clamp(min=perturbation_set.SMALLEST_NORM)
