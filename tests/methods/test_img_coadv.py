"""ImgCoAdv. against its definition."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from torch import Tensor

from robustclip.methods import ImgCoAdv
from robustclip.types import Batch


def infonce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """``-log exp(cos(q_i, k_i) / tau) / sum_k exp(cos(q_i, k_k) / tau)`` per sample, term by term."""
    rows = []
    for i, query in enumerate(cases.unit(queries)):
        weights = [(query @ key / temperature).exp() for key in cases.unit(keys)]
        rows.append(-(weights[i] / sum(weights)).log())
    return torch.stack(rows)


def test_the_loss_is_infonce_of_attacked_images_among_clean_ones(tiny_model: Path) -> None:
    """With gradients into both sides."""
    method, data = cases.make(ImgCoAdv, tiny_model, temperature=0.2), cases.batch()

    def expected(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
        return infonce(cases.embed(twin, attacked), cases.embed(twin, clean), 0.2).mean()

    cases.assert_the_loss_is(method, data, expected)


def test_the_attack_maximises_infonce_against_clean_features_as_they_are(tiny_model: Path) -> None:
    method, data = cases.make(ImgCoAdv, tiny_model), cases.batch()

    def objective(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
        return infonce(cases.embed(twin, attacked), cases.embed(twin, clean).detach(), 0.07).sum()

    cases.assert_the_attack_maximises(method, data, objective)


def test_the_attack_depends_on_the_batch_through_the_negatives_alone(tiny_model: Path) -> None:
    method, data = cases.make(ImgCoAdv, tiny_model), cases.batch()
    with torch.no_grad():
        keys = method.image_features(data.images)

    def attacked(rows: slice) -> Tensor:
        part = Batch(*(column[rows] for column in data[:3]))
        own = torch.arange(4)[rows]
        return method.perturb(part, forward=lambda images: method.similarities(images, keys), targets=own)

    assert ((attacked(slice(2)) - attacked(slice(4))[:2]).abs() > 1e-6).float().mean() < 1e-2  # signs of rounding


def test_labels_are_not_used(tiny_model: Path) -> None:
    method, data = cases.make(ImgCoAdv, tiny_model), cases.batch()
    first = method.training_loss(data)["adversarial_infonce"]
    assert torch.equal(first, method.training_loss(data._replace(labels=data.labels + 100))["adversarial_infonce"])


def test_a_temperature_must_be_positive(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        ImgCoAdv(temperature=0, pretrained=str(tiny_model))
