"""Losses per sample against their formulas, written out."""

import math

import pytest
import torch
from torch import Tensor

import robustclip.attacks
import robustclip.attacks.attack
from robustclip.attacks.sample_losses import (
    LOSSES,
    cross_entropy,
    dlr,
    margin,
    predicted,
    select_loss,
    targeted_dlr,
    targeted_margin,
)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.arange(20) % 5
    return 3 * torch.randn(20, 5), labels, (labels + 1 + torch.arange(20) // 5) % 5


def test_losses_equal_their_formulas() -> None:
    logits, labels, targets = batch()
    for row, (z, y, t) in enumerate(zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True)):
        highest = sorted(z, reverse=True)
        wrong = max(value for number, value in enumerate(z) if number != y)
        expected = {
            cross_entropy: math.log(sum(math.exp(value) for value in z)) - z[y],
            margin: wrong - z[y],
            dlr: (wrong - z[y]) / (highest[0] - highest[2] + 1e-12),
        }
        for loss, value in expected.items():
            assert loss(logits, labels)[row] == pytest.approx(value, abs=1e-5)
        assert targeted_margin(logits, labels, targets)[row] == pytest.approx(z[t] - z[y], abs=1e-6)
        spread = highest[0] - (highest[2] + highest[3]) / 2 + 1e-12
        assert targeted_dlr(logits, labels, targets)[row] == pytest.approx((z[t] - z[y]) / spread, abs=1e-5)


def test_the_margin_is_positive_exactly_where_the_model_errs() -> None:
    logits, labels, _ = batch()
    assert torch.equal(margin(logits, labels) > 0, logits.argmax(1) != labels)


def test_a_label_that_shares_the_largest_logit_is_not_predicted() -> None:
    logits, labels, _ = batch()
    assert torch.equal(predicted(logits, labels), logits.argmax(1))
    tied = torch.tensor(
        [[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [torch.inf, torch.inf, 0.0]]
    )
    assert predicted(tied, torch.tensor([0, 1, 0, 0, 0])).tolist() == [1, 0, 0, 2, 1]
    close = torch.tensor([[1.0, 1.0 + 1e-15]], dtype=torch.float64)  # equal in fp32
    assert predicted(close, torch.tensor([1])).tolist() == [1]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_computed_in_fp32(name: str) -> None:
    logits, labels, _ = batch()
    halves = logits.to(torch.bfloat16)
    assert LOSSES[name](halves, labels).dtype == torch.float32
    assert torch.equal(LOSSES[name](halves, labels), LOSSES[name](halves.float(), labels))


@pytest.mark.parametrize("name", LOSSES)
def test_constant_logits_give_finite_losses_and_gradients(name: str) -> None:
    logits = torch.zeros(3, 5, requires_grad=True)
    value = LOSSES[name](logits, torch.arange(3))
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_dlr_does_not_change_with_scale_and_shift() -> None:
    logits, labels, targets = batch()
    torch.testing.assert_close(dlr(7 * logits + 3, labels), dlr(logits, labels), atol=1e-4, rtol=1e-4)
    expected = targeted_dlr(logits, labels, targets)
    torch.testing.assert_close(targeted_dlr(7 * logits + 3, labels, targets), expected, atol=1e-4, rtol=1e-4)


def test_dlr_refuses_too_few_classes_and_the_margin_takes_its_place() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="DLR needs at least 3 classes, got 2; use loss='margin'"):
        dlr(torch.randn(2, 2), labels)
    with pytest.raises(ValueError, match="targeted DLR needs at least 4 classes, got 3"):
        targeted_dlr(torch.randn(2, 3), labels, labels)
    assert select_loss("dlr", 2) == ("margin", "2 classes: the margin instead of DLR")
    assert select_loss("dlr", 3, is_targeted=True)[0] == "margin"
    assert select_loss("dlr", 3) == ("dlr", "")
    assert select_loss("ce", 2) == ("ce", "")


def test_cross_entropy_is_one_function_wherever_it_is_imported_from() -> None:
    assert robustclip.attacks.cross_entropy is robustclip.attacks.attack.cross_entropy is cross_entropy
