"""TeCoA without labels: the pre-trained model's answers take their place."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from helpers import quick_trainer
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from robustclip.data import CLIPDataModule
from robustclip.methods import PMGAFT, RobustMethod, TeCoA
from robustclip.types import Batch

BOLD = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}


class Noise(Callback):
    """Replaces the labels of every batch before the method sees it."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        step = pl_module.training_step

        def with_noise(batch: Batch, batch_idx: int) -> Tensor:
            generator = torch.Generator().manual_seed(batch_idx)
            return step(batch._replace(labels=torch.randint(9, batch.labels.shape, generator=generator)), batch_idx)

        pl_module.training_step = with_noise


def fitted(method: RobustMethod, *callbacks: Callback) -> RobustMethod:
    trainer = quick_trainer(*callbacks, max_steps=3, limit_val_batches=0)
    trainer.fit(method, datamodule=CLIPDataModule(train="shapes:source", batch_size=4, image_size=32))
    return method


@pytest.mark.parametrize("cls", [TeCoA, PMGAFT])
def test_the_labels_reach_neither_attack_nor_loss(cls: type[TeCoA], tiny_model: Path) -> None:
    def learned(*callbacks: Callback, pseudo_labels: bool = True) -> Tensor:
        torch.manual_seed(0)
        method = fitted(cls(pretrained=str(tiny_model), pseudo_labels=pseudo_labels, **BOLD), *callbacks)
        return torch.cat([parameter.detach().flatten() for parameter in method.clip.net.visual.parameters()])

    weights = learned()
    assert torch.equal(weights, learned(Noise()))
    assert not torch.equal(weights, learned(pseudo_labels=False))


def test_they_are_the_answers_of_the_weights_before_training(tiny_model: Path) -> None:
    """``argmax_c cos(f_0(x), t_c)`` of clean images, whatever the image tower has learnt meanwhile."""
    method, seen = cases.make(TeCoA, tiny_model, pseudo_labels=True, **BOLD), []
    pretrained = TeCoA(pretrained=str(tiny_model))
    data = cases.batch(64)
    method.training_loss = lambda batch: seen.append(batch) or {"loss": torch.zeros((), requires_grad=True)}
    method.total = lambda terms, batch: terms["loss"]
    method.training_step(data, 0)
    (given,) = seen
    expected = cases.logits(pretrained, data.images).argmax(1)
    assert torch.equal(given.labels, expected)
    assert not torch.equal(expected, cases.logits(method, data.images).argmax(1)), "the student has moved"
    assert given.images is data.images
    assert given.index is data.index
    assert torch.equal(given.labels[:8], _labels(method, seen, Batch(*(part[:8] for part in data[:3]))))


def _labels(method: TeCoA, seen: list[Batch], data: Batch) -> Tensor:
    method.training_step(data, 0)
    return seen[-1].labels
