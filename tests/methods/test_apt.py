"""APT's strategies of attack; test_text_under_attack.py has what holds for every text side that learns."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from test_text_under_attack import BOX, by_hand
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks import PGD
from robustclip.methods import APT, TeCoA
from robustclip.types import Task

PHRASE = "This is a photo of a"


def attacked(method: Any) -> Tensor:
    method.training_loss(cases.batch())
    images: Tensor = method.attack.images
    return images


def share_that_differs(one: Tensor, other: Tensor) -> float:
    return float(((one - other).abs() > 1e-6).float().mean())


def moved(method: Any) -> Any:
    """The method with another context than that of its start."""
    with torch.no_grad():
        method.context.vectors += torch.randn(method.context.vectors.shape, generator=torch.Generator().manual_seed(1))
    return method


def test_value_gradient_and_attack_are_those_of_the_present_context(tiny_model: Path) -> None:
    data = cases.batch()
    for check, reduce in (
        (cases.assert_the_loss_is, torch.mean),
        (cases.assert_the_attack_maximises, torch.sum),
    ):
        method = moved(cases.make(APT, tiny_model, attack=BOX, phrase=PHRASE))
        check(method, data, lambda twin, _, x, r=reduce: r(cases.cross_entropy(by_hand(twin, x), data.labels)))
    names = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    assert names == ["context.vectors"]


def test_a_constant_prompt_is_attacked_whatever_the_context(tiny_model: Path) -> None:
    ours = cases.make(APT, tiny_model, attack=BOX, phrase=PHRASE, strategy="constant", hand_prompt=f"{PHRASE} {{}}.")
    other = cases.make(APT, tiny_model, attack=BOX, phrase=PHRASE)
    assert share_that_differs(attacked(ours), attacked(other)) < 0.01
    before = attacked(moved(ours))
    assert torch.equal(before, attacked(moved(ours)))
    assert share_that_differs(before, attacked(moved(other))) > 0.05
    theirs = cases.make(TeCoA, tiny_model, attack=BOX)
    theirs.prepare_training(Task("train", cases.TASK.class_names, (f"{PHRASE} {{}}.",)))
    assert share_that_differs(before, attacked(theirs)) < 0.01


def test_a_perturbed_prompt_moves_with_the_images(tiny_model: Path) -> None:
    method = moved(cases.make(APT, tiny_model, attack=BOX, phrase=PHRASE, strategy="perturbed", prompt_alpha=3.0))
    data, twin, before = cases.batch(), cases.in_fp64(method), method.context.vectors.detach().clone()
    found, x = attacked(method), data.images.double()
    assert torch.equal(method.context.vectors, before)
    assert all(parameter.grad is None for parameter in method.parameters())
    start = PGD(eps=BOX.eps, steps=0)
    delta = start(data.images, lambda images: images, data.labels, index=data.index, seed=0).double() - x
    for _ in range(BOX.steps):
        delta = delta.detach().requires_grad_()
        losses = cases.cross_entropy(by_hand(twin, x + delta), data.labels)
        of_images, of_text = torch.autograd.grad(losses.mean(), (delta, twin.context.vectors))
        delta = (delta + BOX.alpha * of_images.sign()).clamp(-BOX.eps, BOX.eps)
        delta = torch.minimum(torch.maximum(delta, -x), 1 - x)
        twin.context.vectors.data += 3.0 * of_text
    assert share_that_differs(found, (x + delta).float()) < 0.01
    fixed = moved(cases.make(APT, tiny_model, attack=BOX, phrase=PHRASE))
    assert share_that_differs(found, attacked(fixed)) > 0.02


def test_a_perturbed_prompt_that_takes_no_step_is_the_present_one(tiny_model: Path) -> None:
    still = cases.make(APT, tiny_model, attack=BOX, tokens=4, strategy="perturbed", prompt_alpha=0.0)
    onfly = cases.make(APT, tiny_model, attack=BOX, tokens=4)
    assert share_that_differs(attacked(still), attacked(onfly)) < 0.01
    loss = still.training_loss(cases.batch())["adversarial_ce"]
    torch.testing.assert_close(
        loss, F.cross_entropy(still.logits(still.attack.images), cases.batch().labels), rtol=0, atol=0
    )


@pytest.mark.parametrize("strategy", ["constant", "perturbed"])
def test_a_fit_trains_the_context_alone(strategy: str, tiny_model: Path, tmp_path: Path) -> None:
    method = APT(pretrained=str(tiny_model), tokens=4, attack=BOX, strategy=strategy, warmup_epochs=0)
    start = method.context.vectors.detach().clone()
    trainer = cases.fit(method, steps=2, shots=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert list(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == ["context.vectors"]
    assert not torch.equal(start, method.context.vectors)
    assert cases.test(APT(pretrained=str(tiny_model), tokens=4), tmp_path / "a.ckpt")["test/colours/n"] == 4
