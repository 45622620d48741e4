"""TRADES against its definition (https://arxiv.org/abs/1901.08573)."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
from torch import Tensor

from robustclip.methods import TRADES


def divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """``sum_c p_c log(p_c / q_c)`` per sample, with ``p`` of clean and ``q`` of attacked logits."""
    p, q = clean.softmax(1), attacked.softmax(1)
    return (p * (p / q).log()).sum(1)


def test_the_loss_is_clean_cross_entropy_and_beta_times_the_divergence(tiny_model: Path) -> None:
    """With gradients into both sides of the divergence."""
    method, data = cases.make(TRADES, tiny_model, beta=3.0), cases.batch()

    def expected(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
        z, z_attacked = cases.logits(twin, clean), cases.logits(twin, attacked)
        return cases.cross_entropy(z, data.labels).mean() + 3.0 * divergence(z, z_attacked).mean()

    cases.assert_the_loss_is(method, data, expected)


def test_the_attack_maximises_the_divergence(tiny_model: Path) -> None:
    method, data = cases.make(TRADES, tiny_model), cases.batch()

    def objective(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
        return divergence(cases.logits(twin, clean).detach(), cases.logits(twin, attacked)).sum()

    cases.assert_the_attack_maximises(method, data, objective)


def test_the_attack_does_not_depend_on_the_batch(tiny_model: Path) -> None:
    cases.assert_the_attack_does_not_depend_on_the_batch(cases.make(TRADES, tiny_model), cases.batch())


def test_the_default_weight_is_the_papers(tiny_model: Path) -> None:
    assert TRADES(pretrained=str(tiny_model)).beta == 6.0


def test_a_negative_weight_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        TRADES(beta=-1, pretrained=str(tiny_model))
