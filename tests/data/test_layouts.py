"""A fake copy of every set of the zero-shot protocols, in each layout that it is published in: labels meet their names.

The colour of an image is the number of its class as published, so what is read is checked against what was written.
"""

import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import add_member
from PIL import Image
from scipy.io import savemat

from robustclip.data import DataSource
from robustclip.data.catalog import CATALOG, PMG_AFT_SETS, TECOA_SETS
from robustclip.data.opened_source import OpenedSource, open_source
from robustclip.data.sources.source import labels_of

SETS = sorted({*TECOA_SETS, *PMG_AFT_SETS})
Colours = dict[int, str]
"""By the number that an image has for its colour, the class name that the image must get."""


def colour(number: int) -> tuple[int, int, int]:
    """16 levels a channel, so that JPEG does not blur one number into another."""
    return (number // 256 * 16 + 8, number // 16 % 16 * 16 + 8, number % 16 * 16 + 8)


def number_of(image: Image.Image) -> int:
    red, green, blue = (int(value) // 16 for value in np.asarray(image.convert("RGB")).reshape(-1, 3).mean(axis=0))
    return red * 256 + green * 16 + blue


def picture(path: Path, number: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour(number)).save(path, quality=100)


def check(opened: OpenedSource, expected: Colours) -> None:
    """Every image has the class name that belongs to its colour, and every colour is there."""
    assert opened.dataset is not None
    names = opened.task.class_names
    found = {}
    for index in range(len(opened.dataset)):  # type: ignore[arg-type]
        image, label = opened.dataset[index]
        found[number_of(image)] = names[int(label)]
    assert found == expected


def spelled(name: str, blank: str = "_") -> str:
    return name.replace(" ", blank)


# Each writer leaves the folder of one of torchvision's data sets below `root`, with classes as their publishers spell
# them, and returns the class names by colour.


def write_cifar(root: Path, name: str, folder: str, files: tuple[str, str], keys: tuple[str, str]) -> Colours:
    names = CATALOG[name].class_names
    (root / folder).mkdir()
    data = np.stack([np.full((3, 32, 32), 0, np.uint8) + np.uint8(colour(n))[:, None, None] for n in range(len(names))])
    labels = {"data": data.reshape(len(names), -1), keys[1]: list(range(len(names)))}
    (root / folder / files[0]).write_bytes(pickle.dumps(labels))
    (root / folder / files[1]).write_bytes(pickle.dumps({keys[0]: [spelled(each) for each in names]}))
    return dict(enumerate(names))


def write_cifar10(root: Path) -> Colours:
    files, keys = ("test_batch", "batches.meta"), ("label_names", "labels")
    return write_cifar(root, "cifar10", "cifar-10-batches-py", files, keys)


def write_cifar100(root: Path) -> Colours:
    return write_cifar(root, "cifar100", "cifar-100-python", ("test", "meta"), ("fine_label_names", "fine_labels"))


def write_stl10(root: Path) -> Colours:
    names = CATALOG["stl10"].class_names
    folder = root / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(names), encoding="utf-8")
    pixels = np.stack([np.zeros((3, 96, 96), np.uint8) + np.uint8(colour(n))[:, None, None] for n in range(10)])
    pixels.tofile(folder / "test_X.bin")
    np.arange(1, 11, dtype=np.uint8).tofile(folder / "test_y.bin")
    return dict(enumerate(names))


def write_caltech101(root: Path) -> Colours:
    entry = CATALOG["caltech101"]
    folders = [spelled(name.capitalize() if number < 4 else name) for number, name in enumerate(entry.class_names)]
    for number, folder in enumerate(folders):
        picture(root / "caltech101" / "101_ObjectCategories" / folder / "image_0001.jpg", number)
    picture(root / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google" / "image_0001.jpg", 4000)
    (root / "caltech101" / "Annotations").mkdir()
    return dict(enumerate(entry.class_names))


def write_caltech256(root: Path) -> Colours:
    names = CATALOG["caltech256"].class_names
    for number, name in enumerate(names):
        suffix = "-101" if name in ("airplanes", "car side", "faces easy", "motorbikes", "leopards") else ""
        folder = f"{number + 1:03d}.{spelled(name, '-')}{suffix}"
        path = root / "caltech256" / "256_ObjectCategories" / folder / f"{number + 1:03d}_0001.jpg"
        picture(path, number)
    return dict(enumerate(names))


def write_pets(root: Path) -> Colours:
    names = CATALOG["oxford_pets"].class_names
    lines = []
    for number, name in enumerate(names):
        picture(root / "oxford-iiit-pet" / "images" / f"{spelled(name)}_1.jpg", number)
        lines.append(f"{spelled(name)}_1 {number + 1} 1 1\n")
    (root / "oxford-iiit-pet" / "annotations").mkdir()
    (root / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("".join(lines), encoding="utf-8")
    return dict(enumerate(names))


def write_cars(root: Path) -> Colours:
    names = CATALOG["stanford_cars"].class_names
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    published = np.array([f"{name.title()} {2000 + number % 12}" for number, name in enumerate(names)], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": published})
    kind = [("class", object), ("fname", object)]
    rows = [(number + 1, f"{number:05d}.jpg") for number in range(len(names))]
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": np.array(rows, dtype=kind)})
    for number in range(len(names)):
        picture(folder / "cars_test" / f"{number:05d}.jpg", number)
    return dict(enumerate(names))


def write_food101(root: Path) -> Colours:
    names = CATALOG["food101"].class_names
    for number, name in enumerate(names):
        picture(root / "food-101" / "images" / spelled(name) / "1.jpg", number)
    (root / "food-101" / "meta").mkdir()
    lists = {spelled(name): [f"{spelled(name)}/1"] for name in names}
    (root / "food-101" / "meta" / "test.json").write_text(json.dumps(lists), encoding="utf-8")
    return dict(enumerate(names))


def write_flowers102(root: Path) -> Colours:
    names = CATALOG["flowers102"].class_names
    folder = root / "flowers-102"
    for number in range(102):
        picture(folder / "jpg" / f"image_{number + 1:05d}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": np.arange(1, 103)})
    savemat(folder / "setid.mat", {"tstid": np.arange(1, 103)})
    return dict(enumerate(names))


def write_aircraft(root: Path) -> Colours:
    names = CATALOG["fgvc_aircraft"].class_names
    published = [name.removeprefix("boeing ").upper() for name in names]
    data = root / "fgvc-aircraft-2013b" / "data"
    for number in range(100):
        picture(data / "images" / f"{number:07d}.jpg", number)
    (data / "variants.txt").write_text("\n".join(published), encoding="utf-8")
    lines = "\n".join(f"{number:07d} {name}" for number, name in enumerate(published))
    (data / "images_variant_test.txt").write_text(lines, encoding="utf-8")
    return dict(enumerate(names))


def write_sun397(root: Path) -> Colours:
    names = CATALOG["sun397"].class_names
    published = [f"/{name[0]}/{spelled(name)}" for name in names]
    published[8] = "/a/apartment_building/outdoor"
    for number, name in enumerate(published):
        picture(root / "SUN397" / name[1:] / "sun_a.jpg", number)
    (root / "SUN397" / "ClassName.txt").write_text("\n".join(published), encoding="utf-8")
    return dict(enumerate(names))


def write_dtd(root: Path, kept: Sequence[int] = range(47)) -> Colours:
    names = CATALOG["dtd"].class_names
    data = root / "dtd" / "dtd"
    lines = []
    for number in kept:
        folder = spelled(names[number], "-")
        picture(data / "images" / folder / f"{folder}_1.jpg", number)
        lines.append(f"{folder}/{folder}_1.jpg\n")
    (data / "labels").mkdir()
    (data / "labels" / "test1.txt").write_text("".join(lines), encoding="utf-8")
    return {number: names[number] for number in kept}


EUROSAT_FOLDERS = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)


def write_eurosat(root: Path) -> Colours:
    for number, folder in enumerate(EUROSAT_FOLDERS):
        picture(root / "eurosat" / "2750" / folder / f"{folder}_1.jpg", number)
    return dict(enumerate(CATALOG["eurosat"].class_names))


def write_pcam(root: Path) -> Colours:
    """Without h5py: `patched` gives an h5py that reads NumPy's files."""
    (root / "pcam").mkdir()
    with (root / "pcam" / "camelyonpatch_level_2_split_test_x.h5").open("wb") as file:
        np.savez(file, x=np.stack([np.full((96, 96, 3), colour(number), np.uint8) for number in range(2)]))
    with (root / "pcam" / "camelyonpatch_level_2_split_test_y.h5").open("wb") as file:
        np.savez(file, y=np.arange(2).reshape(2, 1, 1, 1))
    return dict(enumerate(CATALOG["pcam"].class_names))


def write_imagenet(root: Path) -> Colours:
    entry = CATALOG["imagenet"]
    synonyms = {wnid: (name, "another word") for wnid, name in zip(entry.folders, entry.class_names, strict=True)}
    torch.save((synonyms, []), root / "meta.bin")
    for number, wnid in enumerate(entry.folders):
        picture(root / "val" / wnid / "ILSVRC2012_val_00000001.JPEG", number)
    return dict(enumerate(entry.class_names))


TORCHVISION: dict[str, tuple[str, Callable[[Path], Colours]]] = {
    "cifar10": ("CIFAR10", write_cifar10),
    "cifar100": ("CIFAR100", write_cifar100),
    "stl10": ("STL10", write_stl10),
    "caltech101": ("Caltech101", write_caltech101),
    "caltech256": ("Caltech256", write_caltech256),
    "oxford_pets": ("OxfordIIITPet", write_pets),
    "stanford_cars": ("StanfordCars", write_cars),
    "food101": ("Food101", write_food101),
    "flowers102": ("Flowers102", write_flowers102),
    "fgvc_aircraft": ("FGVCAircraft", write_aircraft),
    "sun397": ("SUN397", write_sun397),
    "dtd": ("DTD", write_dtd),
    "eurosat": ("EuroSAT", write_eurosat),
    "pcam": ("PCAM", write_pcam),
    "imagenet": ("ImageNet", write_imagenet),
}


class NumpyFile(dict[str, Any]):
    def __enter__(self) -> "NumpyFile":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision takes files whatever their checksum, and reads HDF5 without h5py."""

    def is_there(path: str | Path, md5: str | None = None) -> bool:
        return Path(path).is_file() or "test" not in Path(path).name

    for module in ("cifar", "stl10", "flowers102", "imagenet"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", is_there)
    h5py = SimpleNamespace(File=lambda path: NumpyFile(np.load(path)))
    monkeypatch.setitem(sys.modules, "h5py", h5py)  # type: ignore[arg-type]


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("name", TORCHVISION)
def test_folders_of_torchvision_have_the_class_names_of_the_catalogue(name: str, tmp_path: Path) -> None:
    cls, write = TORCHVISION[name]
    expected = write(tmp_path)
    split = "val" if name == "imagenet" else None
    opened = open_source(DataSource(f"torchvision:{cls}", split=split), root=str(tmp_path), split="test")
    check(opened, expected)
    assert opened.task.name == name
    assert opened.task.class_names == CATALOG[name].class_names
    assert opened.task.templates == CATALOG[name].templates
    assert opened.native_size == CATALOG[name].native_size


# Sets that torchvision does not have, and those that lie in folders of classes.


def write_tiny_imagenet(base: Path) -> Colours:
    """``train/nX/images/nX_0.JPEG`` with its boxes, ``val`` with its annotations, ``test`` without labels."""
    entry = CATALOG["tiny_imagenet"]
    for number, wnid in enumerate(entry.folders):
        picture(base / "train" / wnid / "images" / f"{wnid}_0.JPEG", number)
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n", encoding="utf-8")
        picture(base / "val" / "images" / f"val_{199 - number}.JPEG", number)
    lines = [f"val_{199 - number}.JPEG\t{wnid}\t0\t0\t63\t63\n" for number, wnid in enumerate(entry.folders)]
    (base / "val" / "val_annotations.txt").write_text("".join(lines), encoding="utf-8")
    picture(base / "test" / "images" / "test_0.JPEG", 0)
    (base / "wnids.txt").write_text("\n".join(reversed(entry.folders)), encoding="utf-8")
    return dict(enumerate(entry.class_names))


def write_memes(base: Path) -> Colours:
    lists: dict[str, list[str]] = {"test_seen": [], "test_unseen": [], "train": []}
    for number, name in enumerate(("test_seen", "test_unseen", "train", "train")):
        picture(base / "img" / f"{number:05d}.png", number)
        row = {"id": number, "img": f"img/{number:05d}.png", "label": number % 2, "text": "words"}
        lists[name].append(json.dumps(row))
    for name, rows in lists.items():
        (base / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return dict(enumerate(CATALOG["hateful_memes"].class_names))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("folder", ["tiny-imagenet-200", "tiny_imagenet"])
def test_tiny_imagenet_as_published_has_the_names_of_its_wordnet_ids(tmp_path: Path, folder: str, split: str) -> None:
    expected = write_tiny_imagenet(tmp_path / folder)
    opened = open_source(DataSource(f"folder:{folder}", split=split), root=str(tmp_path), split="test")
    check(opened, expected)
    assert opened.task.name == "tiny_imagenet"
    assert (opened.task.class_names[0], opened.task.class_names[199]) == ("goldfish", "acorn")


def test_tiny_imagenet_has_no_labels_for_its_test_images(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    with pytest.raises(
        ValueError, match=r"tiny-imagenet-200/test has all images in one folder, without labels; .*split"
    ):
        open_source("folder:tiny-imagenet-200", root=str(tmp_path), split="test")


def test_annotations_and_images_that_differ_are_refused(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    (tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_7.JPEG").unlink()
    with pytest.raises(ValueError, match=r"0 have no label, 1 no file, the first 'val_7.JPEG'"):
        open_source(DataSource("folder:tiny-imagenet-200", split="val"), root=str(tmp_path), split="test")


@pytest.mark.parametrize("root", ["imagenet", "ILSVRC/Data/CLS-LOC"])
def test_validation_images_of_imagenet_may_lie_in_class_folders_or_beside_their_solution(
    tmp_path: Path, root: str
) -> None:
    entry = CATALOG["imagenet"]
    kept = (999, 0, 134)  # 134 is one of the two cranes
    expected = {number: entry.class_names[number] for number in kept}
    rows = ["ImageId,PredictionString"]
    for place, number in enumerate(kept):
        image = f"ILSVRC2012_val_{place:08d}"
        picture(tmp_path / "sorted" / "val" / entry.folders[number] / f"{image}.JPEG", number)
        picture(tmp_path / root / "val" / f"{image}.JPEG", number)
        rows.append(f"{image},{entry.folders[number]} 1 1 5 5 {entry.folders[number]} 2 2 7 7 ")
    sources = [DataSource("folder:sorted", "imagenet", "val"), DataSource(f"folder:{root}", split="val")]
    with pytest.raises(ValueError, match=r"put LOC_val_solution.csv beside it, or move the images"):
        open_source(sources[1], root=str(tmp_path), split="test")
    (tmp_path / "LOC_val_solution.csv").write_text("\r\n".join(rows), encoding="utf-8")
    for source in sources:
        opened = open_source(source, root=str(tmp_path), split="test")
        assert opened.task.name == "imagenet"
        check(opened, expected)
        assert len(opened.task.class_names) == 1000


def test_hateful_memes_as_published_are_labelled_by_their_lists(tmp_path: Path) -> None:
    expected = write_memes(tmp_path / "hateful_memes")
    check(open_source("folder:hateful_memes", root=str(tmp_path), split="test"), expected)
    names = {number + 2: name for number, name in expected.items()}
    check(open_source("folder:hateful_memes", root=str(tmp_path), split="train"), names)
    with pytest.raises(ValueError, match=r"has no split 'dev' with labels .*test_seen, test_unseen, train"):
        open_source(DataSource("folder:hateful_memes", split="dev"), root=str(tmp_path), split="test")


@pytest.mark.parametrize(
    ("name", "folder", "write"),
    [
        ("caltech101", "caltech101/101_ObjectCategories", write_caltech101),
        ("caltech256", "caltech256/256_ObjectCategories", write_caltech256),
        ("food101", "food-101/images", write_food101),
        ("dtd", "dtd/dtd/images", write_dtd),
        ("eurosat", "eurosat/2750", write_eurosat),
    ],
)
def test_class_folders_of_an_archive_are_those_of_the_catalogue(
    name: str, folder: str, write: Callable[[Path], Colours], tmp_path: Path
) -> None:
    expected = write(tmp_path)
    opened = open_source(DataSource(f"folder:{folder}", name=name), root=str(tmp_path), split="test")
    check(opened, expected)
    assert opened.task.class_names == CATALOG[name].class_names


@pytest.mark.parametrize("folder", ["UCF-101", "UCF-101-midframes"])
def test_frames_of_ucf101_have_the_catalogues_names_in_both_spellings(folder: str, tmp_path: Path) -> None:
    names = CATALOG["ucf101"].class_names
    for number, name in enumerate(names):
        words = [word.capitalize() for word in name.split()]
        picture(tmp_path / folder / ("_" if "mid" in folder else "").join(words) / "v_g01_c01.jpg", number)
    opened = open_source(DataSource(f"folder:{folder}", name="ucf101"), root=str(tmp_path), split="test")
    check(opened, dict(enumerate(names)))
    assert (opened.task.class_names[37], opened.task.class_names[90]) == ("handstand walking", "tai chi")


def test_an_export_of_ucf101_is_read_by_name(tmp_path: Path) -> None:
    expected = write_export(tmp_path / "ucf101", CATALOG["ucf101"].class_names)
    check(open_source("ucf101", root=str(tmp_path), split="test"), expected)


# The layout of clip_benchmark: labels are numbers of lines of classnames.txt.

EXPORTS = {
    **{name: (name, f"wds_{name}") for name in SETS},
    "imagenet": ("imagenet1k", "wds_imagenet1k"),
    "oxford_pets": ("vtab/pets", "vtab-pets", "wds_vtab-pets"),
    "stanford_cars": ("cars", "wds_cars"),
    "flowers102": ("vtab/flowers", "wds_vtab-flowers"),
    "caltech101": ("vtab/caltech101", "wds_vtab-caltech101"),
    "dtd": ("vtab/dtd", "wds_vtab-dtd"),
    "eurosat": ("vtab/eurosat", "wds_vtab-eurosat"),
    "pcam": ("vtab/pcam", "wds_vtab-pcam"),
    "cifar10": ("cifar10", "vtab/cifar10", "wds_vtab-cifar10"),
    "cifar100": ("vtab/cifar100", "wds_vtab-cifar100"),
}


def write_export(base: Path, names: Sequence[str], *, with_names: bool = True) -> Colours:
    """One image for the first, the second and the last label."""
    (base / "test").mkdir(parents=True)
    if with_names:
        (base / "classnames.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (base / "test" / "nshards.txt").write_text("1", encoding="utf-8")
    kept = sorted({0, 1, len(names) - 1})
    with tarfile.open(base / "test" / "0.tar", "w") as archive:
        for number in kept:
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), colour(number)).save(buffer, "png")
            add_member(archive, f"s{number:07d}.png", buffer.getvalue())
            add_member(archive, f"s{number:07d}.cls", str(number).encode())
    return {number: names[number] for number in kept}


@pytest.mark.parametrize(("name", "folder"), [(name, folder) for name in EXPORTS for folder in EXPORTS[name]])
def test_folders_of_clip_benchmark_count_as_the_sets_of_the_catalogue(name: str, folder: str, tmp_path: Path) -> None:
    entry = CATALOG[name]
    expected = write_export(tmp_path / folder, entry.class_names)
    opened = open_source(f"wds:{folder}", root=str(tmp_path), split="test")
    check(opened, expected)
    assert opened.task.name == name
    assert opened.task.templates == entry.templates
    assert opened.native_size == entry.native_size


@pytest.mark.parametrize("name", [name for name in SETS if CATALOG[name].source.startswith("wds:")])
def test_a_name_of_the_catalogue_reads_its_own_copy(name: str, tmp_path: Path) -> None:
    expected = write_export(tmp_path / CATALOG[name].source.removeprefix("wds:"), CATALOG[name].class_names)
    check(open_source(name, root=str(tmp_path), split="test"), expected)


def test_names_beside_the_data_go_before_the_catalogues_and_may_be_as_many_as_an_export_has(tmp_path: Path) -> None:
    names = ["background", *(f"class {number}" for number in range(101))]
    expected = write_export(tmp_path / "vtab" / "caltech101", names)
    check(open_source("wds:vtab/caltech101", root=str(tmp_path), split="test"), expected)


@pytest.mark.usefixtures("patched")
def test_a_split_with_some_of_the_classes_keeps_the_numbers_of_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write_dtd(tmp_path, kept=(3, 40))
    opened = open_source("torchvision:DTD", root=str(tmp_path), split="test")
    check(opened, expected)
    assert labels_of(opened.dataset) == [3, 40]  # type: ignore[arg-type]
    assert "no image of 45 of its 47 classes" in caplog.text


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize(
    ("cls", "write", "split", "words"),
    [
        ("CIFAR10", write_cifar10, "val", "no split 'val'; give `split: train or test`"),
        ("OxfordIIITPet", write_pets, "train", "trainval"),
        ("EuroSAT", write_eurosat, "val", "no split 'val'; give `split: all`"),
    ],
)
def test_a_split_that_a_class_of_torchvision_does_not_have_is_refused(
    cls: str, write: Callable[[Path], Colours], split: str, words: str, tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=f"torchvision:{cls} .*{words}"):
        open_source(DataSource(f"torchvision:{cls}", split=split), root=str(tmp_path), split="test")


def test_every_set_of_the_protocols_has_its_layouts() -> None:
    assert set(EXPORTS) == set(SETS) == {*TORCHVISION, "tiny_imagenet", "hateful_memes"}
