"""Folders and lists of images: what is not the documented layout is refused, and labels follow names."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import ShardWriter
from PIL import Image

from robustclip.data import DataSource
from robustclip.data.catalog import CATALOG
from robustclip.data.data_sets import open_tests, open_training
from robustclip.data.opened_source import OpenedSource, open_source
from robustclip.data.sources.source import labels_of, where_of

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def write(base: Path, names: Sequence[str], count: int = 1) -> None:
    for name in names:
        (base / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (8, 8), COLOURS.get(name, (9, 9, 9))).save(base / name / f"{number}.png")


def opened(base: Path, split: str = "test", kind: str = "folder", **options: Any) -> OpenedSource:
    return open_source(DataSource(f"{kind}:{base}", **options), root=".", split=split)


def pairs(source: OpenedSource) -> set[tuple[str, str]]:
    """Folder of each image, and the class name that the image has."""
    assert source.dataset is not None
    labels = labels_of(source.dataset) or ()
    folders = [Path(where_of(source.dataset, number)).parent.name for number in range(len(labels))]
    return {(folder, source.task.label_names[label]) for folder, label in zip(folders, labels, strict=True)}


def same(names: Sequence[str]) -> set[tuple[str, str]]:
    return {(name, name) for name in names}


# Splits


@pytest.mark.parametrize(
    ("splits", "asked", "remedies"),
    [
        (("train", "val"), None, ["split: train", "split: val"]),
        (("Train", "Valid"), None, ["split: Train", "split: Valid"]),
        (("training", "testing"), None, ["split: training", "split: testing"]),
        (("train", "dev", "cat"), None, ["split: train", "split: dev"]),
        (("train", "test"), "val", ["split: train", "split: test"]),
    ],
)
def test_a_split_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, splits: Sequence[str], asked: str | None, remedies: list[str]
) -> None:
    for split in splits:
        write(tmp_path / split, list(COLOURS) if split != "cat" else ["."])
    with pytest.raises(ValueError, match=f"has no split '{asked or 'test'}'") as error:
        open_source(DataSource(f"folder:{tmp_path}", split=asked), root=".", split="test")
    assert re.findall("`(.+?)`", str(error.value)) == sorted(remedies)


@pytest.mark.parametrize("folder", ["test", "Test", "TEST"])
def test_the_case_of_a_split_does_not_matter(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder, list(COLOURS))
    write(tmp_path / "train", ["other", "things"])
    assert pairs(opened(tmp_path)) == same(list(COLOURS))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_may_have_the_name_of_a_split(tmp_path: Path, split: str) -> None:
    write(tmp_path, ["bus", "train", "car"])
    assert pairs(opened(tmp_path, split=split)) == same(["bus", "train", "car"])


def test_a_folder_without_splits_serves_every_default_split_but_none_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, list(COLOURS))
    assert pairs(opened(tmp_path, split="train")) == pairs(opened(tmp_path)) == same(list(COLOURS))
    with pytest.raises(ValueError, match="has no split 'val', since it is not divided"):
        open_source(DataSource(f"folder:{tmp_path}", split="val"), root=".", split="test")


# Layout


def test_hidden_folders_and_files_are_no_classes_and_no_samples(tmp_path: Path) -> None:
    write(tmp_path / "test", list(COLOURS))
    for name in (".git", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN"):
        write(tmp_path / "test", [name])
        write(tmp_path / "test" / "red", [name])
    for name in ("._0.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / "test" / "red" / name).touch()
        (tmp_path / "test" / name).touch()
    source = opened(tmp_path)
    assert pairs(source) == same(list(COLOURS))
    assert len(source.dataset) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("folders", "found", "remedy"),
    [(["x/red", "x/green"], "x/green/0.png", "/x`"), (["red", "green", "blue/deep"], "blue/deep/0.png", "/blue`")],
)
def test_images_at_another_depth_are_refused(tmp_path: Path, folders: list[str], found: str, remedy: str) -> None:
    write(tmp_path, folders)
    with pytest.raises(ValueError, match=f"found {found}; `folder:.*{remedy}"):
        opened(tmp_path)


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path, list(COLOURS))
    Image.new("RGB", (8, 8)).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"has 1 images beside its class folders, the first 'stray.png'"):
        opened(tmp_path)


def test_a_class_folder_without_an_image_is_refused(tmp_path: Path) -> None:
    write(tmp_path, list(COLOURS))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*empty has no image, found 0 folders, 0 images and 0 other"):
        opened(tmp_path)


def test_files_that_are_no_images_are_counted_and_images_that_are_not_read_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, list(COLOURS))
    for name in ("red/boxes.txt", "green/notes.csv"):
        (tmp_path / name).touch()
    assert len(opened(tmp_path).dataset) == 3  # type: ignore[arg-type]
    assert "2 files in class folders are no images" in caplog.text
    assert "boxes.txt" in caplog.text or "notes.csv" in caplog.text
    Image.new("RGB", (8, 8)).save(tmp_path / "blue" / "1.gif")
    with pytest.raises(ValueError, match=r"blue/1\.gif is of an image type that is not read"):
        opened(tmp_path)


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", ["red"])
    write(tmp_path / "set", ["green"])
    (tmp_path / "set" / "red").symlink_to(tmp_path / "elsewhere" / "red")
    assert pairs(opened(tmp_path / "set")) == same(["red", "green"])


def test_samples_are_numbered_as_torchvision_numbers_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    write(tmp_path, ["b", "a", "C", "10", "9"], count=12)
    assert opened(tmp_path).dataset.samples == ImageFolder(str(tmp_path)).samples  # type: ignore[union-attr]


# Names


@pytest.mark.parametrize("how", ["classnames.txt", "class_names", "mapping"])
@pytest.mark.parametrize("present", [["blue", "red"], ["red", "green"], ["green"], ["red", "green", "blue"]])
def test_a_missing_class_folder_shifts_no_label(
    tmp_path: Path, present: list[str], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "test", present)
    names = ["red", "green", "blue"]  # in an order that is not that of the folders
    options: dict[str, Any] = {}
    if how == "classnames.txt":
        (tmp_path / "classnames.txt").write_text("\n".join(names), encoding="utf-8")
    else:
        options["class_names"] = names if how == "class_names" else {name: name for name in names}
    source = opened(tmp_path, **options)
    assert source.task.class_names == tuple(names)
    assert pairs(source) == same(present)
    assert (f"no image of {3 - len(present)} of its 3 classes" in caplog.text) == (len(present) < 3)


def test_numeric_folders_are_numbers_of_the_list(tmp_path: Path) -> None:
    write(tmp_path, [str(number) for number in range(11)])
    names = [f"thing {number}" for number in range(11)]
    assert pairs(opened(tmp_path, class_names=names)) == {(str(n), f"thing {n}") for n in range(11)}


def test_numeric_folders_from_1_are_refused_with_a_list(tmp_path: Path) -> None:
    write(tmp_path, ["1", "2", "3"])
    with pytest.raises(ValueError, match="not among the 3 of `class_names`; give `class_names` as a mapping"):
        opened(tmp_path, class_names=["a", "b", "c"])


def test_case_blanks_and_composed_letters_do_not_part_names(tmp_path: Path) -> None:
    write(tmp_path, ["Big_Cat", "hot-dog", "cafe\u0301"])
    source = opened(tmp_path, class_names=["caf\u00e9", "hot dog", "big cat"])
    assert pairs(source) == {("cafe\u0301", "caf\u00e9"), ("hot-dog", "hot dog"), ("Big_Cat", "big cat")}


def test_other_names_than_the_folders_need_a_mapping(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"])
    with pytest.raises(
        ValueError, match="'a', 'b' are not among the 2 of `class_names`; give `class_names` as a mapping"
    ):
        opened(tmp_path, class_names=["alpha", "beta"])
    mapping = {"b": "beta", "a": "alpha"}
    assert pairs(opened(tmp_path, class_names=mapping)) == {("a", "alpha"), ("b", "beta")}
    with pytest.raises(ValueError, match="'b' are not among the 1 of the keys of `class_names`"):
        opened(tmp_path, class_names={"a": "alpha"})


def test_a_mapping_may_have_numbers_for_keys_as_yaml_reads_them(tmp_path: Path) -> None:
    write(tmp_path, ["1", "2"])
    mapping: Any = {1: "cat", 2: "dog"}
    assert pairs(opened(tmp_path, class_names=mapping)) == {("1", "cat"), ("2", "dog")}


def test_folders_with_equal_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path, ["big_cat", "big cat", "dog"])
    with pytest.raises(ValueError, match="several classes that are named 'big cat'"):
        opened(tmp_path)


def test_classes_that_only_another_split_has_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train", list(COLOURS))
    write(tmp_path / "test", ["red", "blue"])
    assert pairs(opened(tmp_path)) == same(["red", "blue"])
    assert "lacks 1 classes of train: 'green'" in caplog.text


def test_a_part_of_a_known_set_keeps_the_numbers_of_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "cifar10", ["truck", "airplane"])
    source = opened(tmp_path / "cifar10")
    assert pairs(source) == same(["truck", "airplane"])
    assert source.task.class_names == CATALOG["cifar10"].class_names


# Tasks that mean nothing


def test_a_task_of_one_class_is_refused_but_for_unknown_images(tmp_path: Path) -> None:
    write(tmp_path / "set", ["red"])
    with pytest.raises(ValueError, match="'set' has one class, 'red'"):
        open_tests([f"folder:{tmp_path / 'set'}"], root=".")
    with pytest.raises(ValueError, match="'set' has one class, 'red'"):
        open_training([f"folder:{tmp_path / 'set'}"], root=".")
    unknown = open_source(f"folder:{tmp_path / 'set'}", root=".", split="test", role="unknown")
    assert len(unknown.dataset) == 1  # type: ignore[arg-type]


def test_wordnet_ids_are_no_class_names(tmp_path: Path) -> None:
    write(tmp_path / "set", ["n01440764", "n01443537"])
    with pytest.raises(ValueError, match=r"WordNet ids .*'n01440764'.*`name: imagenet`.*`class_names` as a mapping"):
        opened(tmp_path / "set")
    assert pairs(opened(tmp_path / "set", name="imagenet")) == {("n01440764", "tench"), ("n01443537", "goldfish")}
    mapping = {"n01443537": "goldfish", "n01440764": "tench"}
    assert opened(tmp_path / "set", class_names=mapping).task.class_names == ("goldfish", "tench")


def test_a_class_count_unlike_the_catalogues_needs_names_that_it_knows(
    tmp_path: Path, write_shards: ShardWriter
) -> None:
    write(tmp_path / "dtd", list(COLOURS))
    with pytest.raises(ValueError, match=r"has 3 classes, .*are not among the 47 of 'dtd' in the catalogue; .* `name`"):
        opened(tmp_path / "dtd")
    assert opened(tmp_path / "dtd", name="colours").task.class_names == ("blue", "green", "red")
    base = write_shards(tmp_path, "cifar10", "test", [3])
    with pytest.raises(ValueError, match=r"has 3 class names in classnames.txt, .*the 10 of 'cifar10'"):
        opened(base, kind="wds")
    assert len(opened(base, kind="wds", class_names=list(COLOURS)).task.class_names) == 3
    write_shards(tmp_path, "cifar10", "test", [3], classes=["dog", "cat"])
    assert opened(base, kind="wds").task.class_names == ("dog", "cat")


def test_class_names_in_another_order_than_beside_the_data_are_refused(
    tmp_path: Path, write_shards: ShardWriter
) -> None:
    base = write_shards(tmp_path, "set", "test", [3])
    with pytest.raises(ValueError, match="'red' as label 0, but at place 2"):
        opened(base, kind="wds", class_names=["blue", "green", "red"])
    assert opened(base, kind="wds", class_names=["crimson", "green", "navy"]).task.class_names[1] == "green"
    write_shards(tmp_path, "stl10", "test", [3], classes=sorted(CATALOG["stl10"].class_names, reverse=True))
    with pytest.raises(ValueError, match="'truck' as label 0, but at place 9"):
        open_source("stl10", root=str(tmp_path), split="test")


@pytest.mark.parametrize("names", [["a\0", "b"], ["a\nb", "c"], ["a\x1b[31m", "b"]])
def test_control_characters_in_class_names_are_refused(
    tmp_path: Path, write_shards: ShardWriter, names: list[str]
) -> None:
    base = write_shards(tmp_path, "set", "test", [2], classes=["a", "b"])
    with pytest.raises(ValueError, match=r"control character U\+00"):
        opened(base, kind="wds", class_names=names)


# Lists


def write_list(base: Path, lines: Mapping[str, int], split: str = "test") -> None:
    (base / f"{split}.txt").write_text("".join(f"{path} {label}\n" for path, label in lines.items()), encoding="utf-8")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"red/0.png": 1, "green/0.png": 2}, "2 labels up to 2, and none is 0"),
        ({"red/0.png": 0, "green/0.png": 2}, "2 labels up to 2, and none is 1"),
        ({"red/0.png": 0, "./red/0.png": 0, "green/0.png": 1}, "1 images more than once, the first .*red/0.png"),
        ({"red/0.png": 0, "green/9.png": 1}, "1 images that do not exist, the first .*green/9.png"),
        ({"red/0.png": 0, "red/1.png": 1, "green/0.png": 2}, "several labels for the folder 'red'"),
    ],
)
def test_a_list_whose_labels_are_not_those_of_its_folders_is_refused(
    tmp_path: Path, lines: dict[str, int], words: str
) -> None:
    write(tmp_path, list(COLOURS), count=2)
    write_list(tmp_path, lines)
    with pytest.raises(ValueError, match=words):
        opened(tmp_path / "{split}.txt", kind="list")


@pytest.mark.parametrize("how", ["train list", "classnames.txt", "class_names"])
def test_labels_without_an_image_are_named_by_the_other_lists_or_by_names(tmp_path: Path, how: str) -> None:
    write(tmp_path, list(COLOURS))
    write_list(tmp_path, {"red/0.png": 0, "blue/0.png": 2})
    options: dict[str, Any] = {}
    if how == "train list":
        write_list(tmp_path, {f"{name}/0.png": label for label, name in enumerate(COLOURS)}, "train")
    elif how == "classnames.txt":
        (tmp_path / "classnames.txt").write_text("\n".join(COLOURS), encoding="utf-8")
    else:
        options["class_names"] = list(COLOURS)
    source = opened(tmp_path / "{split}.txt", kind="list", **options)
    assert source.task.class_names == tuple(COLOURS)
    assert pairs(source) == same(["red", "blue"])


def test_names_in_another_order_than_the_labels_of_a_list_are_refused(tmp_path: Path) -> None:
    write(tmp_path, list(COLOURS))
    write_list(tmp_path, {f"{name}/0.png": label for label, name in enumerate(COLOURS)})
    with pytest.raises(ValueError, match="'red' as label 0, but at place 2"):
        opened(tmp_path / "{split}.txt", kind="list", class_names=["blue", "green", "red"])
    renamed = opened(tmp_path / "{split}.txt", kind="list", class_names=["crimson", "grass", "sky"])
    assert pairs(renamed) == {("red", "crimson"), ("green", "grass"), ("blue", "sky")}
    mapping = {"blue": "sky", "red": "crimson", "green": "grass"}
    mapped = opened(tmp_path / "{split}.txt", kind="list", class_names=mapping)
    assert pairs(mapped) == {("red", "crimson"), ("green", "grass"), ("blue", "sky")}
