"""The energy's gradient in closed form against autograd's double backward pass, in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from robustclip.objectives.energy import Reduction, adapted, batch_penalty, sample_penalty

N, C, D, R, R_T = 5, 7, 6, 0.3, 0.6
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt()


@pytest.fixture
def problem() -> list[Tensor]:
    """Images, texts, and both adapters."""
    torch.manual_seed(0)
    shapes = (N, D), (C, D), (D, D), (D, D)
    x, t, a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    eye = torch.eye(D, dtype=torch.float64)
    return [unit(x).requires_grad_(), unit(t), (eye + 0.5 * a).requires_grad_(), (eye + 0.5 * b).requires_grad_()]


def cosines(x: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Between images behind ``x A^T`` and texts behind ``t B^T``."""
    return unit(R * x @ a.T + (1 - R) * x) @ unit(R_T * t @ b.T + (1 - R_T) * t).T


def twice(reduction: Reduction, is_shared: bool, x: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``|dF/d delta|^2`` by ``create_graph``; a shared shift is added to ``A^T`` and ``B^T``, as in the code."""
    shifts = [torch.zeros(D, D, dtype=torch.float64, requires_grad=True) for _ in range(1 if is_shared else 2)]
    of_a, of_b = shifts[0], shifts[-1]
    sums = cosines(x, t, a + of_a.T, b + of_b.T).exp()
    total = sums.sum() if reduction == "sum" else sums.mean()
    gradients = torch.autograd.grad(total, shifts, create_graph=True)
    squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    return squares / D**2 if reduction == "sum" else squares


def per_sample(temperature: float, x: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``|dE_n/dA|^2 + |dE_n/dB|^2``, averaged."""
    norms = []
    for image in x:
        energy = -torch.logsumexp(temperature * cosines(image[None], t, a, b), dim=1).sum()
        gradients = torch.autograd.grad(energy, [a, b], create_graph=True)
        norms.append(torch.stack([gradient.square().sum() for gradient in gradients]).sum())
    return torch.stack(norms).mean()


def assert_same(ours: Tensor, theirs: Tensor, variables: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs, **EXACT)
    for found, expected in zip(*(torch.autograd.grad(value, variables) for value in (ours, theirs)), strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(found, expected, **EXACT)


@each_reduction
@pytest.mark.parametrize("is_shared", [False, True])
def test_the_closed_form_is_the_double_backward_pass(
    problem: list[Tensor], reduction: Reduction, is_shared: bool
) -> None:
    x, t, a, b = problem
    views = adapted(x, a, R), adapted(t, b, R_T, t @ t.T)
    ours = batch_penalty(*views, reduction=reduction, is_shared=is_shared)
    assert_same(ours, twice(reduction, is_shared, x, t, a, b), [x, a, b])


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_the_gradient_of_each_images_energy_is_autograds(problem: list[Tensor], temperature: float) -> None:
    """On the sphere: the formula takes it for granted that images have unit length."""
    x, t, a, b = problem
    ours = sample_penalty(adapted(unit(x), a, R), adapted(t, b, R_T), temperature=temperature)
    assert_same(ours, per_sample(temperature, unit(x), t, a, b), [x, a, b])


def test_reductions_differ_by_the_square_of_terms_over_width(problem: list[Tensor]) -> None:
    x, t, a, b = problem
    views = adapted(x, a, R), adapted(t, b, R_T)
    ratio = batch_penalty(*views, reduction="sum") / batch_penalty(*views)
    torch.testing.assert_close(ratio, torch.tensor((N * C / D) ** 2, dtype=torch.float64), **EXACT)


def test_its_own_second_derivative_is_autograds(problem: list[Tensor]) -> None:
    x, t, a, b = problem
    products = []
    for value in (batch_penalty(adapted(x, a, R), adapted(t, b, R_T)), twice("mean", False, *problem)):
        (gradient,) = torch.autograd.grad(value, b, create_graph=True)
        products.append(torch.autograd.grad(gradient.square().sum(), b)[0])
    torch.testing.assert_close(*products, **EXACT)
