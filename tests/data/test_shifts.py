"""The distribution shifts of ImageNet: which classes their labels are, and how they are read as published."""

import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.catalog import CATALOG, SHIFTS_OF_IMAGENET
from robustclip.data.opened_source import open_source
from robustclip.data.transforms import ToPixels

IMAGENET = CATALOG["imagenet"].class_names


def timm_list(name: str) -> list[str]:
    """A list that timm ships."""
    return resources.files("timm.data").joinpath("_info", f"{name}.txt").read_text().split()


@pytest.mark.parametrize("name", ["imagenet_r", "imagenet_a"])
def test_parts_of_imagenet_are_those_of_timm(name: str) -> None:
    entry = CATALOG[name]
    assert entry.groups == tuple((int(number),) for number in timm_list(f"{name}_indices"))
    assert list(entry.folders) == timm_list(f"{name}_synsets")
    assert len(entry.groups) == 200


def test_imagenet_and_sketch_have_its_thousand_classes() -> None:
    for name in ("imagenet", "imagenet_sketch"):
        assert list(CATALOG[name].folders) == timm_list("imagenet_synsets")
        assert CATALOG[name].groups is None
    assert CATALOG["imagenet_v2"].folders == tuple(map(str, range(1000)))
    assert CATALOG["imagenet_v2"].groups is None


def test_objectnet_has_113_classes_of_which_none_share_a_class_of_imagenet() -> None:
    entry = CATALOG["objectnet"]
    assert len(entry.groups) == len(entry.folders) == 113
    assert list(entry.folders) == sorted(entry.folders)
    members = [number for group in entry.groups for number in group]
    assert len(members) == len(set(members))
    # As in the published table, by first synonyms.
    names = {folder: {IMAGENET[n] for n in group} for folder, group in zip(entry.folders, entry.groups, strict=True)}
    assert names["chair"] == {"barber chair", "folding chair", "rocking chair"}
    assert names["pen"] == {"ballpoint", "quill", "fountain pen"}
    assert names["tie"] == {"bow tie", "windsor tie"}
    assert names["full_sized_towel"] == {"bath towel"}
    assert sum(len(group) > 1 for group in entry.groups) == 9


def test_most_folders_of_objectnet_are_named_by_their_class() -> None:
    entry = CATALOG["objectnet"]
    pairs = list(zip(entry.folders, entry.groups, strict=True))
    alike = [f for f, group in pairs if set(re.split("[_-]", f)) & {w for n in group for w in IMAGENET[n].split()}]
    assert len(alike) > 70


def write_folders(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (12, 10), (number, 0, 0)).save(folder / name / "a.png")


@pytest.mark.parametrize(
    ("place", "name", "folders", "labels"),
    [
        ("imagenet-r", None, ["n12267677", "n01443537", "n01484850"], [0, 1, 199]),
        ("matched", "imagenet_v2", ["0", "2", "10", "999"], [0, 10, 2, 999]),  # in the order of the sorted names
        ("objectnet", None, ["alarm_clock", "air_freshener", "wok"], [0, 112]),
        ("sketch", "imagenet_sketch", ["n01440764", "n15075141"], [0, 999]),
    ],
)
def test_a_set_as_published_is_labelled_by_its_folders(
    place: str, name: str | None, folders: list[str], labels: list[int], tmp_path: Path
) -> None:
    write_folders(tmp_path / place, folders)
    opened = open_source(DataSource(f"folder:{place}", name=name), root=str(tmp_path), split="test")
    assert [opened.dataset[number][1] for number in range(len(opened.dataset))] == labels == opened.dataset.labels
    entry = CATALOG[opened.task.name]
    assert (opened.task.class_names, opened.task.groups) == (IMAGENET, entry.groups)
    assert opened.border == (2 if place == "objectnet" else 0)


def test_own_names_of_every_label_replace_imagenets(tmp_path: Path) -> None:
    write_folders(tmp_path / "imagenet-a", ["n01498041", "n01531178"])
    source = DataSource("folder:imagenet-a", class_names=[f"thing {number}" for number in range(200)])
    task = open_source(source, root=str(tmp_path), split="test").task
    assert task.groups is None
    assert task.label_names[199] == "thing 199"


def test_folders_that_the_catalogue_does_not_know_need_another_name(tmp_path: Path) -> None:
    write_folders(tmp_path / "objectnet", ["big_cat", "dog"])
    with pytest.raises(ValueError, match=r"'big_cat', 'dog' are not among the 113 of .*'objectnet'; .* `name`"):
        open_source("folder:objectnet", root=str(tmp_path), split="test")
    opened = open_source(DataSource("folder:objectnet", name="animals"), root=str(tmp_path), split="test")
    assert opened.dataset.labels == [0, 1]
    assert opened.task.class_names == ("big cat", "dog")


def test_the_border_is_cut_off_before_the_resize() -> None:
    pixels = np.full((20, 24, 3), 200, dtype=np.uint8)
    pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:] = 0, 0, 0, 0
    framed = Image.fromarray(pixels)
    assert torch.equal(ToPixels(8, border=2)(framed), torch.full((3, 8, 8), 200 / 255))
    assert ToPixels(None, border=2)(framed).shape == (3, 16, 20)
    assert ToPixels(8, border=2).description == "RGB, border of 2 cut off, " + ToPixels(8).description[5:]


def test_a_set_of_grouped_labels_is_no_training_set(tmp_path: Path) -> None:
    write_folders(tmp_path / "objectnet", ["wok", "tie"])
    with pytest.raises(ValueError, match="training set 'objectnet' has labels of several class names"):
        CLIPDataModule(train="folder:objectnet", root=str(tmp_path)).setup("fit")


def test_all_shifts_share_the_words_of_imagenet() -> None:
    assert {CATALOG[name].class_names for name in SHIFTS_OF_IMAGENET} == {IMAGENET}
    assert {CATALOG[name].templates for name in (*SHIFTS_OF_IMAGENET, "imagenet")} == {CATALOG["imagenet"].templates}


def test_a_list_gives_the_splits_and_the_words_of_domainnet(tmp_path: Path) -> None:
    write_folders(tmp_path / "domainnet" / "real", ["aircraft_carrier", "zebra"])
    for split, lines in (
        ("train", ["real/aircraft_carrier/a.png 0", "real/zebra/a.png 1"]),
        ("test", ["real/zebra/a.png 1"]),
    ):
        (tmp_path / "domainnet" / f"real_{split}.txt").write_text("\n".join(lines))
    source = DataSource("list:domainnet/real_{split}.txt", name="real")
    train, test = (open_source(source, root=str(tmp_path), split=split) for split in ("train", "test"))
    assert train.task.class_names == test.task.class_names == ("aircraft carrier", "zebra")
    assert train.dataset.labels == [0, 1]
    assert test.dataset[0][0].getpixel((0, 0)) == (1, 0, 0)
    assert [label for _, label in test.dataset] == [1]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("real/a/1.jpg", "must hold lines `PATH LABEL` with numbers from 0, found 'real/a/1.jpg'"),
        ("real/a/1.jpg 0\nreal/b/1.jpg 0", "has label 0 for 'a' and for 'b'"),
        (None, "is no file"),
    ],
)
def test_malformed_lists_are_refused(lines: str | None, words: str, tmp_path: Path) -> None:
    if lines is not None:
        (tmp_path / "real.txt").write_text(lines)
    with pytest.raises(ValueError, match=words):
        open_source("list:real.txt", root=str(tmp_path), split="test")
