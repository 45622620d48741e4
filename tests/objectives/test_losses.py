"""Distances between outputs against sums written out in fp64."""

import pytest
import torch
from torch import Tensor

from robustclip.objectives import losses


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, generator=generator) * 3, torch.randn(5, 7, generator=generator) * 3


def softmax(z: Tensor) -> Tensor:
    e = (z.double() - z.double().max(1, keepdim=True).values).exp()
    return e / e.sum(1, keepdim=True)


def kl_by_hand(q: Tensor, p: Tensor) -> Tensor:
    return (q * (q / p).log()).sum(1)


def test_each_distance_is_its_formula(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    p, q, x, y = softmax(a), softmax(b), a.double(), b.double()
    expected = {
        losses.kl: kl_by_hand(q, p),
        losses.reverse_kl: kl_by_hand(p, q),
        losses.l1: (x - y).abs().sum(1) / 7,
        losses.l2: ((x - y) ** 2).sum(1) / 7,
        losses.cosine: 1 - (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt(),
    }
    for distance, value in expected.items():
        torch.testing.assert_close(distance(a, b).double(), value, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_divergence_reach_both_sides(pair: tuple[Tensor, Tensor]) -> None:
    """``dKL(q||p)/dz = p - q`` and ``dKL(q||p)/dv = q (log q - log p - KL(q||p))`` for logits z of p and v of q."""
    z, v = (logits.clone().requires_grad_() for logits in pair)
    p, q = softmax(z.detach()), softmax(v.detach())
    for_z, for_v = torch.autograd.grad(losses.kl(z, v).sum(), [z, v])
    torch.testing.assert_close(for_z.double(), p - q, rtol=1e-4, atol=1e-6)
    expected = q * ((q / p).log() - kl_by_hand(q, p)[:, None])
    torch.testing.assert_close(for_v.double(), expected, rtol=1e-4, atol=1e-6)
    for_z, for_v = torch.autograd.grad(losses.reverse_kl(z, v).sum(), [z, v])
    expected = p * ((p / q).log() - kl_by_hand(p, q)[:, None])
    torch.testing.assert_close(for_z.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(for_v.double(), q - p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "l1", "l2", "cosine"])
def test_equal_outputs_have_no_distance_and_half_precision_none_lost(name: str, pair: tuple[Tensor, Tensor]) -> None:
    distance, (a, b) = getattr(losses, name), pair
    torch.testing.assert_close(distance(a, a), torch.zeros(5), rtol=0, atol=1e-6)
    half = distance(a.half(), b.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, distance(a.half().float(), b.half().float()), rtol=0, atol=0)


def test_the_divergence_stays_finite_for_certain_answers() -> None:
    z = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    value = losses.kl(z, z.detach().flip(0))
    value.sum().backward()
    assert value.tolist() == [1e4, 1e4]
    assert z.grad is not None
    assert z.grad.tolist() == [[1.0, -1.0], [-1.0, 1.0]]
