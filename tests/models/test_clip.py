"""CLIPModel against open_clip itself."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from robustclip.models.clip import CLIPModel
from robustclip.types import Task


def test_features_equal_open_clips(tiny_model: Path) -> None:
    ours = CLIPModel(pretrained=str(tiny_model))
    theirs = open_clip.create_model(f"local-dir:{tiny_model}").eval()
    images = torch.rand(3, 3, 32, 32)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (theirs.visual.image_mean, theirs.visual.image_std))
    torch.testing.assert_close(ours.encode_image(images), theirs.encode_image((images - mean) / std, normalize=True))
    prompts = ["a cat", "a long haired dog"]
    expected = theirs.encode_text(open_clip.get_tokenizer(f"local-dir:{tiny_model}")(prompts), normalize=True)
    torch.testing.assert_close(ours.encode_text(prompts), expected)


def test_class_features_are_the_normalised_mean_of_normalised_prompts(tiny_model: Path) -> None:
    model = CLIPModel(pretrained=str(tiny_model))
    task = Task("t", ("cat", "dog"), ("a {}", "one {} alone", "many {}s"))
    rows = []
    for name in ("cat", "dog"):
        tokens = model.tokenizer([f"a {name}", f"one {name} alone", f"many {name}s"])
        features = model.net.encode_text(tokens)
        mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    torch.testing.assert_close(model.encode_classes(task), torch.stack(rows))


def test_other_sizes_are_resized_inside_bicubically_without_antialiasing(tiny_model: Path) -> None:
    model = CLIPModel(pretrained=str(tiny_model))
    images = torch.rand(2, 3, 20, 20)
    resized = F.interpolate(images, (32, 32), mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(model.encode_image(images), model.encode_image(resized))


def test_gradients_reach_the_native_pixels(tiny_model: Path) -> None:
    images = torch.rand(2, 3, 20, 20, requires_grad=True)
    CLIPModel(pretrained=str(tiny_model)).encode_image(images)[:, 0].sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.99


@pytest.fixture(scope="module")
def resnet() -> CLIPModel:
    return CLIPModel("RN50", None)


def test_a_file_of_weights_is_loaded(resnet: CLIPModel, tiny_model: Path, tmp_path: Path) -> None:
    torch.save(resnet.net.state_dict(), tmp_path / "weights.pt")
    again = CLIPModel("RN50", str(tmp_path / "weights.pt"))
    assert again.fingerprint == resnet.fingerprint
    assert CLIPModel(pretrained=str(tiny_model)).fingerprint != resnet.fingerprint


def test_batch_norm_stays_in_eval_mode_unless_it_is_wanted(resnet: CLIPModel) -> None:
    model = resnet
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms), "from the start, since Lightning does not call train()"
    model.eval()
    model.train()
    assert not any(norm.training for norm in norms)
    wanted = CLIPModel("RN50", None, has_fixed_batch_norm=False)
    assert all(module.training for module in wanted.modules() if isinstance(module, nn.BatchNorm2d))


def test_blocks_are_found(resnet: CLIPModel, tiny_model: Path) -> None:
    assert len(resnet.image_blocks()) == 16
    assert len(CLIPModel(pretrained=str(tiny_model)).image_blocks()) == 2


def test_a_vit_takes_another_image_size(tiny_model: Path) -> None:
    model = CLIPModel(pretrained=str(tiny_model), image_size=64)
    assert model.image_size == 64
    assert model.net.visual.positional_embedding.shape[0] == 65


def test_paths_in_a_folder_are_relative_to_it(
    real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = CLIPModel(pretrained=str(real_model), image_size=64)
    similarity = model.encode_text(["a dog", "a puppy", "an aeroplane"]) @ model.encode_text(["a dog"]).T
    assert similarity[0] > similarity[1] > similarity[2]


def test_weights_that_do_not_fit_name_both_sides(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] += 8
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").write_bytes((tiny_model / "open_clip_model.safetensors").read_bytes())
    width = load_file(tiny_model / "open_clip_model.safetensors")["text_projection"].shape[1]
    with pytest.raises(ValueError, match=f"{width}.*{width + 8}"):
        CLIPModel(pretrained=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ViT-B-32", "openai"), "QuickGELU.*GELU.*ViT-B-32-quickgelu"),
        (("ViT-B-32", "nowhere"), "neither a file nor a folder nor a tag"),
        (("ViT-Z-99", None), "no architecture 'ViT-Z-99'"),
        ((None, "nowhere.pt"), "arch is missing"),
    ],
)
def test_models_that_do_not_exist_are_refused(arguments: tuple[str | None, str | None], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CLIPModel(*arguments)
