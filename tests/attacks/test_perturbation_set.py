"""Ball and box."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from victims import assert_inside

from robustclip.attacks import PGD, noise, perturbation_set


@settings(max_examples=60, deadline=None)
@given(norm=st.sampled_from(["linf", "l2", "l1"]), eps=st.floats(0, 1), scale=st.floats(0, 3), seed=st.integers(0, 999))
def test_projections_and_starts_lie_in_the_perturbation_set(norm: str, eps: float, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    images = (torch.rand(4, 3, 5, 5) * 1.4 - 0.2).clamp(0, 1)
    assert_inside(
        perturbation_set.project(images + scale * torch.randn_like(images), images, eps, norm), images, eps, norm
    )
    for index in (None, torch.arange(4)):
        assert_inside(perturbation_set.start(images, eps, norm, index, seed), images, eps, norm)
        assert_inside(perturbation_set.surface_start(images, eps, norm, index, seed), images, eps, norm)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_projection_leaves_points_of_the_perturbation_set_unchanged(norm: str) -> None:
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    inside = (images + 0.01).clamp(0, 1)
    torch.testing.assert_close(perturbation_set.project(inside, images, 0.8, norm), inside, atol=1e-7, rtol=0)


def test_large_l2_radii_hold_to_a_millionth() -> None:
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for eps in (0.05, 0.5, 3.0):
        attacked = perturbation_set.project(images + torch.randn_like(images), images, eps, "l2")
        length = (attacked.double() - images.double()).flatten(1).norm(dim=1)
        assert (length <= eps * (1 + 1e-6)).all()


def test_surface_starts_have_the_radius_as_distance_from_interior_images() -> None:
    images = torch.full((4, 3, 5, 5), 0.5)
    for norm in ("linf", "l2", "l1"):
        reached = perturbation_set.distance(
            perturbation_set.surface_start(images, 0.2, norm, torch.arange(4), 0), images, norm
        )
        torch.testing.assert_close(reached, torch.full((4,), 0.2), atol=1e-6, rtol=0)


def test_starts_are_the_draws_that_published_figures_used() -> None:
    """The formulas as they stood in PGD before; equal bit for bit, by sample id and from torch's generator."""
    images, index = torch.rand(3, 3, 4, 4), torch.tensor([5, 2**40, 7])

    def box(attacked: Tensor) -> Tensor:
        return attacked.clamp((images - 0.1).clamp(min=0), (images + 0.1).clamp(max=1))

    def sphere(direction: Tensor, length: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(direction, dim=(1, 2, 3), keepdim=True)
        delta = images + 0.1 * length.view(-1, 1, 1, 1) * (direction / norm) - images
        norm = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        return (images + delta * (0.1 / norm).clamp(max=1)).clamp(0, 1)

    by_id = noise.uniform(index, (3, 4, 4), seed=9)
    start = PGD(0.1, steps=0)(images, lambda x: x, index, index=index, seed=9)
    assert torch.equal(start, box(images + 0.1 * (2 * by_id - 1)))
    towards, length = noise.normal(index, (3, 4, 4), seed=9), noise.uniform(index, (1,), seed=~9)[:, 0]
    start = PGD(0.1, steps=0, norm="l2")(images, lambda x: x, index, index=index, seed=9)
    assert torch.equal(start, sphere(towards, length))
    torch.manual_seed(1)
    start = PGD(0.1, steps=0)(images, lambda x: x, index)
    torch.manual_seed(1)
    assert torch.equal(start, box(images + 0.1 * (2 * torch.rand_like(images) - 1)))
    torch.manual_seed(1)
    start = PGD(0.1, steps=0, norm="l2")(images, lambda x: x, index)
    torch.manual_seed(1)
    assert torch.equal(start, sphere(torch.randn_like(images), torch.rand(3)))


def test_distances_are_norms_of_differences() -> None:
    images, others = torch.rand(5, 3, 4, 4), torch.rand(5, 3, 4, 4)
    difference = (images - others).flatten(1)
    torch.testing.assert_close(perturbation_set.distance(images, others, "linf"), difference.abs().max(1).values)
    torch.testing.assert_close(perturbation_set.distance(images, others, "l2"), difference.square().sum(1).sqrt())
    torch.testing.assert_close(perturbation_set.distance(images, others, "l1"), difference.abs().sum(1))


def test_a_zero_gradient_is_a_zero_step() -> None:
    zero = torch.zeros(2, 3, 4, 4)
    assert torch.equal(perturbation_set.direction(zero, zero, "linf"), zero)
    assert torch.equal(perturbation_set.direction(zero, zero, "l2"), zero)
    assert torch.equal(perturbation_set.direction(zero, zero, "l1"), zero)


def test_streams_of_one_seed_differ() -> None:
    words = {perturbation_set.stream(seed, number) & 0xFFFFFFFF for seed in range(50) for number in range(200)}
    assert len(words) == 50 * 200
    assert perturbation_set.stream(3, 0) == 3
