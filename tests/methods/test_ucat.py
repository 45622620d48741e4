"""UCAT's training step against the worked numbers of its specification, made with the authors' code, and its limits."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from torch import Tensor, tensor

from robustclip.attacks import PGD
from robustclip.methods import UCAT, TeCoA
from robustclip.objectives.losses import dirichlet_kl, evidence, kl
from robustclip.types import Batch

COSINES = [[0.20, 0.25, 0.15], [0.10, 0.22, 0.24]]
ORIGINAL = [[0.28, 0.22, 0.18], [0.12, 0.20, 0.30]]
NONE = PGD(eps=0.0, alpha=0.0, steps=0, random_start=False)


class Given(UCAT):
    """UCAT whose cosines are given: features are the cosines, and the head is the identity."""

    cosines: Tensor

    def image_features(self, images: Tensor) -> Tensor:
        return self.cosines


def step(model: Path, cosines: Any = COSINES, *, scale: float = 100.0, **options: Any) -> tuple[Any, Tensor]:
    """Returns both terms, and the gradient of their sum in the cosines."""
    method: Any = Given(pretrained=str(model), attack=NONE, **options).double()
    method.clip.net.logit_scale.data.fill_(torch.tensor(scale, dtype=torch.float64).log())
    method.cosines = tensor(cosines, dtype=torch.float64).requires_grad_()
    method.teacher.encode_image = lambda _: tensor(ORIGINAL, dtype=torch.float64)
    method.heads["train"] = torch.eye(3, dtype=torch.float64)
    terms = method.training_loss(Batch(torch.rand(2, 3, 4, 4), tensor([0, 2]), tensor([0, 1])))
    (gradient,) = torch.autograd.grad(sum(terms.values()), method.cosines)
    return {name: float(term.detach()) for name, term in terms.items()}, gradient


@pytest.mark.parametrize(("form", "tolerance"), [("dirichlet", 1e-8), ("evidence", 3e-8)])
def test_the_papers_setting(tiny_model: Path, form: str, tolerance: float) -> None:
    terms, gradient = step(tiny_model, form=form)
    assert terms["adversarial_ce"] == pytest.approx(2.5668445935, abs=1e-9)
    assert terms["evidence"] == pytest.approx(1.0623473264, abs=tolerance)
    expected = tensor(
        [[-62.5544904, 62.7723349, -0.2178448], [0.5828391, 15.1865306, -15.7693698]], dtype=torch.float64
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


def test_the_form_of_the_evidence_differs_at_a_high_temperature(tiny_model: Path) -> None:
    exact, gradient = step(tiny_model, form="dirichlet", temperature=0.5, weight=10.0)
    leading, _ = step(tiny_model, temperature=0.5, weight=10.0)
    assert sum(exact.values()) == pytest.approx(2.5882550, abs=1e-7)
    assert sum(leading.values()) == pytest.approx(2.5871522, abs=1e-7)
    expected = tensor([[-49.9150530, 49.9181196, -0.0145255], [0.0032114, 6.1377730, -6.1489110]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


def test_the_term_of_the_original_cosines_is_0(tiny_model: Path) -> None:
    for form in ("evidence", "dirichlet"):
        terms, _ = step(tiny_model, ORIGINAL, form=form)
        assert terms["adversarial_ce"] == pytest.approx(0.0012831930, abs=1e-9)
        assert terms["evidence"] == pytest.approx(0, abs=1e-8)


def test_the_logit_scale_changes_the_cross_entropy_alone(tiny_model: Path) -> None:
    terms, _ = step(tiny_model, scale=10.0)
    assert terms == pytest.approx({"adversarial_ce": 0.9527792926, "evidence": 1.0623473264}, abs=3e-8)


def test_the_forward_direction(tiny_model: Path) -> None:
    terms, _ = step(tiny_model, form="forward")
    assert terms["evidence"] == pytest.approx((0.9802220094 + 0.4941333044) / 2, abs=1e-8)


def test_more_evidence_of_the_student_changes_nothing(tiny_model: Path) -> None:
    more = [[value + 0.05 for value in row] for row in COSINES]
    terms, _ = step(tiny_model, more, form="dirichlet")
    assert terms["evidence"] == pytest.approx((1.4140228354 + 0.7106718070) / 2, abs=1e-8)


def test_levels_and_divergences() -> None:
    cosines, original = (tensor(values, dtype=torch.float64) for values in (COSINES, ORIGINAL))
    level = 1e5 * evidence(original, 0.07)
    torch.testing.assert_close(level, tensor([5.6771529949, 5.9749818046], dtype=torch.float64), rtol=1e-9, atol=0)
    found = kl(cosines / 0.07, original / 0.07)
    torch.testing.assert_close(found, tensor([0.2490725238, 0.1189412490], dtype=torch.float64), rtol=1e-9, atol=0)
    exact = dirichlet_kl(cosines, original, 0.07)
    torch.testing.assert_close(exact, tensor([36213474.4786, 18200480.5794], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("classes", [10, 200, 1000])
def test_both_forms_agree_at_the_papers_temperature(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    cosines, original = (
        0.2 + 0.03 * torch.randn(4, classes, generator=generator, dtype=torch.float64) for _ in range(2)
    )

    def ratio(tau: float) -> Tensor:
        leading = evidence(original, tau) * kl(cosines / tau, original / tau)
        return dirichlet_kl(cosines, original, tau) / (1 + tensor(2 / tau).double().exp()) / leading

    assert (ratio(0.07) - 1).abs().max() < 1e-6
    assert ((ratio(0.5) > 1.04) & (ratio(0.5) < 1.08)).all()
    assert (evidence(original, 0.01) * kl(cosines / 0.01, original / 0.01)).isfinite().all()
    if classes == 200:
        assert float(1e5 * evidence(original, 0.07).mean()) == pytest.approx(239, rel=0.1)


def test_a_weight_of_0_is_tecoa_bit_for_bit(tiny_model: Path) -> None:
    def weights(method: TeCoA) -> dict[str, Tensor]:
        cases.fit(method, steps=3, shots=1)
        return dict(method.named_parameters())

    bold: dict[str, Any] = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
    ours = weights(UCAT(pretrained=str(tiny_model), weight=0.0, **bold))
    theirs = weights(TeCoA(pretrained=str(tiny_model), **bold))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_term_is_not_attacked_and_its_level_can_be_a_constant(tiny_model: Path) -> None:
    data = cases.batch()
    ours, theirs = cases.make(UCAT, tiny_model, level=3.0), cases.make(TeCoA, tiny_model)
    terms, expected = ours.training_loss(data), theirs.training_loss(data)
    assert torch.equal(ours.attack.images, theirs.attack.images)
    assert torch.equal(terms["adversarial_ce"], expected["adversarial_ce"])
    cosines, original = (
        features.double() @ ours.head().double().T / 0.07
        for features in (ours.image_features(ours.attack.images), ours.teacher.encode_image(data.images))
    )
    torch.testing.assert_close(terms["evidence"], 3 * kl(cosines, original).mean(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "dirichlet", "level": 3.0}, "level must be null for the form dirichlet, got 3"),
        ({"form": "forward", "temperature": 0.002}, "temperature must be at least 0.003 for the form forward"),
        ({"weight": -1.0}, "weight must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused(tiny_model: Path, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UCAT(pretrained=str(tiny_model), **options)
