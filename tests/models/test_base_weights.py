"""A base model is what its files say, or it is refused in one line that names the file or key."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import tiny_clip
from safetensors.torch import load_file, save_file
from torch import Tensor

from robustclip.models.clip import CLIPModel

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
State = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tiny_clip(tmp_path / "model")


def configured(folder: Path, *path: str, value: Any) -> None:
    """Changes one key of the configuration; values that no JSON writer makes are given as text."""
    config = json.loads((folder / CONFIG).read_text())
    section = config
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    (folder / CONFIG).write_text(json.dumps(config))


def weighed(folder: Path, change: Callable[[State], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


# Resampling


def test_weights_for_longer_texts_are_not_resampled(folder: Path) -> None:
    weighed(folder, lambda state: state.update(positional_embedding=torch.randn(24, 16)))
    with pytest.raises(ValueError, match=r"texts of 24 tokens.*context_length 16"):
        CLIPModel(pretrained=str(folder))


def test_weights_for_larger_images_are_resampled_on_request_alone(folder: Path) -> None:
    """A grid of 8 x 8 patches and a class token, where the configuration says 32 pixels, 4 x 4 patches of 8."""
    weighed(folder, lambda state: state.update({"visual.positional_embedding": torch.randn(65, 32)}))
    with pytest.raises(ValueError, match=r"images of 64 patches.* makes 16.*--model.image_size 32"):
        CLIPModel(pretrained=str(folder))
    assert CLIPModel(pretrained=str(folder), image_size=32).net.visual.positional_embedding.shape == (17, 32)
    assert CLIPModel(pretrained=str(folder), image_size=64).net.visual.positional_embedding.shape == (65, 32)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_weights_is_not_resampled_to_its_architecture(folder: Path, tmp_path: Path, suffix: str) -> None:
    config = json.loads((folder / CONFIG).read_text())["model_cfg"]
    config["text_cfg"]["context_length"] = 12
    (tmp_path / "shorter-texts.json").write_text(json.dumps(config))
    config["text_cfg"]["context_length"], config["vision_cfg"]["image_size"] = 16, 48
    (tmp_path / "larger-images.json").write_text(json.dumps(config))
    for file in tmp_path.glob("*.json"):
        open_clip.add_model_config(file)
    weights, file = load_file(folder / WEIGHTS), tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, file)
    else:
        save_file(weights, file)
    with pytest.raises(ValueError, match=r"a\..* texts of 16 tokens.*shorter-texts has context_length 12"):
        CLIPModel("shorter-texts", str(file))
    with pytest.raises(ValueError, match=r"a\..* images of 16 patches.*larger-images makes 36.*image_size 48"):
        CLIPModel("larger-images", str(file))
    assert CLIPModel("larger-images", str(file), image_size=32).image_size == 32


# What is in the files

Damage = Callable[[Path], Any]
BAD: dict[str, tuple[Damage, str]] = {
    "text_cfg null": (lambda at: configured(at, "model_cfg", "text_cfg", value=None), r"model_cfg.text_cfg of .*None"),
    "model_cfg list": (lambda at: configured(at, "model_cfg", value=[1]), r"model_cfg of .* mapping, got \[1\]"),
    "vision_cfg list": (lambda at: configured(at, "model_cfg", "vision_cfg", value=[1]), r"model_cfg.vision_cfg of"),
    "embed_dim text": (lambda at: configured(at, "model_cfg", "embed_dim", value="x"), r"embed_dim of .* got 'x'"),
    "no layer": (lambda at: configured(at, "model_cfg", "vision_cfg", "layers", value=-1), r"layers of .* got -1"),
    "layers": (lambda at: configured(at, "model_cfg", "text_cfg", "layers", value=10**9), r"layers of .* got 10000"),
    "width": (lambda at: configured(at, "model_cfg", "vision_cfg", "width", value=10**9), r"width of .* got 10000"),
    "truth": (lambda at: configured(at, "model_cfg", "embed_dim", value=True), r"embed_dim of .* got True"),
    "unknown option": (lambda at: configured(at, "model_cfg", "colour", value=1), r"model.*colour"),
    "patch size": (lambda at: configured(at, "model_cfg", "vision_cfg", "patch_size", value="x"), "does not load"),
    "no patch": (lambda at: configured(at, "model_cfg", "vision_cfg", "patch_size", value=0), "does not load"),
    "tokenizer": (lambda at: configured(at, "model_cfg", "text_cfg", "tokenizer_kwargs", value="x"), "does not load"),
    "vocabulary": (
        lambda at: configured(at, "model_cfg", "text_cfg", "tokenizer_kwargs", value={"bpe_path": "none.gz"}),
        "does not load.*none.gz",
    ),
    "mean of one": (lambda at: configured(at, "preprocess_cfg", "mean", value=[0.5]), r"preprocess_cfg.mean of"),
    "mean text": (lambda at: configured(at, "preprocess_cfg", "mean", value="x"), r"preprocess_cfg.mean of"),
    "no deviation": (lambda at: configured(at, "preprocess_cfg", "std", value=[1, 0, 1]), r"preprocess_cfg.std of"),
    "pixels list": (lambda at: configured(at, "preprocess_cfg", value=[1]), r"preprocess_cfg of .* got \[1\]"),
    "deep JSON": (lambda at: (at / CONFIG).write_text("[" * 100_000), CONFIG),
    "list": (lambda at: (at / CONFIG).write_text("[]"), r"content of .* got \[\]"),
    "no text": (lambda at: (at / CONFIG).write_bytes(b"\xff\xfe"), CONFIG),
    "whole numbers": (
        lambda at: weighed(at, lambda state: state.update({"visual.proj": torch.ones(32, 16, dtype=torch.int64)})),
        "visual.proj of .* torch.int64",
    ),
    "missing": (lambda at: weighed(at, lambda state: state.pop("visual.proj")), "visual.proj"),
    "unknown": (lambda at: weighed(at, lambda state: state.update(head=torch.ones(2))), "head"),
    "bias": (lambda at: weighed(at, lambda state: state.update(logit_bias=torch.ones(()))), "logit_bias.*sigmoid"),
    "no tensor": (lambda at: save_file({}, at / WEIGHTS), "empty dict"),
    "suffix": (lambda at: (at / WEIGHTS).rename(at / "weights.pt"), "has no weights"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_folder_is_refused_in_one_line(damage: Damage, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        CLIPModel(pretrained=str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "got list"),
        ({}, "empty dict"),
        ({"state_dict": [1]}, "got list"),
        ({"state_dict": {"a": 1}}, "got int for 'a'"),
        ({"visual.proj": torch.eye(3).to_sparse()}, "visual.proj .*sparse"),
        ({"base_model": {}, "state_dict": {}}, "checkpoint of robustclip"),
        (torch.ones(1), "got float32"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(content: Any, message: str, folder: Path, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    for place in (tmp_path / "a.pt", folder):
        with pytest.raises(ValueError, match=message):
            CLIPModel("ViT-S-32-alt" if place.is_file() else None, str(place))
        (folder / WEIGHTS).unlink(missing_ok=True)
        shutil.copyfile(tmp_path / "a.pt", folder / "open_clip_pytorch_model.bin")


def test_half_precision_weights_are_the_same_numbers(folder: Path) -> None:
    weighed(folder, lambda state: state.update({name: tensor.half() for name, tensor in state.items()}))
    half = CLIPModel(pretrained=str(folder))
    weighed(folder, lambda state: state.update({name: tensor.float() for name, tensor in state.items()}))
    assert half.fingerprint == CLIPModel(pretrained=str(folder)).fingerprint
    assert half.net.visual.proj.dtype == torch.float32
