"""CAW's training step against the worked numbers of its specification, and its limits."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from torch import Tensor, tensor

from robustclip.attacks import PGD
from robustclip.methods import CAW, TeCoA
from robustclip.objectives.losses import kl, reverse_kl
from robustclip.types import Batch

LOGITS, ORIGINAL = [[2, 1, 0], [0.5, 1.5, 1]], [[3, 0.5, 0], [0, 1, 2]]
FEATURES, ORIGINAL_FEATURES = [[0.6, 0.8], [1, 0]], [[0.8, 0.6], [0.96, 0.28]]
NONE = PGD(eps=0.0, alpha=0.0, steps=0, random_start=False)
CLEAN, ATTACKED = (Batch(torch.full((2, 3, 4, 4), value), tensor([0, 2]), tensor([0, 1])) for value in (0.2, 0.7))


class Given(CAW):
    """CAW whose features are given: three numbers that are the logits, or two that are features."""

    given: Tensor

    def image_features(self, images: Tensor) -> Tensor:
        return self.given

    def perturb(self, *args: Any, **kwargs: Any) -> Tensor:
        return ATTACKED.images


def fp64(values: Any) -> Tensor:
    return tensor(values, dtype=torch.float64)


def step(model: Path, given: Any, clean: Any, attacked: Any, **options: Any) -> tuple[dict[str, float], Tensor, Any]:
    """Returns all terms, the gradient of the last one in what is given, and the method."""
    method: Any = Given(pretrained=str(model), attack=NONE, **options).double()
    method.clip.net.logit_scale.data.zero_()
    method.given = fp64(given).requires_grad_()
    if method.teacher is not None:
        method.teacher.encode_image = lambda images: fp64(clean if images is CLEAN.images else attacked)
    method.heads["train"] = torch.eye(method.given.shape[1], dtype=torch.float64)
    if method.given.shape[1] == 2:  # the labels go up to 2
        method.heads["train"] = torch.cat([torch.eye(2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)])
    terms = method.training_loss(CLEAN)
    (gradient,) = torch.autograd.grad([*terms.values()][-1], method.given)
    return {name: float(term.detach()) for name, term in terms.items()}, gradient, method


@pytest.mark.parametrize("is_detached", [False, True])
def test_the_divergence_weighs_unsure_images_most(tiny_model: Path, is_detached: bool) -> None:
    terms, gradient, _ = step(tiny_model, LOGITS, ORIGINAL, LOGITS, alpha=2.0, beta=0.0, detach_weight=is_detached)
    assert terms == pytest.approx({"adversarial_ce": 0.7939378176, "confidence": 2 * 0.1213528394}, abs=1e-9)
    expected = {
        False: [[-0.0702062424, 0.0568331369, 0.0133731055], [0.0373691427, 0.1015798614, -0.1389490041]],
        True: [[-0.0508996319, 0.0427188737, 0.0081807582], [0.0297409797, 0.0808443646, -0.1105853443]],
    }[is_detached]
    torch.testing.assert_close(gradient / 2, fp64(expected), rtol=0, atol=1e-9)


def test_divergences_and_weights_in_both_directions() -> None:
    logits, original = fp64(LOGITS), fp64(ORIGINAL)
    torch.testing.assert_close(reverse_kl(logits, original), fp64([0.1733902737, 0.2665424652]), rtol=0, atol=1e-9)
    torch.testing.assert_close(kl(logits, original), fp64([0.1309643573, 0.2705251399]), rtol=0, atol=1e-9)


def test_the_other_direction_is_the_other_order(tiny_model: Path) -> None:
    terms, _, _ = step(tiny_model, LOGITS, ORIGINAL, LOGITS, beta=0.0, kl_direction="forward")
    expected = (0.1309643573 * 0.3347590442 + 0.2705251399 * 0.6928041143) / 2
    assert terms["confidence"] == pytest.approx(expected, abs=1e-9)


def test_features_are_pulled_by_their_distance(tiny_model: Path) -> None:
    terms, gradient, _ = step(tiny_model, FEATURES, FEATURES, ORIGINAL_FEATURES, alpha=0.0, beta=0.5)
    assert terms["feature_pull"] == pytest.approx(0.5 * 0.2828427125, abs=1e-9)
    expected = [[-0.3535533906, 0.3535533906], [0.0707106781, -0.4949747468]]
    torch.testing.assert_close(2 * gradient, fp64(expected), rtol=0, atol=1e-9)


def test_all_terms_add_up(tiny_model: Path) -> None:
    pull, _, _ = step(tiny_model, FEATURES, FEATURES, ORIGINAL_FEATURES, alpha=0.0, beta=0.5)
    rest, _, _ = step(tiny_model, LOGITS, ORIGINAL, LOGITS, alpha=2.0, beta=0.0)
    assert sum(rest.values()) + pull["feature_pull"] == pytest.approx(1.1780648526, abs=1e-9)


def test_equal_features_give_0_and_a_gradient_of_0(tiny_model: Path) -> None:
    terms, gradient, _ = step(tiny_model, LOGITS, LOGITS, LOGITS)
    assert (terms["confidence"], terms["feature_pull"]) == (pytest.approx(0, abs=1e-15), 0)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    _, gradient, _ = step(tiny_model, LOGITS, LOGITS, LOGITS, beta=0.0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_a_certain_image_weighs_nothing_and_large_logits_are_finite(tiny_model: Path) -> None:
    certain = [[90.0, 0, -5], [0, -5, 90]]
    terms, gradient, _ = step(tiny_model, certain, [[0.0, 90, 0], [90, 0, 0]], certain, beta=0.0)
    assert terms["confidence"] == pytest.approx(0, abs=1e-9)
    assert gradient.isfinite().all()


def test_weights_of_0_are_tecoa_bit_for_bit(tiny_model: Path) -> None:
    def weights(method: TeCoA) -> dict[str, Tensor]:
        cases.fit(method, steps=3, shots=1)
        return dict(method.named_parameters())

    bold: dict[str, Any] = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
    ours = weights(CAW(pretrained=str(tiny_model), alpha=0.0, beta=0.0, **bold))
    theirs = weights(TeCoA(pretrained=str(tiny_model), **bold))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_attack_is_tecoas_and_the_terms_are_of_the_attacked_and_clean_images(tiny_model: Path) -> None:
    data = cases.batch()
    ours, theirs = cases.make(CAW, tiny_model), cases.make(TeCoA, tiny_model)
    terms, expected = ours.training_loss(data), theirs.training_loss(data)
    assert torch.equal(ours.attack.images, theirs.attack.images)
    assert torch.equal(terms["adversarial_ce"], expected["adversarial_ce"])
    scale, head = ours.clip.logit_scale, ours.head().T
    attacked, clean = ours.image_features(ours.attack.images), ours.teacher.encode_image(data.images)
    p, q = (scale * attacked @ head).softmax(1).double(), (scale * clean @ head).softmax(1).double()
    weighted = (p * (p / q).log()).sum(1) * (1 - p[range(4), data.labels])
    assert float(terms["confidence"].detach()) == pytest.approx(float(weighted.mean().detach()), rel=1e-4)
    distance = (attacked - ours.teacher.encode_image(ours.attack.images)).square().sum(1).sqrt().mean()
    torch.testing.assert_close(terms["feature_pull"], distance)
    order = torch.tensor([2, 0, 3, 1])
    permuted = ours.training_loss(Batch(*(part[order] for part in data[:3])))
    for name, term in permuted.items():
        torch.testing.assert_close(term, terms[name], rtol=1e-4, atol=1e-6)


def test_the_student_may_be_its_own_reference(tiny_model: Path) -> None:
    method, data = cases.make(CAW, tiny_model, reference="student", beta=0.0), cases.batch()
    assert method.teacher is None
    terms = method.training_loss(data)
    p, q = (method.logits(images).softmax(1).double() for images in (method.attack.images, data.images))
    weighted = (p * (p / q).log()).sum(1) * (1 - p[range(4), data.labels])
    assert float(terms["confidence"].detach()) == pytest.approx(float(weighted.mean().detach()), rel=1e-4)


def test_a_negative_weight_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        CAW(pretrained=str(tiny_model), beta=-1.0)
