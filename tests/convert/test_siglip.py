"""SigLIP comes in from the Hugging Face library with its features, logits, tokenizer and pixels, and goes out again."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from checkpoint_cases import fitted
from library_cases import CONTEXT, SIZE, change, randomised, write_siglip
from safetensors.torch import load_file, save_file

from robustclip.convert.exporting import export
from robustclip.convert.importing import import_checkpoint
from robustclip.methods import ZeroShot
from robustclip.models.clip import CLIPModel

transformers = pytest.importorskip("transformers")
TEXTS = ["a photo of a cat", "the red circle in the sky", "x", "dog " * 30]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library") / "siglip"
    write_siglip(folder)
    return folder


@pytest.fixture(scope="module")
def imported(source: Path) -> Path:
    import_checkpoint(source, source.parent / "imported")
    return source.parent / "imported"


def copied(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def library_outputs(folder: Path, pixels: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Outputs of the library for `TEXTS`, and their token ids by the library's own tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return transformers.SiglipModel.from_pretrained(folder).eval()(input_ids=tokens, pixel_values=pixels), tokens


def test_features_and_logits_are_those_of_the_library(source: Path, imported: Path) -> None:
    model = CLIPModel(pretrained=str(imported)).eval()
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    theirs, tokens = library_outputs(source, (images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / model.std)
    assert torch.equal(model.tokenizer(TEXTS), tokens)
    with torch.no_grad():
        seen, read = model.encode_image(images), model.encode_text(TEXTS)
        logits = model.logit_scale * seen @ read.T + model.net.logit_bias
    torch.testing.assert_close(seen, theirs.image_embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read, theirs.text_embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, theirs.logits_per_image, rtol=1e-5, atol=1e-5)
    assert float(model.net.logit_bias.detach()) == -7.5


def test_raw_embeddings_are_those_of_the_library_too(source: Path, imported: Path) -> None:
    model, library = CLIPModel(pretrained=str(imported)).eval(), transformers.SiglipModel.from_pretrained(source).eval()
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = library.vision_model(pixel_values=(images - model.mean) / model.std).pooler_output
        torch.testing.assert_close(model.embed_image(images), expected, rtol=1e-5, atol=1e-5)


def test_texts_are_canonicalised_as_in_siglips_training(imported: Path) -> None:
    tokens = CLIPModel(pretrained=str(imported)).tokenizer(["A photo, of the CAT!", "a photo of the cat"])
    assert torch.equal(tokens[0], tokens[1])


def test_pixels_and_sizes_are_those_of_the_checkpoint(imported: Path) -> None:
    model = CLIPModel(pretrained=str(imported))
    assert model.image_size == SIZE
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.5, 0.4, 0.3]))
    torch.testing.assert_close(model.std.flatten(), torch.tensor([0.2, 0.25, 0.3]))
    content = json.loads((imported / "open_clip_config.json").read_text())
    assert content["preprocess_cfg"]["interpolation"] == "bicubic"
    assert content["preprocess_cfg"]["resize_mode"] == "squash"


@pytest.mark.parametrize("activations", [("gelu", "gelu_pytorch_tanh"), ("gelu_pytorch_tanh", "gelu")])
def test_each_tower_keeps_its_own_activation(activations: tuple[str, str], tmp_path: Path) -> None:
    image, text = activations
    write_siglip(tmp_path / "in", vision={"hidden_act": image}, text={"hidden_act": text})
    import_checkpoint(tmp_path / "in", tmp_path / "out")
    settings = CLIPModel(pretrained=str(tmp_path / "out")).settings
    assert settings["base.timm.act_layer"] == {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}[image]
    change(tmp_path / "in" / "config.json", vision_config={"hidden_act": text})
    import_checkpoint(tmp_path / "in", tmp_path / "other")
    seen = [
        CLIPModel(pretrained=str(tmp_path / name)).eval().encode_image(torch.rand(1, 3, SIZE, SIZE).fill_(0.7))
        for name in ("out", "other")
    ]
    assert not torch.allclose(*seen, atol=1e-5), "the two activations can be told apart"


def test_plain_open_clip_reads_the_folder_from_inside(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(imported)
    net = open_clip.create_model("local-dir:.").eval()
    tokens = open_clip.get_tokenizer("local-dir:.")(TEXTS)
    ours = CLIPModel(pretrained=str(imported)).eval()
    with torch.no_grad():
        torch.testing.assert_close(net.encode_text(tokens, normalize=True), ours.encode_text(TEXTS))


def test_another_image_size_is_resampled_and_goes_out(imported: Path, tmp_path: Path) -> None:
    from robustclip.convert import open_clip_folder

    model = CLIPModel(pretrained=str(imported), image_size=48)
    open_clip_folder.write(model, tmp_path)
    assert open_clip_folder.check_folder(tmp_path, model) <= open_clip_folder.TOLERANCE
    assert CLIPModel(pretrained=str(tmp_path)).image_size == 48


CONFIG, PIXELS = "config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (CONFIG, {"model_type": "siglip2"}, "model of type 'siglip2'; only clip and siglip"),
        (CONFIG, {"vision_config": {"hidden_act": "relu"}}, r"vision_config.hidden_act must be one of .*got 'relu'"),
        (CONFIG, {"vision_config": {"layer_norm_eps": 1e-5}}, "layer_norm_eps must be 1e-06, got 1e-05"),
        (CONFIG, {"vision_config": {"vision_use_head": False}}, "vision_use_head must be True"),
        (CONFIG, {"vision_config": {"image_size": [32, 48]}}, "image_size must be one number"),
        (CONFIG, {"text_config": {"projection_size": 16}}, "hidden_size must be 16, got 32"),
        (CONFIG, {"text_config": {"vocab_size": 20}}, "has the token .*only 20 tokens"),
        (PIXELS, {"resample": 0}, "resample 0 is neither 2 nor 3"),
        (PIXELS, {"do_normalize": False}, "do_normalize must be true, got False"),
        (PIXELS, {"rescale_factor": 1 / 127.5}, "rescale_factor must be 1/255"),
        (PIXELS, {"image_mean": [0.5]}, "image_mean must be three numbers"),
        (PIXELS, {"size": 48}, "must give 32x32 pixels"),
    ],
)
def test_unsupported_options_are_refused_in_one_line(
    file: str, changes: dict[str, Any], words: str, source: Path, tmp_path: Path
) -> None:
    change(copied(source, tmp_path / "in") / file, **changes)
    assert_refused(tmp_path, words)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("tokenizer.json", "has no tokenizer"),
        ("tokenizer_config.json", "has no tokenizer_config.json, which names the class"),
        ("preprocessor_config.json", "has no preprocessor_config.json"),
        ("model.safetensors", "has no model.safetensors"),
    ],
)
def test_missing_files_are_named(missing: str, words: str, source: Path, tmp_path: Path) -> None:
    (copied(source, tmp_path / "in") / missing).unlink()
    assert_refused(tmp_path, words)


@pytest.mark.parametrize("name", ["vision_model.head.probe", "text_model.encoder.layers.1.self_attn.k_proj.bias"])
def test_a_missing_or_unknown_tensor_is_named(name: str, source: Path, tmp_path: Path) -> None:
    file = copied(source, tmp_path / "in") / "model.safetensors"
    state = load_file(file)
    tensor = state.pop(name)
    save_file(state, file, metadata={"format": "pt"})
    assert_refused(tmp_path, name.rpartition(".")[2] if "k_proj" in name else "attn_pool.latent")
    save_file({**state, name: tensor, "vision_model.adapter.weight": tensor.clone()}, file)
    assert_refused(tmp_path, "'vision_model.adapter.weight' is no tensor of a SiglipModel")


def assert_refused(folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        import_checkpoint(folder / "in", folder / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["in"]


def trained(folder: Path) -> ZeroShot:
    """A model whose tensors have all moved from the imported ones."""
    method = ZeroShot(pretrained=str(folder), image_size=48)
    randomised(method, seed=3)
    return method


@pytest.mark.parametrize("to", ["hf", "open_clip"])
def test_a_changed_model_goes_out_and_comes_back(to: str, imported: Path, tmp_path: Path) -> None:
    method = trained(imported)
    export(method, tmp_path / "out", to=to)
    again = tmp_path / "out"
    if to == "hf":
        images = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(2))
        theirs, _ = library_outputs(again, (images - method.clip.mean) / method.clip.std)
        with torch.no_grad():
            ours = method.clip.encode_image(images) @ method.clip.encode_text(TEXTS).T * method.clip.logit_scale
        torch.testing.assert_close(theirs.logits_per_image, ours + method.clip.net.logit_bias, rtol=1e-5, atol=1e-5)
        processor = transformers.AutoImageProcessor.from_pretrained(again)
        assert (processor.size["height"], processor.size["width"], processor.resample) == (48, 48, 3)
        import_checkpoint(again, tmp_path / "again")
        again = tmp_path / "again"
    expected, state = method.clip.net.state_dict(), CLIPModel(pretrained=str(again)).net.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("transformers.SiglipModel" if to == "hf" else 'create_model("local-dir:.")') in card


@pytest.mark.slow
def test_a_siglip_is_trained_under_attack_and_goes_out(imported: Path, tmp_path: Path) -> None:
    method = fitted(imported, tmp_path / "last.ckpt")
    export(method, tmp_path / "out", to="hf")
    before, after = (
        transformers.SiglipModel.from_pretrained(folder).state_dict()
        for folder in (imported.parent / "siglip", tmp_path / "out")
    )
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("vision_model.") for name in changed)


@pytest.mark.parametrize(
    ("section", "option", "words"),
    [
        ("text_cfg", {"pool_type": "first"}, "text_cfg.pool_type = 'first'"),
        ("text_cfg", {"act_kwargs": None}, "lacks the option"),
        ("vision_cfg", {"timm_proj": "linear"}, "vision_cfg.timm_proj = 'linear'"),
    ],
)
def test_an_export_refuses_options_that_the_library_lacks(
    section: str, option: dict[str, Any], words: str, imported: Path, tmp_path: Path
) -> None:
    method = trained(imported)
    method.clip.config[section] |= option
    with pytest.raises(ValueError, match=f"{words}.*export --to open_clip instead") as caught:
        export(method, tmp_path / "out", to="hf")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_swapped_keys_and_values_are_noticed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at import must see what a wrong conversion would do."""
    from robustclip.convert import siglip, tensor_names

    copied(source, tmp_path / "in")
    monkeypatch.setattr(tensor_names, "LETTERS", "qvk")
    assert_refused(tmp_path, "other logits")
    monkeypatch.undo()
    monkeypatch.setattr(siglip, "TIMM_ACTIVATIONS", {"tanh": "gelu"})
    assert_refused(tmp_path, "other logits")
