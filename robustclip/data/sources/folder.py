"""Folders of images, with one sub-folder per class or in the layout of a published data set."""

import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from robustclip.data.class_labels import WORDNET_ID
from robustclip.data.decoding import open_file
from robustclip.data.sources.source import LocatedSource, Opened
from robustclip.data.sources.wds import texts_beside
from robustclip.names import excerpt
from robustclip.textfiles import read_text

log = logging.getLogger(__name__)
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Kinds of images that Pillow may not know.
FOREIGN_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw")
HIDDEN = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
HIDDEN_FILES = {"thumbs.db", "desktop.ini"}
SOLUTION = "LOC_val_solution.csv"  # labels of ImageNet's validation images, as published on Kaggle
ANNOTATIONS = "val_annotations.txt"  # labels of Tiny-ImageNet's validation images


class Content(NamedTuple):
    """Paths in a folder, sorted by name, without hidden files and folders; files are strings to save memory.

    Attributes:
        folders: sub-folders.
        images: files with the suffix of a readable image type.
        others: all other files.
    """

    folders: list[Path]
    images: list[str]
    others: list[str]


class ClassImages(NamedTuple):
    """The images of a folder and the names of their classes.

    Attributes:
        keys: names of the classes as published, sorted.
        samples: path of each image, and position of its class in the keys.
    """

    keys: list[str]
    samples: list[tuple[str, int]]


class ImageFiles(Dataset[Any]):
    """A data set of image files.

    Args:
        samples: path and label of each image.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = samples
        self.labels = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        return open_file(path), label

    def where(self, index: int) -> str:
        """Returns the path of an image, for messages."""
        return self.samples[index][0]


class Folder(LocatedSource):
    """Images in one sub-folder per class, or in a published layout, such as ``folder:/my/photos``."""

    def open(self, split: str) -> Opened:
        """Lists the images of the split, and reads class names that come with them.

        A folder without splits is read whole, unless the configuration names a split.

        Raises:
            ValueError: the folder or the split does not exist, or the layout is unknown.
        """
        texts, base = texts_beside(self.path), Path(self.path)
        if not base.is_dir():
            raise ValueError(f"folder {base} does not exist; it needs one sub-folder of images per class")
        images = _memes(base, split)
        if images is None:
            folder = _split_folder(base, split, is_split_given=self.is_split_given)
            images = _annotated(folder) or _class_folders(folder, base)
        return Opened(ImageFiles(images.samples), keys=images.keys, **texts)


def content(folder: Path) -> Content:
    """Lists a folder without hidden files and folders, and without those of archivers and file servers."""
    listing = Content([], [], [])
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = entry.name.casefold()
            if name.startswith(".") or name in HIDDEN or name in HIDDEN_FILES:
                continue
            if entry.is_dir():
                listing.folders.append(Path(entry.path))
            elif name.endswith(IMAGE_SUFFIXES) and (entry.is_file() or entry.is_symlink()):
                listing.images.append(entry.path)
            else:
                listing.others.append(entry.path)
    return listing


def _splits(base: Path) -> list[Path]:
    """Lists the folders of splits: they have the name of a split and, unlike those of classes, no images."""
    folders = content(base).folders
    named = [folder for folder in folders if folder.name.casefold() in SPLITS]
    return named if len(named) == len(folders) else [folder for folder in named if not content(folder).images]


def _split_folder(base: Path, split: str, *, is_split_given: bool) -> Path:
    splits = _splits(base)
    same = [folder for folder in splits if folder.name.casefold() == split.casefold()]
    exact = [folder for folder in same if folder.name == split] or same
    if len(exact) == 1:
        return exact[0]
    if is_split_given and split.casefold() not in SPLITS and (base / split).is_dir():
        return base / split
    if splits:
        names = [folder.name for folder in splits]
        remedy = " or ".join(f"`split: {name}`" for name in names)
        raise ValueError(f"folder {base} has no split {split!r}: its splits are {', '.join(names)}; give {remedy}")
    if is_split_given and split != "all":
        raise ValueError(
            f"folder {base} has no split {split!r}, since it is not divided into splits; leave `split` out"
        )
    return base


def _class_folders(folder: Path, base: Path) -> ClassImages:
    """Lists the images of one sub-folder per class, which has them directly or, in Tiny-ImageNet, in ``images``."""
    inside = content(folder)
    if not inside.folders:
        raise ValueError(f"folder {folder} needs one sub-folder of images per class, found {_counts(inside)}")
    if inside.images:
        raise ValueError(
            f"folder {folder} has {len(inside.images)} images beside its class folders, "
            f"the first {Path(inside.images[0]).name!r}; move them into the folder of their class, or away"
        )
    keys = [path.name for path in inside.folders]
    if keys == ["images"]:
        raise ValueError(f"folder {folder} has all images in one folder, without labels; give the `split` of another")
    samples: list[tuple[str, int]] = []
    others: list[str] = []
    for number, class_folder in enumerate(inside.folders):
        files, name = content(class_folder), class_folder.name
        if WORDNET_ID.fullmatch(name) and not files.images and [sub.name for sub in files.folders] == ["images"]:
            files = content(files.folders[0])
        if deep := next((path for sub in files.folders for path in _images_below(sub)), None):
            raise ValueError(
                f"images must lie in the sub-folders of {folder}, one per class, found {deep.relative_to(folder)}; "
                f"`folder:{deep.parent.parent}` may be meant"
            )
        if not files.images:
            raise ValueError(f"class folder {class_folder} has no image, found {_counts(files)}; remove it or fill it")
        samples += [(path, number) for path in files.images]
        others += files.others
    _check_others(others)
    _warn_of_absent(keys, folder, base)
    return ClassImages(keys, samples)


def _warn_of_absent(keys: list[str], folder: Path, base: Path) -> None:
    """Warns of classes that only other splits have, since they are no possible predictions without a list of names."""
    others = [split for split in _splits(base) if split != folder] if folder != base else []
    for other in others:
        names = [path.name for path in content(other).folders]
        if set(keys) & set(names) and (absent := [name for name in names if name not in keys]):
            log.warning("%s lacks %d classes of %s: %s", folder, len(absent), other.name, excerpt(absent))


def _check_others(others: list[str]) -> None:
    """Refuses images of types that are not read, and warns of files that are no images."""
    if not others:
        return
    Image.init()
    if images := [path for path in others if Path(path).suffix.lower() in (*Image.EXTENSION, *FOREIGN_SUFFIXES)]:
        raise ValueError(
            f"{images[0]} is of an image type that is not read, and {len(images) - 1} more files; "
            f"convert them to one of {' '.join(sorted(IMAGE_SUFFIXES))} or remove them"
        )
    log.warning("%d files in class folders are no images and are left out, the first: %s", len(others), others[0])


def _images_below(folder: Path) -> Iterator[Path]:
    inside = content(folder)
    yield from map(Path, inside.images)
    for sub in inside.folders:
        yield from _images_below(sub)


def _counts(inside: Content) -> str:
    return f"{len(inside.folders)} folders, {len(inside.images)} images and {len(inside.others)} other files"


def _annotated(folder: Path) -> ClassImages | None:
    """Lists validation images of ImageNet and Tiny-ImageNet, published in one folder with a list of their labels."""
    inside = content(folder)
    if (folder / ANNOTATIONS).is_file():
        lines = [line.split("\t") for line in read_text(folder / ANNOTATIONS).split("\n") if line.strip()]
        if bad := [line for line in lines if len(line) < 2]:
            raise ValueError(f"{folder / ANNOTATIONS} must hold an image and its class in each line, found {bad[0]}")
        return _by_list(folder / "images", {line[0]: line[1] for line in lines}, folder / ANNOTATIONS)
    if inside.images and not inside.folders and Path(inside.images[0]).name.startswith("ILSVRC2012_val_"):
        lists = [path / SOLUTION for path in (folder, *folder.resolve().parents[:4]) if (path / SOLUTION).is_file()]
        if not lists:
            raise ValueError(
                f"folder {folder} has images of all classes in one folder; put {SOLUTION} beside it, "
                "or move the images into one sub-folder per class"
            )
        rows = csv.DictReader(read_text(lists[0]).split("\n"))
        labels = {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows}
        return _by_list(folder, labels, lists[0])
    return None


def _by_list(folder: Path, classes: Mapping[str, str], origin: Path) -> ClassImages:
    """Lists the images of one folder with their classes in a list."""
    images = [Path(path) for path in content(folder).images] if folder.is_dir() else []
    names = {path.name for path in images}
    without, absent = [name for name in names if name not in classes], [name for name in classes if name not in names]
    if without or absent:
        raise ValueError(
            f"{origin} and {folder} must have the same images: {len(without)} have no label, {len(absent)} no file, "
            f"the first {excerpt(sorted(without + absent)[:1])}"
        )
    keys = sorted(set(classes.values()))
    numbers = {key: number for number, key in enumerate(keys)}
    return ClassImages(keys, [(str(path), numbers[classes[path.name]]) for path in images])


def _memes(base: Path, split: str) -> ClassImages | None:
    """Lists images of Hateful Memes, published with a JSON object per image and line; ``test`` joins both its parts."""
    if not (base / "img").is_dir() or not any(base.glob("*.jsonl")):
        return None
    lists = [base / f"{split}.jsonl"] if (base / f"{split}.jsonl").is_file() else sorted(base.glob(f"{split}_*.jsonl"))
    rows = [json.loads(line) for path in lists for line in read_text(path).split("\n") if line.strip()]
    if not rows or any("label" not in row or not (base / row["img"]).is_file() for row in rows):
        known = ", ".join(path.stem for path in sorted(base.glob("*.jsonl")))
        raise ValueError(
            f"folder {base} has no split {split!r} with labels and images; its lists are {known or 'none'}"
        )
    keys = sorted({str(row["label"]) for row in rows})
    return ClassImages(keys, [(str(base / row["img"]), keys.index(str(row["label"]))) for row in rows])
