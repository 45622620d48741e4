"""L1 balls around images ``(B, 3, H, W)``, intersected with the valid pixel range [0, 1]."""

import torch
from torch import Tensor


def project(images: Tensor, eps: float, attacked: Tensor) -> Tensor:
    """Finds the nearest point, in L2, of the L1 ball and the valid pixel range at once.

    A change ``u`` of a pixel becomes ``sign(u) min(max(|u| - t, 0), room)``, where ``room`` is what the range leaves in
    its direction, and ``t`` is 0 or such that the changes sum to the radius (Croce & Hein,
    https://arxiv.org/abs/2103.01208, proposition 2.1). Their sum falls in ``t`` along a line between two breakpoints,
    which are sorted. Pixels are rounded towards the image, so that the radius holds exactly.

    Args:
        images: centres of the balls, in [0, 1].
        eps: radius, a sum of absolute changes.
        attacked: points to project.
    """
    precise = torch.float64 if images.device.type != "mps" else torch.float32  # the device has no float64
    centre = images.flatten(1).to(precise)
    change = attacked.flatten(1).to(precise) - centre
    size, room = change.abs(), torch.where(change > 0, 1 - centre, centre)
    is_outside = torch.minimum(size, room).sum(1) > eps
    if images.device.type != "cpu" or bool(is_outside.any()):  # other devices are not waited for
        size = (size - torch.where(is_outside, _threshold(size, room, eps), 0)[:, None]).clamp(min=0)
    size = torch.minimum(size, room)
    moved = (centre + change.sign() * size).to(images.dtype).clamp(0, 1)
    is_beyond = (moved.to(precise) - centre).abs() > size
    return torch.where(is_beyond, torch.nextafter(moved, images.flatten(1)), moved).view_as(images)


def _threshold(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """Computes the ``t`` ``(B,)`` at which the changes ``min(max(size - t, 0), room)`` sum to the radius."""
    starts = torch.cat([size, size - room], 1)  # as t falls, a pixel begins to change, and has used up its room
    starts, order = starts.sort(dim=1, descending=True)
    weights = torch.where(order < size.shape[1], 1.0, -1.0).to(size.dtype)
    pixels, offset = weights.cumsum(1), (weights * starts).cumsum(1)
    spent = (offset - pixels * starts).cummax(1).values  # rises but for rounding
    last = ((spent <= eps).sum(1, keepdim=True) - 1).clamp(min=0)
    threshold: Tensor = (offset.gather(1, last) - eps) / pixels.gather(1, last).clamp(min=1)
    return threshold[:, 0].clamp(min=0)


def movable(gradient: Tensor, position: Tensor) -> Tensor:
    """Sets a gradient to 0 where it points out of the valid pixel range from the edge of it.

    Args:
        gradient: ``(B, 3, H, W)``.
        position: images ``(B, 3, H, W)``.
    """
    return gradient * torch.where(gradient > 0, position < 1, position > 0)


def sparse_direction(gradient: Tensor, share: Tensor) -> Tensor:
    """Computes the signs of the largest entries of a gradient, scaled to L1 norm 1; a zero gradient remains zero.

    Args:
        gradient: ``(B, 3, H, W)``.
        share: ``(B,)``, share of the entries, of which at least one is taken; equal entries are taken together.
    """
    size = gradient.abs().flatten(1)
    place = ((1 - share) * size.shape[1]).long().clamp(0, size.shape[1] - 1)
    smallest = size.sort(dim=1).values.gather(1, place[:, None]).view(-1, 1, 1, 1)
    signs = gradient.sign() * (gradient.abs() >= smallest)
    number: Tensor = signs.abs().sum((1, 2, 3), keepdim=True).clamp(min=1)
    return signs / number


def laplace(uniform: Tensor) -> Tensor:
    """Turns draws from [0, 1) into draws of the Laplace distribution, which is even in all directions of an L1 ball."""
    centred = 2 * uniform - 1
    return -centred.sign() * torch.log1p(-centred.abs().clamp(max=1 - 2**-24))
