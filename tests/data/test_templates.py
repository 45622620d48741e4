"""Templates of clip_benchmark belong to sets of the catalogue, and nothing is put into one that does not fit."""

from pathlib import Path

import pytest
from helpers import ShardWriter
from PIL import Image

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.catalog import CATALOG
from robustclip.data.opened_source import open_source
from robustclip.data.template_sets import CLIP_BENCHMARK

# Number of templates, the first and the last one in `en_zeroshot_classification_templates.json`.
PUBLISHED = {
    "imagenet": (80, "a bad photo of a {}.", "a tattoo of the {}."),
    "imagenet_r": (80, "a bad photo of a {}.", "a tattoo of the {}."),
    "cifar10": (18, "a photo of a {}.", "a photo of the big {}."),
    "cifar100": (18, "a photo of a {}.", "a photo of the big {}."),
    "stl10": (2, "a photo of a {}.", "a photo of the {}."),
    "caltech101": (34, "a photo of a {}.", "a doodle of the {}."),
    "oxford_pets": (1, "a photo of a {}, a type of pet.", "a photo of a {}, a type of pet."),
    "stanford_cars": (8, "a photo of a {}.", "a photo of my old {}."),
    "food101": (1, "a photo of {}, a type of food.", "a photo of {}, a type of food."),
    "flowers102": (1, "a photo of a {}, a type of flower.", "a photo of a {}, a type of flower."),
    "fgvc_aircraft": (2, "a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "sun397": (2, "a photo of a {}.", "a photo of the {}."),
    "dtd": (8, "a photo of a {} texture.", "a photo of the {} object."),
    "eurosat": (3, "a centered satellite photo of {}.", "a centered satellite photo of the {}."),
    "pcam": (2, "a histopathology slide showing {}", "histopathology image of {}"),
}


def test_templates_are_the_published_ones() -> None:
    found = {name: (len(set(texts)), texts[0], texts[-1]) for name, texts in CLIP_BENCHMARK.items()}
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED
    assert CLIP_BENCHMARK["cifar10"][7:9] == ("a photo of a small {}.", "a photo of a big {}.")
    assert CLIP_BENCHMARK["caltech101"][8:12] == (
        *("a embroidered {}.", "a cartoon {}.", "a {} in a video game.", "a plushie {}."),
    )
    assert CLIP_BENCHMARK["caltech101"][19:21] == ("the plastic {}.", "a sculpture of the {}.")
    assert set(CLIP_BENCHMARK) <= set(CATALOG)


def test_a_set_gets_its_own_templates_by_name(tmp_path: Path, write_shards: ShardWriter) -> None:
    names = [name.upper() for name in CATALOG["stl10"].class_names]
    write_shards(tmp_path, "stl10", "test", [3], names)
    write_shards(tmp_path, "mine", "test", [3], CATALOG["dtd"].class_names)
    sources = [
        DataSource("wds:stl10", templates="clip_benchmark"), DataSource("wds:mine", "dtd", templates="clip_benchmark")
    ]  # fmt: skip
    data = CLIPDataModule(test=sources, root=str(tmp_path))
    data.setup("test")
    stl10, textures = data.test_tasks
    assert stl10.templates == ("a photo of a {}.", "a photo of the {}.")
    assert list(stl10.class_names) == names, "class names come with the data"
    assert textures.prompts[0][4] == "a photo of the banded texture."


def test_a_set_without_published_templates_is_refused(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "mine", "test", [3], ["bird", "car", "chair", "dog", "person"])
    for name in (None, "vlcs_sun"):
        with pytest.raises(ValueError, match=r"wds:mine.*templates: clip_benchmark.*known for imagenet"):
            open_source(DataSource("wds:mine", name, templates="clip_benchmark"), root=str(tmp_path), split="test")


def test_templates_refuse_class_names_that_are_sentences(tmp_path: Path) -> None:
    for number, name in enumerate(CATALOG["eurosat"].folders):
        (tmp_path / "eurosat" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "eurosat" / name / "1.png")
    with pytest.raises(ValueError, match=r"does not fit class names such as 'annual crop land'"):
        open_source(DataSource("folder:eurosat", templates="clip_benchmark"), root=str(tmp_path), split="test")
    names = [f"land {number}" for number in range(10)]
    folders = dict(zip(CATALOG["eurosat"].folders, names, strict=True))
    source = DataSource("folder:eurosat", class_names=dict(folders), templates="clip_benchmark")
    task = open_source(source, root=str(tmp_path), split="test").task
    assert task.prompts[0][1] == "a centered satellite photo of a land 0."
