"""CLIP-Adapter, Tip-Adapter-F and CoOp against their formulas."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from helpers import ShardWriter, quick_trainer
from torch import Tensor
from torch.nn import functional as F

from robustclip.data import CLIPDataModule
from robustclip.methods import CLIPAdapter, CoOp, RobustMethod, TipAdapter
from robustclip.types import Task

OTHER = Task("other", ("a cat", "a dog"))
STILL = {"warmup_epochs": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}


def texts(method: RobustMethod) -> Tensor:
    prompts = [f"This is a photo of a {name}" for name in cases.TASK.class_names]
    return cases.unit(method.clip.net.encode_text(method.clip.tokenizer(prompts))).detach()


def test_clip_adapter_mixes_a_bottleneck_in(tiny_model: Path) -> None:
    method, data = cases.make(CLIPAdapter, tiny_model, ratio=0.6, narrowing=2), cases.batch()
    assert [tuple(each.shape) for each in method.adapter.parameters()] == [(8, 16), (16, 8)]

    def expected(twin: Any, clean: Tensor, _: Tensor) -> Tensor:
        raw = cases.embed(twin, clean).detach()
        down, up = twin.adapter.parameters()
        features = cases.unit(0.6 * (up @ (down @ raw.T).clamp(min=0)).clamp(min=0).T + 0.4 * raw)
        return cases.cross_entropy(twin.clip.logit_scale * features @ texts(twin).T, data.labels).mean()

    cases.assert_the_loss_is(method, data, expected)


def test_tip_adapter_asks_its_cache(tiny_model: Path) -> None:
    method, data = cases.make(TipAdapter, tiny_model, alpha=1.7, beta=0.8), cases.batch()
    labels = method.key_labels

    def expected(twin: Any, clean: Tensor, _: Tensor) -> Tensor:
        features = cases.unit(cases.embed(twin, clean)).detach()
        affinity = (-0.8 * (1 - features @ twin.keys.T)).exp()
        zero_shot = twin.clip.logit_scale * features @ texts(twin).T
        of_cache = torch.stack([affinity[:, labels == label].sum(1) for label in range(3)], dim=1)
        return cases.cross_entropy(zero_shot + 1.7 * of_cache, data.labels).mean()

    cases.assert_the_loss_is(method, data, expected)


def test_other_classes_are_not_in_the_cache(tiny_model: Path) -> None:
    method, images = cases.make(TipAdapter, tiny_model), cases.batch().images
    method.prepare([OTHER])
    zero_shot = method.clip.logit_scale * cases.unit(cases.embed(method, images)) @ method.clip.encode_classes(OTHER).T
    torch.testing.assert_close(method.logits(images, "other"), zero_shot)
    assert not torch.equal(method.logits(images), cases.logits(method, images))


def test_a_key_is_the_feature_of_a_training_image(tiny_model: Path, write_shards: ShardWriter, tmp_path: Path) -> None:
    """In the order of the ids, whatever the order in training; one that does not decode leaves an empty place."""
    write_shards(tmp_path, "few", "train", [7, 6], broken=[4])
    data = CLIPDataModule(train="wds:few", root=str(tmp_path), image_size=32, batch_size=5, holdout=0)
    trainer = quick_trainer(max_epochs=1, limit_val_batches=0)
    method = TipAdapter(pretrained=str(tiny_model), **STILL)
    trainer.fit(method, datamodule=data)
    found = list(data.plain_train_dataloader())
    images, labels = (torch.cat([batch[part] for batch in found]) for part in (0, 1))
    with torch.no_grad():
        features = cases.unit(cases.embed(method, images))
    assert method.keys is not None
    assert method.key_labels is not None
    torch.testing.assert_close(method.keys.detach(), torch.cat([features, torch.zeros(1, 16)]))
    assert method.key_labels.tolist() == [*labels.tolist(), -1] == [0, 1, 2, 0, 2, 0, 1, 2, 0, 1, 2, 0, -1]


def few_shots(folder: Path, write_shards: ShardWriter) -> CLIPDataModule:
    write_shards(folder, "few", "train", [24])
    return CLIPDataModule(train="wds:few", root=str(folder), image_size=32, batch_size=5, holdout=0.5)


def test_without_training_the_keys_stay_and_the_best_pair_of_the_grid_is_kept(
    tiny_model: Path, write_shards: ShardWriter, tmp_path: Path
) -> None:
    data = few_shots(tmp_path, write_shards)
    options: dict[str, Any] = {"learns": False, "searches": True, "most": (8.1, 5.1), "steps": (4, 5)}
    method = TipAdapter(pretrained=str(tiny_model), **options)
    trainer = quick_trainer(max_epochs=1)
    trainer.fit(method, datamodule=data)
    train, (held,) = list(data.plain_train_dataloader()), data.val_dataloader()
    images, labels = (torch.cat([batch[part] for batch in train]) for part in (0, 1))
    with torch.no_grad():
        keys = cases.unit(cases.embed(method, images))
        queries = cases.unit(cases.embed(method, torch.cat([batch.images for batch in held])))
        expected = torch.cat([batch.labels for batch in held])
        zero_shot = method.clip.logit_scale * queries @ method.clip.encode_classes(data.train_task).T
        best: tuple[int, float, float] = (0, 0.0, 0.0)
        for beta in (0.1, 1.1, 2.1, 3.1, 4.1):
            affinity = (-beta * (1 - queries @ keys.T)).exp()
            votes = torch.stack([affinity[:, labels == label].sum(1) for label in range(3)], dim=1)
            for alpha in (0.1, 2.1, 4.1, 6.1):
                right = int(((zero_shot + alpha * votes).argmax(1) == expected).sum())
                best = (right, alpha, beta) if right > best[0] else best
    assert method.keys is not None
    assert method.chosen is not None
    torch.testing.assert_close(method.keys.detach(), keys)
    assert method.chosen.tolist() == pytest.approx(best[1:])
    assert float(trainer.callback_metrics["val/few/clean/acc1"]) == pytest.approx(best[0] / len(expected))
    trainer.save_checkpoint(tmp_path / "tip.ckpt")
    again = TipAdapter(pretrained=str(tiny_model))  # the checkpoint keeps the pair
    loaded = quick_trainer()
    loaded.validate(again, datamodule=data, ckpt_path=str(tmp_path / "tip.ckpt"), weights_only=True, verbose=False)
    assert again.chosen is not None
    assert torch.equal(again.chosen, method.chosen)
    assert loaded.callback_metrics["val/few/clean/acc1"] == trainer.callback_metrics["val/few/clean/acc1"]


def test_a_search_needs_held_out_images(tiny_model: Path, write_shards: ShardWriter, tmp_path: Path) -> None:
    data = few_shots(tmp_path, write_shards)
    data.holdout = 0
    with pytest.raises(ValueError, match=r"searches needs held-out images.*data\.holdout"):
        quick_trainer(max_epochs=1).fit(TipAdapter(pretrained=str(tiny_model), searches=True), datamodule=data)
    trainer = quick_trainer(max_epochs=1, limit_val_batches=0)
    method = TipAdapter(pretrained=str(tiny_model), searches=True)
    trainer.fit(method, datamodule=few_shots(tmp_path, write_shards))
    with pytest.raises(ValueError, match="none has run"):
        trainer.save_checkpoint(tmp_path / "tip.ckpt")


def test_the_cache_of_other_classes_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    method = cases.make(TipAdapter, tiny_model)
    checkpoint: dict[str, Any] = {"cache_classes": ["a cat"], "state_dict": {}}
    with pytest.raises(ValueError, match="a cache of 1 classes, this run trains 3 that are not the same"):
        method.on_load_checkpoint(checkpoint)


def test_a_context_that_starts_at_a_phrase_is_the_zero_shot_model(tiny_model: Path) -> None:
    method, data = cases.make(CoOp, tiny_model, phrase="a photo of a"), cases.batch()
    task = Task("train", cases.TASK.class_names, ("a photo of a {}.",))
    zero_shot = method.clip.logit_scale * method.image_features(data.images) @ method.clip.encode_classes(task).T
    torch.testing.assert_close(method.logits(data.images), zero_shot)
    loss = method.training_loss(data)["clean_ce"]
    torch.testing.assert_close(loss, F.cross_entropy(zero_shot, data.labels))
    loss.backward()
    assert [name for name, each in method.named_parameters() if each.grad is not None] == ["context.vectors"]


def test_a_context_starts_at_random(tiny_model: Path) -> None:
    torch.manual_seed(0)
    vectors = CoOp(pretrained=str(tiny_model), tokens=8).context.vectors
    assert vectors.shape == (8, 16)
    assert float(vectors.detach().std()) == pytest.approx(0.02, rel=0.2)  # 128 draws: 3 standard errors are 19 %


@pytest.mark.parametrize(
    ("cls", "kwargs", "words"),
    [
        (CLIPAdapter, {"ratio": 1.2}, r"ratio must be in \[0, 1\], got 1.2"),
        (CLIPAdapter, {"narrowing": 32}, r"narrowing must be in \[1, 16\], the width of the embeddings, got 32"),
        (TipAdapter, {"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        (TipAdapter, {"beta": -1.0}, "beta must be above 0, got -1.0"),
    ],
)
def test_impossible_values_are_refused(
    cls: type[RobustMethod], kwargs: dict[str, Any], words: str, tiny_model: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        cls(pretrained=str(tiny_model), **kwargs)
