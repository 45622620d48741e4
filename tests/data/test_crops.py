"""The crop `clip` gives open_clip's own pixels, and no two crops are taken for one another."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from helpers import ShardWriter, write_shards
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from robustclip.cli.main import run
from robustclip.convert.exporting import export
from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.transforms import ToPixels
from robustclip.methods import ZeroShot
from robustclip.models.clip import CLIPModel
from robustclip.types import Crop

SETS = ("caltech101", "oxford_pets", "food101_10", "dtd_10", "pacs_photo", "pacs_sketch", "imagenet1k", "tiny_imagenet")
CROPS: tuple[Crop, ...] = ("tecoa", "clip", "squash")
SIZE = 96

SHAPES = [(1, 1), (1, 77), (500, 3), (224, 224), (225, 224), (224, 225), (223, 500), (333, 37), (97, 96), (96, 191)]


def open_clip_pixels(size: int, resize_mode: str = "shortest") -> Any:
    """open_clip's evaluation transform with a normalisation that changes nothing."""
    return image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode)


def noise(height: int, width: int, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values if channels > 1 else values[..., 0])


@pytest.mark.parametrize(("crop", "mode"), [("clip", "shortest"), ("squash", "squash")])
@pytest.mark.parametrize("size", [32, 33, 96, 97])
def test_clip_and_squash_give_the_pixels_of_open_clip(size: int, crop: Crop, mode: str) -> None:
    ours, theirs = ToPixels(size, crop=crop), open_clip_pixels(size, mode)
    for height, width in SHAPES:
        for channels in (3, 1):
            image = noise(height, width, channels)
            assert torch.equal(ours(image), theirs(image)), (height, width, channels)


def test_clip_equals_open_clip_for_random_sizes() -> None:
    random = np.random.default_rng(0)
    for height, width, size in random.integers(8, 150, (60, 3)).tolist():
        image = noise(height, width)
        assert torch.equal(ToPixels(size, crop="clip")(image), open_clip_pixels(size)(image)), (height, width, size)


def test_the_crops_differ_in_pixels_and_in_their_description() -> None:
    image = noise(120, 90)
    tecoa, clip = ToPixels(56), ToPixels(56, crop="clip")
    assert not torch.equal(tecoa(image), clip(image))
    assert tecoa.description == "RGB, short side 64 bilinear antialiased, centre crop 56"
    assert clip.description == "RGB, short side 56 bicubic antialiased, centre crop 56"
    assert ToPixels(56, crop="squash").description == "RGB, squashed to 56 x 56 bicubic antialiased"


def test_a_tensor_is_cropped_as_an_image_and_stays_in_range() -> None:
    ramp = np.add.outer(np.arange(54), np.arange(60))[..., None].repeat(3, 2).astype(np.uint8)
    edges = np.tile(np.array([[0, 255], [255, 0]], np.uint8).repeat(9, 0).repeat(9, 1), (3, 3))[..., None].repeat(3, 2)
    by_image, by_tensor = (ToPixels(40, crop="clip")(given) for given in (Image.fromarray(ramp), tensor_of(ramp)))
    assert (by_image - by_tensor).abs().max() <= 1.01 / 255  # Pillow rounds to 8 bits after each direction
    sharp = ToPixels(40, crop="clip")(tensor_of(edges))  # bicubic interpolation overshoots here
    assert float(sharp.min()) == 0
    assert float(sharp.max()) == 1


def tensor_of(values: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(values).permute(2, 0, 1) / 255


def module(folder: Path, **options: Any) -> CLIPDataModule:
    data = CLIPDataModule(root=str(folder), batch_size=4, **{"image_size": 24, "train": "wds:set", **options})
    data.setup("test" if "test" in options else "fit")
    return data


def preprocessing(data: CLIPDataModule) -> dict[str, str]:
    return {task.name: data.protocol(task.name)["preprocessing"] for task in data.test_tasks}


def test_a_source_may_have_another_crop_than_the_module(tmp_path: Path, write_shards: ShardWriter) -> None:
    for name in ("one", "two", "small"):
        write_shards(tmp_path, name, "test", [3], size=40)
    others = [DataSource("wds:two", crop="tecoa"), DataSource("wds:small", native_size=True)]
    data = module(tmp_path, test=["wds:one", *others], crop="clip")
    assert preprocessing(data) == {
        "one": "RGB, short side 24 bicubic antialiased, centre crop 24",
        "two": "RGB, short side 27 bilinear antialiased, centre crop 24",
        "small": "RGB, own size",
    }
    one, two, small = (next(iter(loader)).images for loader in data.test_dataloader())
    assert small.shape[-1] == 40
    assert torch.equal(one[0], ToPixels(24, crop="clip")(_first(tmp_path / "one")))
    assert torch.equal(two[0], ToPixels(24)(_first(tmp_path / "two")))


def _first(folder: Path) -> Image.Image:
    data = CLIPDataModule(test=[DataSource(f"wds:{folder}", native_size=True)])
    data.setup("test")
    image: Image.Image = data._test[0].dataset[0][0]  # type: ignore[index]
    return image


def test_training_and_captions_follow_the_crop(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "set", "train", [3], size=40)
    pixels = {}
    for crop in CROPS:
        data = module(tmp_path, crop=crop, holdout=0, captioned="pairs")
        (batch,) = data.train_dataloader()
        pixels[crop] = batch.images[batch.index.argsort()]
        image = data._opened_train().dataset[0][0]  # type: ignore[index]
        assert torch.equal(pixels[crop][0], ToPixels(24, crop=crop)(image))  # type: ignore[arg-type]
        assert data.image_sets[0].transform.crop == crop
    assert not torch.equal(pixels["tecoa"], pixels["clip"])
    # The images are square, so that a squashed one is the clip crop.
    assert torch.equal(pixels["squash"], pixels["clip"])
    by_source = module(tmp_path, train=DataSource("wds:set", crop="clip"), holdout=0)
    (batch,) = by_source.train_dataloader()
    assert torch.equal(batch.images[batch.index.argsort()], pixels["clip"])


def test_joined_sets_must_have_one_crop(tmp_path: Path, write_shards: ShardWriter) -> None:
    for name in ("one", "two"):
        write_shards(tmp_path, name, "train", [3])
    with pytest.raises(ValueError, match=r"one.*two.*crop"):
        module(tmp_path, train=[DataSource("wds:one", crop="clip"), "wds:two"])


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The result of one test for each crop, by command."""
    folder = tmp_path_factory.mktemp("crops")
    write_shards(folder, "set", "test", [6], size=40)
    words = ["test", "--model", "ZeroShot", "--model.pretrained", "shapes", "--data.test", "[wds:set]"]
    words += ["--data.root", str(folder), "--evaluation.attacks", "{}", "--results.folder", str(folder / "results")]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    for crop in CROPS:
        assert run([*words, "--data.image_size", "32", "--data.crop", crop, "--results.name", crop]) == 0
    return {crop: folder / "results" / crop for crop in CROPS}


@pytest.mark.slow
def test_unlike_crops_refuse_to_compare(tests: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(tests["tecoa"]), str(tests["clip"])]) != 0
    message = capsys.readouterr().err
    assert "preprocessing" in message
    assert "short side 37 bilinear" in message
    assert "short side 32 bicubic" in message
    assert run(["compare", str(tests["clip"]), str(tests["clip"])]) == 0


@pytest.mark.parametrize("crop", CROPS)
def test_an_exported_model_states_the_crop_of_its_test(crop: str, tests: dict[str, Path], tmp_path: Path) -> None:
    assert run(["export", str(tests[crop]), "--out", str(tmp_path / "out")]) == 0
    size = CLIPModel(pretrained=str(tmp_path / "out")).image_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`crop: {crop}`" in card
    image = noise(120, 90)
    if crop != "tecoa":  # the folder alone gives the pixels of the measurement
        _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    else:  # the model card's code does
        scope: dict[str, Any] = {}
        exec(card.split("```python\n")[-1].split("```")[0], scope)
        preprocess = scope["preprocess"]
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert config["interpolation"] == ("bilinear" if crop == "tecoa" else "bicubic")
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    expected = (ToPixels(size, crop=crop)(image) - mean) / std  # type: ignore[arg-type]
    torch.testing.assert_close(preprocess(image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("crop", CROPS)
def test_a_hugging_face_folder_crops_as_the_training_did(crop: str, tiny_model: Path, tmp_path: Path) -> None:
    training = {"model": {}, "data": {"class_path": "robustclip.data.CLIPDataModule", "init_args": {"crop": crop}}}
    export(ZeroShot(pretrained=str(tiny_model)), tmp_path / "out", to="hf", training=training)
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    square = {"height": 32, "width": 32}
    sides = {"tecoa": {"shortest_edge": 37}, "clip": {"shortest_edge": 32}, "squash": square}  # round(32 * 256 / 224)
    assert settings["size"] == sides[crop]
    assert settings["resample"] == (2 if crop == "tecoa" else 3)  # Pillow's bilinear and bicubic
    assert settings.get("crop_size") == (None if crop == "squash" else square)


def test_a_model_without_a_record_claims_no_crop(tiny_model: Path, tmp_path: Path) -> None:
    export(ZeroShot(pretrained=str(tiny_model)), tmp_path / "out")
    assert "How images were prepared is not recorded." in (tmp_path / "out" / "README.md").read_text()


class _Theirs(Dataset[tuple[Tensor, Tensor]]):
    """Images by our transform and by open_clip's, both before normalisation."""

    def __init__(self, images: Any) -> None:
        self.images, self.ours, self.theirs = images, ToPixels(SIZE, crop="clip"), open_clip_pixels(SIZE)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image = self.images[number][0]
        image.load()
        return self.ours(image), self.theirs(image.convert("RGB"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_all_photographs_are_classified_as_by_open_clip(name: str, photographs: Path, real_model: Path) -> None:
    method = ZeroShot(pretrained=str(real_model), image_size=SIZE).eval()
    data = CLIPDataModule(test=[f"wds:{name}"], root=str(photographs), image_size=SIZE, crop="clip")
    data.setup("test")
    (task,) = data.test_tasks
    method.prepare([task])
    net: nn.Module = method.clip.net  # open_clip's own model, used as its users do
    count = 0
    with torch.no_grad():
        head = method.class_features(task)
        for ours, theirs in DataLoader(_Theirs(data._test[0].dataset), batch_size=50):
            assert torch.equal(ours, theirs)
            pixels = (theirs - method.clip.mean) / method.clip.std
            features = nn.functional.normalize(net.encode_image(pixels), dim=-1)  # type: ignore[operator]
            expected = (features @ head.T).argmax(-1)
            assert torch.equal(method.logits(ours, task.name).argmax(-1), expected)
            count += len(ours)
    assert count == len(data._test[0].dataset)  # type: ignore[arg-type]
