"""What a checkpoint holds, and what refuses it."""

import json
from pathlib import Path

import pytest
import torch
from helpers import quick_trainer
from safetensors.torch import load_file, save_file

from robustclip.data import CLIPDataModule
from robustclip.methods import TeCoA
from robustclip.models.layers import frozen


def fitted(method: TeCoA, path: Path) -> Path:
    trainer = quick_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(method, datamodule=CLIPDataModule(train="shapes:source", batch_size=4, image_size=32))
    trainer.save_checkpoint(path)
    return path


def load(method: TeCoA, path: Path) -> TeCoA:
    trainer = quick_trainer(limit_test_batches=1)
    data = CLIPDataModule(test=["shapes:colours"], batch_size=4, image_size=32)
    trainer.test(method, datamodule=data, ckpt_path=str(path), weights_only=True, verbose=False)
    return method


def other_weights(model: Path, folder: Path) -> Path:
    weights = load_file(model / "open_clip_model.safetensors")
    save_file({**weights, "text_projection": weights["text_projection"] + 1}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text((model / "open_clip_config.json").read_text())
    return folder


def test_a_checkpoint_holds_the_trained_parameters_alone(tiny_model: Path, tmp_path: Path) -> None:
    method = TeCoA(pretrained=str(tiny_model), last_blocks=1)
    checkpoint = torch.load(fitted(method, tmp_path / "a.ckpt"), weights_only=True)
    learned = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    buffers = {name for name in checkpoint["state_dict"] if name not in dict(method.named_parameters())}
    assert set(checkpoint["state_dict"]) - buffers == learned
    assert len(learned) == 14


def test_a_checkpoint_saved_during_an_attack_holds_the_trained_parameters(tiny_model: Path, tmp_path: Path) -> None:
    """An attack switches all gradients off for a while; a save in between must not lose the trained weights."""
    method = TeCoA(pretrained=str(tiny_model), last_blocks=1)
    whole = torch.load(fitted(method, tmp_path / "a.ckpt"), weights_only=True)["state_dict"]
    with frozen(method):
        method.trainer.save_checkpoint(tmp_path / "b.ckpt")
    inside = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"]
    assert inside.keys() == whole.keys()
    assert all(torch.equal(inside[name], tensor) for name, tensor in whole.items())


def test_random_initial_weights_are_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "two-random-towers.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "two-random-towers.json")
    first = TeCoA(arch="two-random-towers", pretrained=None)
    path = fitted(first, tmp_path / "a.ckpt")
    again = load(TeCoA(arch="two-random-towers", pretrained=None), path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_a_checkpoint_restores_the_trained_parameters(tiny_model: Path, tmp_path: Path) -> None:
    first = TeCoA(pretrained=str(tiny_model), warmup_steps=0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    path = fitted(first, tmp_path / "a.ckpt")
    again = load(TeCoA(pretrained=str(tiny_model)), path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_other_frozen_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """The same architecture with another text tower would give other numbers without a word."""
    path = fitted(TeCoA(pretrained=str(tiny_model)), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="trained with weights"):
        load(TeCoA(pretrained=str(other_weights(tiny_model, tmp_path))), path)


def test_a_moved_model_folder_is_still_the_same(tiny_model: Path, tmp_path: Path) -> None:
    path = fitted(TeCoA(pretrained=str(tiny_model)), tmp_path / "a.ckpt")
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tiny_model.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    load(TeCoA(pretrained=str(moved)), path)


def test_parts_that_did_not_learn_cannot_be_missing(tiny_model: Path, tmp_path: Path) -> None:
    path = fitted(TeCoA(pretrained=str(tiny_model), last_blocks=1), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="lacks parameter"):
        load(TeCoA(pretrained=str(tiny_model)), path)
