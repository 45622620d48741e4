"""Folders and repositories as ``save_pretrained`` of the Hugging Face library writes them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import one_tokenizer
from hub_server import NEW, OLD, files_of, serving
from library_cases import SIZE, change, write_clip, write_pixels, write_siglip
from torch.nn import functional as F

from robustclip.convert.importing import import_checkpoint
from robustclip.methods import ZeroShot
from robustclip.models.clip import CLIPModel
from robustclip.models.weight_origin import Origin, read_origin, write_origin
from robustclip.types import TrainingImages

transformers = pytest.importorskip("transformers")
TEXTS = ["a photo of a cat", "two dogs, it's raining!", "x"]


@pytest.fixture(scope="module", autouse=True)
def tokenizer() -> Iterator[None]:
    with one_tokenizer():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library") / "clip"
    write_clip(folder)
    return folder


@pytest.fixture
def library(source: Path) -> Any:
    return transformers.CLIPModel.from_pretrained(source).eval()


def assert_features(model: CLIPModel, library: Any) -> None:
    """Compares unit features with the library's, for the same pixels and token ids."""
    model.eval()
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        seen = library.vision_model(pixel_values=(images - model.mean) / model.std).pooler_output
        read = library.text_model(input_ids=model.tokenizer(TEXTS)).pooler_output
        seen, read = library.visual_projection(seen), library.text_projection(read)
        torch.testing.assert_close(model.encode_image(images), F.normalize(seen, dim=-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.encode_text(TEXTS), F.normalize(read, dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.logit_scale, library.logit_scale.exp())


def pickled(folder: Path, library: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(library.state_dict(), folder / "pytorch_model.bin")


def in_parts(folder: Path, library: Any) -> None:
    (folder / "model.safetensors").unlink()
    library.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1


def beside_others(folder: Path, library: Any) -> None:
    (folder / "model.fp16.safetensors").write_bytes(b"of another precision")
    (folder / "pytorch_model.bin").write_bytes(b"never read beside safetensors")


@pytest.mark.parametrize("layout", [lambda *_: None, pickled, in_parts, beside_others])
def test_each_layout_of_the_weights_gives_the_librarys_features(
    layout: Callable[[Path, Any], None], library: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library.save_pretrained(tmp_path / "in")
    layout(tmp_path / "in", library)
    import_checkpoint(tmp_path / "in", tmp_path / "out")
    assert "has no preprocessor_config.json: images are normalised as OpenAI's" in capsys.readouterr().out
    assert_features(CLIPModel(pretrained=str(tmp_path / "out")), library)


def test_half_precision_is_read_as_it_is_stored(library: Any, tmp_path: Path) -> None:
    library.half().save_pretrained(tmp_path / "in")
    import_checkpoint(tmp_path / "in", tmp_path / "out")
    assert_features(CLIPModel(pretrained=str(tmp_path / "out")), library.float())


CROP = {"do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}}


@pytest.mark.parametrize(
    ("options", "mode", "interpolation", "words"),
    [
        ({"size": {"shortest_edge": SIZE}, **CROP}, "shortest", "bicubic", ""),
        ({"size": SIZE, "crop_size": SIZE, "resample": 2}, "shortest", "bilinear", ""),  # as OpenAI's first folders
        ({"size": {"shortest_edge": 37}, **CROP}, "shortest", "bicubic", "a short side of 37 before the crop"),
        ({"size": {"height": SIZE, "width": SIZE}}, "squash", "bicubic", "were squashed to 32x32"),
    ],
)
def test_the_preprocessing_is_that_of_the_folder(
    options: dict[str, Any], mode: str, interpolation: str, words: str,
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = copied(source, tmp_path / "in")
    write_pixels(folder, image_processor_type="CLIPImageProcessor", **options)
    import_checkpoint(folder, tmp_path / "out")
    told = capsys.readouterr().out
    assert words in told
    assert len(told.splitlines()) == 2 + bool(words)
    pixels = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert pixels == {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "interpolation": interpolation,
        "resize_mode": mode,
    }


def copied(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for name, content in files_of(source).items():
        (folder / name).write_bytes(content)
    return folder


def lose_a_part(folder: Path, library: Any) -> None:
    in_parts(folder, library)
    min(folder.glob("model-*")).unlink()


def point_outside(folder: Path, library: Any) -> None:
    in_parts(folder, library)
    change(folder / "model.safetensors.index.json", weight_map={"logit_scale": "../a.safetensors"})


def swap_two_words(folder: Path, _: Any) -> None:
    (folder / "vocab.json").write_text(json.dumps({"cat</w>": 1, "dog</w>": 0}))


def crop_too_small(folder: Path, _: Any) -> None:
    write_pixels(folder, size={"shortest_edge": SIZE}, crop_size={"height": 24, "width": 24})


def empty_configuration(folder: Path, _: Any) -> None:
    (folder / "config.json").write_text("[]")


def widths_as_text(folder: Path, _: Any) -> None:
    change(folder / "config.json", text_config={"hidden_size": "wide"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_part, "lacks 'model-00001-of-.*', a part of the weights"),
        (point_outside, "names '../a.safetensors', which must be a file of its folder"),
        (swap_two_words, "has another vocabulary than OpenAI's CLIP"),
        (crop_too_small, "must give 32x32 pixels, as the model takes"),
        (empty_configuration, "config.json must hold a mapping in JSON"),
        (widths_as_text, "config.json cannot be read: .*(hidden_size|'str')"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(
    damage: Callable[[Path, Any], None], words: str, library: Any, tmp_path: Path
) -> None:
    library.save_pretrained(tmp_path / "in")
    damage(tmp_path / "in", library)
    with pytest.raises(ValueError, match=words) as caught:
        import_checkpoint(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_configuration_are_refused_by_the_name_of_the_folder(library: Any, tmp_path: Path) -> None:
    library.save_pretrained(tmp_path / "in")
    change(tmp_path / "in" / "config.json", vision_config={"patch_size": 16})
    with pytest.raises(ValueError, match=r"the weights of .*/in do not fit its config.json: .*conv1.weight") as caught:
        import_checkpoint(tmp_path / "in", tmp_path / "out")
    assert ".out." not in str(caught.value)


def test_an_imported_model_keeps_the_origin_of_its_weights(library: Any, tmp_path: Path) -> None:
    library.save_pretrained(tmp_path / "in")
    write_origin(tmp_path / "in", Origin("TeCoA", "PGD(eps=1/255)", "b", TrainingImages(9, ("c",))))
    import_checkpoint(tmp_path / "in", tmp_path / "out")
    assert read_origin(tmp_path / "out") == read_origin(tmp_path / "in")
    assert ZeroShot(pretrained=str(tmp_path / "out")).is_robust


def test_a_folder_in_another_layout_is_refused_with_the_command_that_converts_it(source: Path) -> None:
    with pytest.raises(
        ValueError, match=r"layout of the Hugging Face library; convert it by `robustclip import .*clip"
    ):
        CLIPModel(pretrained=str(source))


def test_a_repository_of_the_library_is_imported_at_its_commit(source: Path, library: Any, tmp_path: Path) -> None:
    write_siglip(tmp_path / "siglip")
    with serving(tmp_path / "cache") as server:
        server.publish("lab/clip", {**files_of(source), "pytorch_model.bin": b"x", "README.md": b"x"}, OLD, "v1")
        server.publish("lab/siglip", files_of(tmp_path / "siglip"), NEW)
        import_checkpoint(Path("hf-hub:lab/clip@v1"), tmp_path / "a")
        assert not server.downloads() & {"pytorch_model.bin", "README.md"}
        import_checkpoint(Path("hf-hub:lab/siglip"), tmp_path / "b")
    model = CLIPModel(pretrained=str(tmp_path / "a"))
    assert_features(model, library)
    assert model.source == {"repository": "lab/clip", "commit": OLD}
    assert CLIPModel(pretrained=str(tmp_path / "b")).source == {"repository": "lab/siglip", "commit": NEW}


def test_a_repository_has_its_own_architecture() -> None:
    with pytest.raises(ValueError, match="hf-hub:lab/clip defines its own architecture; omit --arch"):
        import_checkpoint(Path("hf-hub:lab/clip"), Path("out"), arch="ViT-B-32")
