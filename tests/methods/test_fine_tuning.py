"""Linear probing, fine-tuning and what holds it against their definitions; the classifier starts as the text does."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from helpers import quick_trainer
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from robustclip.data import CLIPDataModule
from robustclip.methods import FineTuning
from robustclip.tools.interpolate import interpolate
from robustclip.types import Task

BOLD = {"warmup_steps": 0, "schedule": "constant", "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2)}


def loss_by_hand(twin: Any, images: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(W f(x))_y`` from the raw tower."""
    return cases.cross_entropy(cases.unit(cases.embed(twin, images)) @ twin.classifier.T, labels).mean()


def test_the_loss_is_cross_entropy_of_the_classifier_on_unit_features(tiny_model: Path) -> None:
    method, data = cases.make(FineTuning, tiny_model), cases.batch()
    cases.assert_the_loss_is(method, data, lambda twin, clean, _: loss_by_hand(twin, clean, data.labels))
    assert method.classifier.grad is not None


def test_l2_sp_pulls_the_tower_to_the_pretrained_one(tiny_model: Path) -> None:
    method, data = cases.make(FineTuning, tiny_model, l2_sp=0.3), cases.batch()
    start = FineTuning(pretrained=str(tiny_model)).clip.net.visual.double()

    def expected(twin: Any, clean: Tensor, _: Tensor) -> Tensor:
        now, then = (torch.cat([p.flatten() for p in net.parameters()]) for net in (twin.clip.net.visual, start))
        return loss_by_hand(twin, clean, data.labels) + 0.3 / 2 * (now - then.detach()).square().sum()

    cases.assert_the_loss_is(method, data, expected)


def test_lwf_pulls_the_answers_to_those_of_the_zero_shot_model(tiny_model: Path) -> None:
    """``KL(q || p) = sum_c q_c (log q_c - log p_c)``, ``q`` of the pre-trained tower and the zero-shot head."""
    method, data = cases.make(FineTuning, tiny_model, lwf=0.7), cases.batch()
    with torch.no_grad():
        method.classifier += torch.randn(method.classifier.shape, generator=torch.Generator().manual_seed(6))
    original = FineTuning(pretrained=str(tiny_model)).double()

    def expected(twin: Any, clean: Tensor, _: Tensor) -> Tensor:
        q = (cases.unit(cases.embed(original, clean)) @ twin.zero_shot_head.T).softmax(1).detach()
        p = (cases.unit(cases.embed(twin, clean)) @ twin.classifier.T).softmax(1)
        return loss_by_hand(twin, clean, data.labels) + 0.7 * (q * (q.log() - p.log())).sum(1).mean()

    cases.assert_the_loss_is(method, data, expected)


@pytest.mark.parametrize("kwargs", [{"probe_epochs": None}, {"probe_epochs": 1, "l2_sp": 1.0}])
def test_a_probe_leaves_the_tower_without_gradients(kwargs: dict[str, Any], tiny_model: Path) -> None:
    method, data = cases.make(FineTuning, tiny_model, **kwargs), cases.batch()
    torch.stack(list(method.training_loss(data).values())).sum().backward()
    assert [name for name, each in method.named_parameters() if each.grad is not None] == ["classifier"]
    features = cases.unit(cases.embed(cases.in_fp64(method), data.images.double()))
    z = features @ method.classifier.double().T
    gradient = (z.softmax(1) - torch.eye(3)[data.labels]).T @ features / len(data.labels)
    torch.testing.assert_close(method.classifier.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def fitted(method: FineTuning, *callbacks: Callback, epochs: int = 1, **options: Any) -> Trainer:
    data = CLIPDataModule(train="shapes:source", test=["shapes:source", "shapes:colours"], batch_size=4, image_size=32)
    limits = {"limit_train_batches": 2, "limit_val_batches": 0, "limit_test_batches": 2}
    trainer = quick_trainer(*callbacks, max_epochs=epochs, **limits)
    trainer.fit(method, datamodule=data, **options)
    return trainer


class Watcher(Callback):
    """Keeps the weights of tower and classifier at the start of each epoch and at the end."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        tower = torch.cat([p.detach().flatten() for p in pl_module.clip.net.visual.parameters()])
        self.seen.append((tower.clone(), pl_module.classifier.detach().clone()))

    on_train_end = on_train_epoch_start


@pytest.mark.parametrize(
    ("probe_epochs", "learns"),
    [(0, [True, True]), (1, [False, True]), (None, [False, False])],
    ids=["ft", "lp-ft", "lp"],
)
def test_the_tower_learns_from_the_end_of_the_probe_on(
    probe_epochs: int | None, learns: list[bool], tiny_model: Path
) -> None:
    watcher = Watcher()
    fitted(FineTuning(pretrained=str(tiny_model), probe_epochs=probe_epochs, **BOLD), watcher, epochs=2)
    pairs = list(zip(watcher.seen, watcher.seen[1:], strict=False))
    assert [not torch.equal(a[0], b[0]) for a, b in pairs] == learns
    assert all(not torch.equal(a[1], b[1]) for a, b in pairs)


def test_the_classifier_starts_as_the_zero_shot_head(tiny_model: Path) -> None:
    watcher, method = Watcher(), FineTuning(pretrained=str(tiny_model), **BOLD)
    task = fitted(method, watcher).datamodule.train_task
    with torch.no_grad():
        expected = method.clip.net.logit_scale.exp() * method.clip.encode_classes(task)
    torch.testing.assert_close(watcher.seen[0][1], expected)
    assert torch.equal(method.zero_shot_head, watcher.seen[0][1])


def test_the_classifier_answers_for_its_classes_and_the_text_for_others(tiny_model: Path) -> None:
    method, images = cases.make(FineTuning, tiny_model), cases.batch().images
    same = Task("another_domain", cases.TASK.class_names, ("a painting of a {}",))
    other = Task("other", tuple(reversed(cases.TASK.class_names)), cases.TASK.templates)
    with torch.no_grad():
        method.prepare([same, other])
        features = cases.unit(cases.embed(method, images))
        torch.testing.assert_close(method.logits(images, "another_domain"), features @ method.classifier.T)
        torch.testing.assert_close(method.logits(images, "other"), cases.logits(method, images).flip(1))


def test_a_checkpoint_gives_the_answers_of_the_fit(tiny_model: Path, tmp_path: Path) -> None:
    first = FineTuning(pretrained=str(tiny_model), **BOLD)
    trainer = fitted(first)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = []
    for method, path in ((first, None), (FineTuning(pretrained=str(tiny_model)), str(tmp_path / "a.ckpt"))):
        trainer.test(method, datamodule=trainer.datamodule, ckpt_path=path, weights_only=True, verbose=False)
        found.append((dict(trainer.callback_metrics), {name: head.clone() for name, head in method.heads.items()}))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1]["source"], found[1][1]["source"])
    assert torch.equal(found[1][1]["source"], first.classifier.detach() / first.clip.logit_scale)


def test_a_resumed_fit_keeps_the_classifier_and_refuses_other_classes(tiny_model: Path, tmp_path: Path) -> None:
    first = FineTuning(pretrained=str(tiny_model), **BOLD)
    fitted(first).save_checkpoint(tmp_path / "a.ckpt")
    resumed = FineTuning(pretrained=str(tiny_model), **BOLD)
    fitted(resumed, ckpt_path=str(tmp_path / "a.ckpt"))  # nothing is left to do: the weights are the saved ones
    assert torch.equal(resumed.classifier, first.classifier)
    assert torch.equal(resumed.zero_shot_head, first.zero_shot_head)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="a head of 2 classes, this run trains"):
        resumed.on_load_checkpoint(content | {"head_classes": ["cat", "dog"]})


def test_interpolation_goes_from_the_zero_shot_head_to_the_classifier(tiny_model: Path, tmp_path: Path) -> None:
    tuned = FineTuning(pretrained=str(tiny_model), **BOLD)
    fitted(tuned).save_checkpoint(tmp_path / "a.ckpt")
    original = FineTuning(pretrained=str(tiny_model))
    (half,) = interpolate(original, tmp_path / "a.ckpt", tmp_path / "out", alphas=(0.5,))
    found = torch.load(half, weights_only=True)["state_dict"]
    torch.testing.assert_close(found["classifier"], (tuned.zero_shot_head + tuned.classifier.detach()) / 2)
    name = "clip.net.visual.proj"
    start = FineTuning(pretrained=str(tiny_model)).state_dict()[name]
    torch.testing.assert_close(found[name], (start + tuned.state_dict()[name]) / 2)
    again = FineTuning(pretrained=str(tiny_model))
    assert cases.test(again, half)["test/colours/n"] == 4
    assert again.interpolation is not None


def test_the_recipe_is_wise_fts(tiny_model: Path) -> None:
    method = cases.make(FineTuning, tiny_model)
    (group, head) = method.optimizer(method.parameter_groups()).param_groups
    assert (group["lr"], group["weight_decay"], head["lr"], method.warmup_steps) == (3e-5, 0.1, 3e-5, 500)
    own = cases.make(FineTuning, tiny_model, head_lr=0.5)
    assert [group["lr"] for group in own.optimizer(own.parameter_groups()).param_groups] == [3e-5, 0.5]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"probe_epochs": -1}, "probe_epochs must be .*at least 0 or null, got -1"),
        ({"l2_sp": -0.1}, "l2_sp must be at least 0, got -0.1"),
        ({"lwf": -0.1}, "lwf must be at least 0, got -0.1"),
        ({"l2_sp": 0.1, "probe_epochs": None}, "l2_sp must be 0 where probe_epochs is null, got 0.1"),
    ],
)
def test_impossible_values_are_refused(kwargs: dict[str, Any], words: str, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=words):
        FineTuning(pretrained=str(tiny_model), **kwargs)
