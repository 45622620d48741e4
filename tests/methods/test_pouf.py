"""POUF's loss against its definition."""

import math
from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from torch import Tensor
from unlabelled_cases import class_features

from robustclip.methods import POUF


def loss_by_hand(cosines: Tensor, scale: Tensor, *, infomax: float = 0.3) -> Tensor:
    """Transport from images to classes and from classes to images, and InfoMax, number by number."""
    batch, classes = cosines.shape
    e = (scale * cosines).exp()
    loss = cosines.new_zeros(())
    for i in range(batch):
        for c in range(classes):
            loss = loss + e[i, c] / sum(e[i]) * (1 - cosines[i, c]) / batch
            loss = loss + e[i, c] / sum(e[:, c]) * (1 - cosines[i, c]) / classes
            loss = loss - infomax * e[i, c] / sum(e[i]) * (e[i, c] / sum(e[i])).log() / batch
    for c in range(classes):
        share = sum(e[i, c] / sum(e[i]) for i in range(batch)) / batch
        loss = loss + infomax * share * share.log()
    return loss


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize("infomax", [0.3, 1.0, 0.0])
def test_the_loss_and_its_gradient_are_those_of_the_double_sums(infomax: float, tiny_model: Path) -> None:
    cosines = torch.rand(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    cosines.requires_grad_()
    method = cases.make(POUF, tiny_model, infomax_weight=infomax)
    found = total(method.transport_and_infomax(cosines))
    expected = loss_by_hand(cosines, method.clip.logit_scale.double(), infomax=infomax)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(loss, cosines) for loss in (found, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"infomax_weight": 0.0}, {"learns": "norms"}, {"classes_per_pass": 2}])
def test_the_step_is_that_of_the_definition(options: dict[str, Any], tiny_model: Path) -> None:
    method = cases.make(POUF, tiny_model, **options)

    def expected(twin: Any, images: Tensor, _: Tensor) -> Tensor:
        cosines = cases.unit(cases.embed(twin, images)) @ class_features(twin).T
        return loss_by_hand(cosines, twin.clip.net.logit_scale.exp(), infomax=options.get("infomax_weight", 0.3))

    cases.assert_the_loss_is(method, cases.batch(), expected)


def test_certain_answers_cost_their_distance() -> None:
    """Both softmaxes are one-hot: 2 (1 - 0.9), and InfoMax is minus the entropy of three equal classes."""
    method = POUF()
    method.clip.net.logit_scale.data.fill_(math.log(1000))
    with torch.no_grad():
        terms = method.transport_and_infomax(1.8 * torch.eye(3).double() - 0.9)
    assert terms["transport"] == pytest.approx(0.2, abs=1e-12)
    assert terms["entropy"] == pytest.approx(0, abs=1e-12)
    assert terms["marginal_entropy"] == pytest.approx(-0.3 * math.log(3), abs=1e-12)


@pytest.mark.parametrize("scale", [100.0, 1e6])
def test_extreme_logits_have_finite_gradients(scale: float, tiny_model: Path) -> None:
    method = cases.make(POUF, tiny_model)
    method.clip.net.logit_scale.data.fill_(math.log(scale))
    cosines = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 1.0, 1.0]], requires_grad=True)
    total(method.transport_and_infomax(cosines)).backward()
    assert cosines.grad is not None
    assert cosines.grad.isfinite().all()


def test_the_default_weight_is_the_authors(tiny_model: Path) -> None:
    method = POUF(pretrained=str(tiny_model))
    assert (method.infomax_weight, method.context_lr, method.takes_unknown) == (0.3, 1e-4, True)
