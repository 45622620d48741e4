"""The shapes world: deterministic images, honest splits and a model that knows its words."""

import hashlib
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from robustclip.data.sources.scenes import COLOURS, SHAPES
from robustclip.data.sources.shapes import (
    HELD_OUT_PAIRS,
    SHAPES_SETS,
    SOURCE_PAIRS,
    ShapesDataset,
    describe,
    pretraining_pair,
)

ZERO_SHOT = SHAPES_SETS[1:]
# Recorded once: a change means that every published number of the shapes world has to be measured again.
PIXELS = {
    "source/train": "20e8c7f0142b8270",
    "source/test": "688ebc284615884f",
    "shapes/test": "bb45e8b5e7271ebf",
    "textures/test": "c552fa6c4b71acca",
    "backgrounds/test": "a44fd9b8ed53d778",
    "count_shapes/test": "92cd0ffcc4763ba2",
    "outlines/test": "7fb6ad9a9ee4ca18",
    "mosaics/test": "9ea5997b517d96e0",
    "faint_prints/test": "b66d2ea3db030f07",
}


def fingerprint(name: str, split: str = "test", count: int = 40) -> str:
    dataset = ShapesDataset(name, split)
    return hashlib.sha256(b"".join(dataset[index][0].tobytes() for index in range(count))).hexdigest()[:16]


def pairs_in(text: str) -> set[tuple[str, str]]:
    words = set(text.replace("crosses", "cross").split())
    words |= {word.removesuffix("s") for word in words}
    return {(colour, shape) for colour in COLOURS for shape in SHAPES if {colour, shape} <= words}


def test_there_are_one_source_and_fifteen_zero_shot_sets() -> None:
    assert SHAPES_SETS[0] == "source"
    assert len(ZERO_SHOT) == 15
    assert len(set(SHAPES_SETS)) == 16
    assert all(name.isidentifier() and name == name.lower() for name in SHAPES_SETS)


@pytest.mark.parametrize("name", sorted(PIXELS))
def test_pixels_are_the_recorded_ones(name: str) -> None:
    set_name, split = name.split("/")
    assert fingerprint(set_name, split) == PIXELS[name]


def test_pixels_do_not_depend_on_the_order_of_access() -> None:
    dataset = ShapesDataset("shapes")
    backwards = [dataset[index][0].tobytes() for index in reversed(range(40))][::-1]
    assert hashlib.sha256(b"".join(backwards)).hexdigest()[:16] == PIXELS["shapes/test"]


@pytest.mark.parametrize("name", SHAPES_SETS)
def test_labels_are_balanced_and_cover_every_class(name: str) -> None:
    dataset = ShapesDataset(name)
    assert 200 <= len(dataset) <= 300
    counts = Counter(dataset.labels)
    assert sorted(counts) == list(range(len(dataset.class_names)))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(set(dataset.class_names)) == len(dataset.class_names) >= 4
    assert dataset.templates
    assert all(template.count("{}") == 1 for template in dataset.templates)


def test_images_are_small_rgb_and_carry_their_label() -> None:
    for name in SHAPES_SETS:
        dataset = ShapesDataset(name)
        image, label = dataset[7]
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert label == dataset.labels[7]


def test_source_train_is_large_balanced_and_disjoint_from_test() -> None:
    train, test = ShapesDataset("source", "train"), ShapesDataset("source", "test")
    assert train.class_names == test.class_names
    assert 3500 <= len(train) <= 4500
    assert set(Counter(train.labels).values()) == {len(train) // len(train.class_names)}
    seen = {train[index][0].tobytes() for index in range(len(train))}
    assert len(seen) == len(train)
    assert not seen & {test[index][0].tobytes() for index in range(len(test))}


def test_held_out_pairs_never_appear_in_the_source_or_the_pretraining() -> None:
    held_out = set(HELD_OUT_PAIRS)
    assert not held_out & set(SOURCE_PAIRS)
    dataset = ShapesDataset("held_out_pairs")
    assert {pair for name in dataset.class_names for pair in pairs_in(name)} == held_out
    train = ShapesDataset("source", "train")
    texts = [*train.class_names, *(train.caption(index) for index in range(len(train)))]
    texts += [describe(pretraining_pair(0, index)[0]) for index in range(3000)]
    found = {pair for text in texts for pair in pairs_in(text)}
    assert found >= set(SOURCE_PAIRS)
    assert not held_out & found


def test_captions_name_the_property_of_the_class() -> None:
    dataset = ShapesDataset("colour_shapes")
    for index, label in enumerate(dataset.labels):
        assert dataset.class_names[label] in dataset.caption(index)


def test_larger_words_cover_more_pixels() -> None:
    dataset = ShapesDataset("sizes")
    covered: dict[int, list[float]] = {label: [] for label in range(4)}
    for index, label in enumerate(dataset.labels):
        pixels = np.asarray(dataset[index][0]).astype(int)
        ground = np.median(pixels.reshape(-1, 3)[np.r_[0:32, -32:0]], axis=0)
        covered[label].append(float((np.abs(pixels - ground).sum(axis=2) > 30).mean()))
    means = [float(np.mean(covered[label])) for label in range(4)]
    assert means == sorted(means)
    assert means[3] > 3 * means[1]


@pytest.mark.parametrize("name", ["source", "colours"])
def test_training_images_are_not_test_images(name: str) -> None:
    train, test = (
        {dataset[i][0].tobytes() for i in range(240)} for dataset in map(ShapesDataset, [name] * 2, ["train", "test"])
    )
    assert not train & test


def test_unknown_names_and_splits_are_refused_with_the_existing_ones() -> None:
    with pytest.raises(ValueError, match=r"name must be one of source, colours, .*; got 'cats'"):
        ShapesDataset("cats")
    with pytest.raises(ValueError, match=r"split of shapes set 'sizes' must be one of test; got 'train'"):
        ShapesDataset("sizes", "train")
    with pytest.raises(IndexError, match=r"index of shapes set 'colours' must be in \[0, 239\], got 240"):
        ShapesDataset("colours")[240]


def test_shipped_weights_know_the_words() -> None:
    folder = Path(str(files("robustclip.data") / "assets" / "shapes"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    model_config, preprocess = config["model_cfg"], config["preprocess_cfg"]
    text_config = model_config["text_cfg"]
    merges = str(folder / text_config["tokenizer_kwargs"]["bpe_path"])
    tokenizer = SimpleTokenizer(bpe_path=merges, context_length=text_config["context_length"])
    assert tokenizer.vocab_size == text_config["vocab_size"]
    model = open_clip.CLIP(model_config["embed_dim"], model_config["vision_cfg"], text_config).eval()
    open_clip.load_checkpoint(model, str(folder / "open_clip_model.safetensors"), strict=True)
    mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
    accuracies = {}
    for name in ZERO_SHOT:
        dataset = ShapesDataset(name)
        pixels = np.stack([np.asarray(dataset[index][0]) for index in range(96)])
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
        texts = tokenizer([dataset.templates[0].format(word) for word in dataset.class_names])
        with torch.no_grad():
            scores = model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T
        hits = scores.argmax(dim=1) == torch.tensor(dataset.labels[:96])
        accuracies[name] = float(hits.float().mean())
    assert sum(accuracies.values()) / len(accuracies) >= 0.65, accuracies
    assert min(accuracies.values()) >= 0.40, accuracies
