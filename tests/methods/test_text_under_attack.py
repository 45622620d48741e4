"""A text side that learns from attacked images: its parameters move, and the attack meets its present state."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import text_cases
import torch
from helpers import quick_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import in_background
from text_cases import BothTowers, TrainedContext, sgd
from torch.nn import functional as F

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule
from robustclip.methods import CoOp, RobustMethod, TeCoA

BOX = PGD(eps="8/255", alpha="2/255", steps=3)


def count_texts(method: RobustMethod) -> list[bool]:
    """Lists, for every pass of the text tower from now on, whether it has a gradient."""
    passes: list[bool] = []
    method.clip.net.transformer.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    return passes


def by_hand(method: Any, images: torch.Tensor) -> torch.Tensor:
    """Zero-shot logits from the raw towers, with the method's context before the names."""
    tokens = method.context.tokenize(method.clip, cases.TASK.class_names)
    with method.context.inserted(method.clip):
        texts = cases.unit(method.clip.net.encode_text(torch.nn.functional.pad(tokens, (0, 16 - tokens.shape[1]))))
    return method.clip.net.logit_scale.exp() * cases.unit(cases.embed(method, images)) @ texts.T


def test_a_context_gets_the_gradient_of_the_loss_on_attacked_images(tiny_model: Path) -> None:
    method, data = cases.make(TrainedContext, tiny_model, attack=BOX), cases.batch()
    cases.assert_the_attack_maximises(
        method, data, lambda twin, _, attacked: cases.cross_entropy(by_hand(twin, attacked), data.labels).sum()
    )
    cases.assert_the_loss_is(
        method, data, lambda twin, _, attacked: cases.cross_entropy(by_hand(twin, attacked), data.labels).mean()
    )
    assert [name for name, parameter in method.named_parameters() if parameter.grad is not None] == ["context.vectors"]


def test_the_attack_sees_the_present_context_and_leaves_no_gradient(tiny_model: Path) -> None:
    method, data = cases.make(TrainedContext, tiny_model, attack=BOX), cases.batch()
    before = method.perturb(data)
    with torch.no_grad():
        method.context.vectors += torch.randn(method.context.vectors.shape, generator=torch.Generator().manual_seed(1))
    after = method.perturb(data)
    assert ((before - after).abs() > 1e-6).float().mean() > 0.05
    assert all(parameter.grad is None for parameter in method.parameters())
    assert method.context.vectors.requires_grad
    # The same images as an attack on a head that is encoded in every step.
    tokens = method.context.tokenize(method.clip, cases.TASK.class_names)
    live = method.perturb(
        data,
        forward=lambda images: (
            method.clip.logit_scale * method.image_features(images) @ method.context.encode(method.clip, tokens).T
        ),
    )
    torch.testing.assert_close(after, live, rtol=0, atol=0)


def test_texts_are_encoded_once_per_attack_if_they_learn_and_once_per_fit_if_not(tiny_model: Path) -> None:
    learning, fixed = cases.make(TrainedContext, tiny_model, attack=BOX), cases.make(TeCoA, tiny_model, attack=BOX)
    ours, theirs = count_texts(learning), count_texts(fixed)
    for _ in range(2):
        learning.training_loss(cases.batch())
        fixed.training_loss(cases.batch())
    assert (ours, theirs) == ([False, True] * 2, [])
    assert "train" in fixed.heads


def test_a_context_at_the_hand_prompt_attacks_as_a_frozen_text_does(tiny_model: Path) -> None:
    """A context whose start is the template gives the images of TeCoA."""
    ours = cases.make(TrainedContext, tiny_model, attack=BOX, phrase="This is a photo of a")
    theirs = cases.make(TeCoA, tiny_model, attack=BOX)
    task = cases.TASK.__class__(
        "train", cases.TASK.class_names, ("This is a photo of a {}.",)
    )  # a context writes a full stop
    theirs.prepare_training(task)
    found, expected = (method.training_loss(cases.batch())["adversarial_ce"] for method in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert ((ours.attack.images - theirs.attack.images).abs() > 1e-6).float().mean() < 1e-2


def test_both_towers_learn_under_attack(tiny_model: Path) -> None:
    method = BothTowers(pretrained=str(tiny_model), attack=BOX, warmup_steps=0, optimizer=sgd)
    before = {name: parameter.clone() for name, parameter in method.named_parameters()}
    cases.fit(method, steps=2, shots=1)
    still = [name for name, parameter in method.named_parameters() if torch.equal(parameter, before[name])]
    assert still == ["clip.net.logit_scale"]
    assert len(before) > 30


def test_a_context_learns_in_a_fit_that_resumes_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    first, resumed = (
        TrainedContext(pretrained=str(tiny_model), attack=BOX, warmup_steps=0, optimizer=sgd) for _ in range(2)
    )
    start, path = first.context.vectors.detach().clone(), tmp_path / "step=2.ckpt"
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    for method, source in ((first, None), (resumed, path)):
        trainer = quick_trainer(keep, enable_checkpointing=True, max_steps=4, limit_val_batches=0)
        trainer.fit(method, datamodule=CLIPDataModule("shapes:source", batch_size=4, image_size=32), ckpt_path=source)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert list(saved) == ["context.vectors"]
    assert torch.equal(resumed.context.vectors, first.context.vectors)
    assert not torch.equal(start, saved["context.vectors"])
    assert not torch.equal(saved["context.vectors"], first.context.vectors)
    assert cases.test(TrainedContext(pretrained=str(tiny_model)), path)["test/colours/n"] == 4


@pytest.mark.slow
def test_two_processes_train_the_context_as_one_does(tmp_path: Path) -> None:
    with in_background(Path(text_cases.__file__), tmp_path):
        whole = {name: text_cases.fit(name) for name in text_cases.CASES}
    for name, update in whole.items():
        first, second = (torch.load(tmp_path / f"{name}.{rank}.pt") for rank in (0, 1))
        assert torch.equal(first, second)
        assert update.norm() > 1e-3
        assert (first - update).norm() < 1e-5 * update.norm(), name


def test_clean_prompt_learning_uses_the_same_head(tiny_model: Path) -> None:
    method, data = cases.make(CoOp, tiny_model, tokens=4), cases.batch()
    expected = F.cross_entropy(by_hand(method, data.images), data.labels)
    torch.testing.assert_close(method.training_loss(data)["clean_ce"], expected, rtol=1e-5, atol=1e-6)


def test_pseudo_labels_of_a_head_that_learns_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="pseudo_labels must be false"):
        cases.make(BothTowers, tiny_model, pseudo_labels=True)


def test_a_part_with_the_name_of_a_method_is_refused(tiny_model: Path) -> None:
    method = TeCoA(pretrained=str(tiny_model))
    with pytest.raises(ValueError, match="'head' is a method of TeCoA"):
        method.head = torch.nn.Linear(2, 2)  # type: ignore[assignment,method-assign]
