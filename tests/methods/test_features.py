"""What holds for methods behind frozen towers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import method_cases as cases
import pytest
import torch
from helpers import quick_trainer
from lightning.pytorch import Callback, Trainer

from robustclip.methods import CLIPAdapter, CRoFT, FineTuning, RobustMethod, TeCoA, TipAdapter
from robustclip.methods._shared.data_checks import check_data
from robustclip.methods._shared.schedules import constant_warmup_cosine

each_method = pytest.mark.parametrize("cls", [CLIPAdapter, CRoFT, TipAdapter])


@pytest.mark.parametrize(
    ("cls", "kwargs"), [(CLIPAdapter, {}), (CRoFT, {}), (TipAdapter, {}), (FineTuning, {"probe_epochs": None})]
)
def test_embeddings_stand_for_images(cls: type[RobustMethod], kwargs: dict[str, Any], tiny_model: Path) -> None:
    method, data = cases.make(cls, tiny_model, **kwargs), cases.batch()
    check_data(method, given(method), "fit")
    with torch.no_grad():
        embedded = data._replace(images=cases.embed(method, data.images))
    torch.testing.assert_close(method.training_loss(embedded), method.training_loss(data))
    torch.testing.assert_close(method.logits(embedded.images), method.logits(data.images))


@each_method
def test_the_tower_stays_in_eval_mode_and_only_attacks_see_it(cls: type[RobustMethod], tiny_model: Path) -> None:
    method, images = cases.make(cls, tiny_model).train(), cases.batch().images.requires_grad_()
    assert method.training
    assert not [module for module in method.clip.modules() if module.training]
    (in_training,) = torch.autograd.grad(method.logits(images).sum(), images, allow_unused=True)
    (in_evaluation,) = torch.autograd.grad(method.eval().logits(images).sum(), images)
    assert in_training is None
    assert in_evaluation.abs().max() > 0


def test_the_words_of_a_task_are_read_once(tiny_model: Path) -> None:
    method, read = cases.make(CRoFT, tiny_model), []
    method.clip.net.transformer.register_forward_hook(lambda *_: read.append(1))
    method.prepare_training(cases.TASK)
    with torch.no_grad():
        method.text_adapter *= -1
    method.prepare_training(cases.TASK)
    assert read == []


def test_the_constant_schedule_has_no_cosine_after_its_warm_up() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.3)
    schedule, rates = constant_warmup_cosine(optimizer, warmup_epochs=2, epochs=None), []
    for _ in range(4):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-5, 1e-5, 0.3, 0.3])


class Rates(Callback):
    """The learning rate of each epoch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_rate_changes_with_the_epoch(tiny_model: Path) -> None:
    rates = Rates()
    trainer = quick_trainer(rates, max_epochs=4, limit_train_batches=3, limit_val_batches=0)
    trainer.fit(CLIPAdapter(pretrained=str(tiny_model)), datamodule=cases.CLIPDataModule(batch_size=4, image_size=32))
    # 0.002 (1 + cos(pi k / 4)) / 2 for k = 0, 1, 2
    assert rates.seen == pytest.approx([1e-5, 2e-3, 2e-3 * (2 + 2**0.5) / 4, 1e-3])


def given(method: RobustMethod, **features: Any) -> Any:
    """A data module with features of the method's tower, apart from what differs."""
    own = {"fingerprint": method.clip.fingerprint, "image_size": method.clip.image_size}
    return SimpleNamespace(train_has_unknown=False, feature_model=own | features)


def test_features_of_another_tower_are_refused(tiny_model: Path) -> None:
    method = cases.make(CLIPAdapter, tiny_model)
    check_data(method, given(method), "fit")
    for key, value in (("fingerprint", "f00"), ("image_size", 96)):
        with pytest.raises(ValueError, match=f"embeddings of a tower with {key} {value!r}, this run has"):
            check_data(method, given(method, **{key: value}), "test")


@pytest.mark.parametrize("cls", [TeCoA, FineTuning])
def test_a_method_with_a_tower_that_learns_refuses_features(cls: type[RobustMethod], tiny_model: Path) -> None:
    method, name = cases.make(cls, tiny_model), cls.__name__
    with pytest.raises(ValueError, match=f"{name} needs images, data.features gives embeddings; set data.features"):
        check_data(method, given(method), "fit")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"warmup_epochs": -1}, "warmup_epochs must be .*at least 0, got -1"),
        ({"warmup_steps": 10}, "warmup_steps must be 0 for CLIPAdapter, got 10; set warmup_epochs"),
    ],
)
def test_impossible_values_are_refused(kwargs: dict[str, Any], words: str, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=words):
        CLIPAdapter(pretrained=str(tiny_model), **kwargs)
