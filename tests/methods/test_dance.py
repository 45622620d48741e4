"""DANCE's loss against its definition, and the bank of features that it remembers."""

import math
from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from unlabelled_cases import OPTIONS, Save, class_features, fitted, learnt, shapes

from robustclip.methods import DANCE
from robustclip.methods._shared.saved_state import with_digest
from robustclip.tools.interpolate import interpolate


def neighbours_by_hand(features: Tensor, classes: Tensor, index: Tensor, bank: Tensor, tau: float) -> Tensor:
    """``H(q_i)`` ``(B,)``: entries are found by their ids, the batch's own are the present ones, and 0 is no image."""
    entries = {number: row for number, row in enumerate(bank) if row.norm() > 0}
    entries |= dict(zip(index.tolist(), features, strict=True))
    entropies = []
    for i, feature in zip(index.tolist(), features, strict=True):
        others = [row for number, row in entries.items() if number != i]
        e = [(feature @ row / tau).exp() for row in [*others, *classes]]
        entropies.append(-sum(each / sum(e) * (each / sum(e)).log() for each in e))
    return torch.stack(entropies)


def separation_by_hand(p: Tensor, margin: float) -> Tensor:
    """``d_i`` ``(B,)``, 0 within the margin."""
    distances = [abs(-sum(x * x.log() for x in row) - math.log(len(row)) / 2) for row in p]
    return torch.stack([d if d > margin else 0 * d for d in distances])


def neighbourhood(tiny_model: Path, **kwargs: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A method with a bank of 8 ids, of which 5 has no image; features of three ids; classes. In fp64."""
    generator = torch.Generator().manual_seed(4)
    bank, features, classes = (
        cases.unit(torch.randn(count, 16, generator=generator, dtype=torch.float64)) for count in (8, 3, 4)
    )
    bank[5] = 0
    method = cases.make(DANCE, tiny_model, **kwargs)
    method.bank = bank
    return method, features.requires_grad_(), classes.requires_grad_(), torch.tensor([6, 0, 3])


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_neighbours_are_all_others_and_the_classes(tau: float, tiny_model: Path) -> None:
    method, features, classes, index = neighbourhood(tiny_model, temperature=tau)
    log_q = method.log_neighbours(features, classes, index)
    expected = neighbours_by_hand(features, classes, index, method.bank, tau)
    torch.testing.assert_close(-(log_q.exp() * log_q).sum(1), expected, rtol=1e-10, atol=1e-12)
    assert (log_q.exp()[range(3), index] == 0).all()
    assert (log_q.exp()[:, 5] == 0).all()
    found, wanted = (torch.autograd.grad(loss.sum(), (features, classes)) for loss in (-log_q.exp() * log_q, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_certain_and_uniform_answers_are_far_from_the_middle_and_others_do_not_count(tiny_model: Path) -> None:
    """In eight classes ``log(C) / 2 = 1.04``; two or four equal answers are 0.35 away from it, within the margin."""
    method = cases.make(DANCE, tiny_model)
    rows = [[1 / count if c < count else 0 for c in range(8)] for count in (1, 2, 4, 8)]
    log_p = (torch.tensor(rows).double() + 1e-30).log().requires_grad_()
    found = method.separation(log_p)
    assert found.item() == pytest.approx(2 * math.log(8) / 2 / 4, abs=1e-12)
    (gradient,) = torch.autograd.grad(found, log_p)
    assert gradient.isfinite().all()
    assert (gradient[1:3] == 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"margin": 0.05}, {"temperature": 0.01, "margin": 0.0, "weight": 2.0}, {"learns": "context"}]
)
def test_the_step_is_that_of_the_definition(options: dict[str, Any], tiny_model: Path) -> None:
    method, data = cases.make(DANCE, tiny_model, **options), cases.batch()
    bank, given = method.bank.double(), {"temperature": 0.05, "margin": 0.5, "weight": 0.05} | options

    def expected(twin: Any, images: Tensor, _: Tensor) -> Tensor:
        features, classes = cases.unit(cases.embed(twin, images)), class_features(twin)
        p = (twin.clip.net.logit_scale.exp() * features @ classes.T).softmax(1)
        clustering = neighbours_by_hand(features, classes, data.index, bank, given["temperature"])
        return given["weight"] * (clustering - separation_by_hand(p, given["margin"])).mean()

    cases.assert_the_loss_is(method, data, expected)


def test_gradients_are_finite_where_all_features_are_alike(tiny_model: Path) -> None:
    method, _, classes, index = neighbourhood(tiny_model, temperature=1e-3)
    features = classes[:1].detach().expand(3, -1).float().requires_grad_()
    method.bank = method.bank.float()
    log_q = method.log_neighbours(features, classes.float(), index)
    (gradient,) = torch.autograd.grad((log_q.exp() * log_q).sum(), features)
    assert gradient.isfinite().all()


def test_a_step_remembers_its_batch_alone(tiny_model: Path) -> None:
    method, data = cases.make(DANCE, tiny_model), cases.batch()
    before = method.bank.clone()
    method.training_loss(data)
    assert not method.bank.requires_grad
    assert torch.equal(method.bank[data.index], method.image_features(data.images).detach())
    others = [number for number in range(100) if number not in data.index]
    assert torch.equal(method.bank[others], before[others])


class FirstBank(Callback):
    """Keeps the bank before the first step."""

    def on_train_start(self, trainer: object, pl_module: DANCE) -> None:
        self.bank = pl_module.bank


def test_the_bank_starts_with_whole_images_as_the_pretrained_model_sees_them() -> None:
    first, pretrained, data = FirstBank(), DANCE().eval(), shapes()
    last = fitted(DANCE(**OPTIONS), first, is_augmented=True).bank
    data.setup("fit")
    seen: list[int] = []
    with torch.no_grad():
        for batch in data.plain_train_dataloader():
            expected = cases.unit(cases.embed(pretrained, batch.images))
            torch.testing.assert_close(first.bank[batch.index], expected, rtol=0, atol=1e-6)
            seen += batch.index.tolist()
    assert torch.where(first.bank.any(1))[0].tolist() == sorted(seen)
    assert len(seen) == 5 * 28
    assert (first.bank != last).any(1).sum() == 4 * 8  # steps and images of each


def test_a_resumed_fit_has_the_bank_and_the_end_of_an_uninterrupted_one(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    whole = fitted(DANCE(weight=5.0, **OPTIONS), Save(path))
    resumed = fitted(DANCE(weight=5.0, **OPTIONS), ckpt_path=path)
    assert torch.equal(resumed.bank, whole.bank)
    assert torch.equal(learnt(resumed), learnt(whole))
    content = torch.load(path, weights_only=False)
    del content["bank"]  # it is then built anew, which is another end
    torch.save(with_digest(content), path)
    rebuilt = fitted(DANCE(weight=5.0, **OPTIONS), ckpt_path=path)
    assert not torch.equal(rebuilt.bank, whole.bank)
    assert not torch.equal(learnt(rebuilt), learnt(whole))


def test_the_models_between_two_have_no_bank(tmp_path: Path) -> None:
    fitted(DANCE(**OPTIONS)).trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "bank" in torch.load(tmp_path / "a.ckpt", weights_only=True)
    (path,) = interpolate(DANCE(**OPTIONS), tmp_path / "a.ckpt", tmp_path / "out", alphas=(0.5,))
    assert "bank" not in torch.load(path, weights_only=True)


def test_another_fit_of_the_same_method_starts_its_own_bank() -> None:
    method, banks = DANCE(**OPTIONS), (FirstBank(), FirstBank())
    for each in banks:
        fitted(method, each)
    assert torch.equal(banks[0].bank, banks[1].bank)


def test_defaults_are_the_papers_and_a_temperature_is_positive(tiny_model: Path) -> None:
    method = DANCE(pretrained=str(tiny_model))
    assert (method.temperature, method.margin, method.weight, method.takes_unknown) == (0.05, 0.5, 0.05, True)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        DANCE(pretrained=str(tiny_model), temperature=0)
