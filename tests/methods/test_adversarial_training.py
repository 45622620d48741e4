"""Adv. and CoAdv. against their definitions: a classifier that learns, is attacked, and is thrown away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from torch import Tensor

from robustclip.methods import AdversarialTraining
from robustclip.types import Batch


def per_sample(head: str, data: Batch) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Cross-entropy of ``W f(x') + b``, or of ``s cos(W f(x'), e_c)`` with one-hot vectors written out."""

    def loss(twin: Any, _: Tensor, attacked: Tensor) -> Tensor:
        mapped = cases.embed(twin, attacked) @ twin.classifier.weight.T
        if head == "linear":
            return cases.cross_entropy(mapped + twin.classifier.bias, data.labels)
        one_hot = torch.eye(3, dtype=torch.float64)
        cosines = torch.stack([cases.unit(mapped) @ one_hot[c] for c in range(3)], dim=1)
        return cases.cross_entropy(twin.clip.net.logit_scale.exp() * cosines, data.labels)

    return loss


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_the_loss_is_cross_entropy_of_the_classifier_on_attacked_images(head: str, tiny_model: Path) -> None:
    method, data = cases.make(AdversarialTraining, tiny_model, head=head), cases.batch()
    cases.assert_the_loss_is(method, data, lambda *given: per_sample(head, data)(*given).mean())
    assert method.classifier.weight.grad is not None
    assert (method.classifier.bias is None) == (head == "cosine")


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_the_attack_goes_through_the_classifier(head: str, tiny_model: Path) -> None:
    method, data = cases.make(AdversarialTraining, tiny_model, head=head), cases.batch()
    cases.assert_the_attack_maximises(method, data, lambda *given: per_sample(head, data)(*given).sum())


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_the_attack_does_not_depend_on_the_batch(head: str, tiny_model: Path) -> None:
    method = cases.make(AdversarialTraining, tiny_model, head=head)
    cases.assert_the_attack_does_not_depend_on_the_batch(method, cases.batch())


def test_the_classifier_has_a_row_per_class_and_its_own_rate(tiny_model: Path) -> None:
    method = AdversarialTraining(pretrained=str(tiny_model), head_lr=0.25, warmup_steps=0, schedule="constant")
    trainer = cases.fit(method, steps=1)
    classes = len(trainer.datamodule.train_task.class_names)
    assert method.classifier.weight.shape == (classes, 16)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-5, 0.25]


def test_the_zero_shot_heads_evaluate(tiny_model: Path) -> None:
    method, images = cases.make(AdversarialTraining, tiny_model), cases.batch().images
    torch.testing.assert_close(method.logits(images), cases.logits(method, images))
    method.classifier.weight.data.zero_()
    torch.testing.assert_close(method.logits(images), cases.logits(method, images))


def test_a_test_discards_the_classifier_and_a_resumed_fit_keeps_it(tiny_model: Path, tmp_path: Path) -> None:
    kwargs = {"pretrained": str(tiny_model), "warmup_steps": 0, "head_lr": 0.1}
    first = AdversarialTraining(**kwargs)
    cases.fit(first, steps=2).save_checkpoint(tmp_path / "a.ckpt")
    tested = AdversarialTraining(**kwargs)
    cases.test(tested, tmp_path / "a.ckpt")
    assert list(tested.classifier.parameters()) == []
    resumed = AdversarialTraining(**kwargs)
    cases.fit(resumed, steps=2, ckpt_path=tmp_path / "a.ckpt")  # nothing is left to do: the weights are the saved ones
    assert torch.equal(resumed.classifier.weight, first.classifier.weight)


def test_an_unknown_head_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="head must be one of linear, cosine, got 'mlp'"):
        AdversarialTraining(head="mlp", pretrained=str(tiny_model))
