"""The catalogue of published data sets: prompts, class names in label order, splits and sources.

It has the sets of TeCoA's and PMG-AFT's zero-shot protocols, distribution shifts of ImageNet, and sets of several
domains. Class names are stored in `assets/class_names.json` in the form that is put into the template, after the rules
of TeCoA's code: lower case; "_", "-" and "/" become blanks. Label order is torchvision's and, except for Caltech-101,
clip_benchmark's. The lists are those published with the sets, compared with CLIP's `data/prompts.md`, torchvision,
clip_benchmark and TensorFlow Datasets.

- ImageNet, Tiny-ImageNet: the first synonym of each WordNet id in the CLS-LOC development kit, ids in sorted order.
- CIFAR-10, CIFAR-100, STL-10, Food-101, SUN397, DTD: the labels of the sets.
- Caltech-101: directory names sorted with capitals first, no background; "faces" and "faces easy" both stay. TeCoA left
  the prompts of this set undefined. Exports differ in order and number of classes; use the names that come with them.
- Caltech-256: directory names without "NNN." and "-101"; clutter is a class.
- Oxford-IIIT Pet: the breeds as the file names spell them, hence "german shorthaired".
- Stanford Cars: the last five characters, blank and year, are cut: 196 classes, 189 distinct names. "/" stays.
- Flowers-102: the list of TeCoA's code, which differs from CLIP's in "colts foot", "pink yellow dahlia?", "ball moss".
- FGVC Aircraft: variants; "boeing " stands before a name that starts with 7. "-" and "/" stay.
- EuroSAT: TeCoA's phrases, in folder order.
- PCam: TeCoA's two prompts are whole sentences, with "Tthis" corrected to "This".
- UCF101: the actions of the published `classInd.txt` in its order; one frame of each video of the first test split, as
  in CoOp (https://github.com/KaiyangZhou/CoOp). Folders may be written "ApplyEyeMakeup" or "Apply_Eye_Makeup".
- Hateful Memes: CLIP's classes and template, as TeCoA published no loader.
- ImageNet-V2, -Sketch, -R, -A and ObjectNet have ImageNet's names, and so ImageNet's head. R and A choose among the
  200 classes that they have (the lists of their authors' code); a class of ObjectNet has the highest logit of its
  classes in ImageNet (the table published with it; its other 200 classes are left out). `imagenet_classes.json` names
  the sub-folders of the published sets, with the numbers of ImageNet's classes.
- Office-31, Office-Home, VisDA-C: the lists of UEO's code; VLCS: the folders. Prompts are UEO's. Published folders are
  these names with "_", in any case; their own order differs, as Office-Home's "TV" comes before "Table" there.
- Published names of classes are compared with these by `plain`. The WordNet ids of Tiny-ImageNet are those of ImageNet
  at the places of its names: both lists are sorted by id (its published `wnids.txt` has the same 200).

Three pairs of ImageNet names are equal (crane, maillot, cardigan), so their logits tie.
"""

import difflib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

PARTS_OF_IMAGENET = ("imagenet_r", "imagenet_a")
EUROSAT = (
    *("annualcrop", "forest", "herbaceousvegetation", "highway", "industrial"),
    *("pasture", "permanentcrop", "residential", "river", "sealake"),
)
PHOTO = "This is a photo of a {}"  # no full stop: TeCoA trained with this template


@cache
def _assets() -> Mapping[str, tuple[str, ...]]:
    names: dict[str, list[str]] = _read("class_names.json")
    return {name: tuple(classes) for name, classes in names.items()}


@cache
def _folders() -> Mapping[str, Mapping[str, tuple[int, ...]]]:
    """Returns the published sub-folders of sets in label order, with the positions of their classes' names."""
    classes = _read("imagenet_classes.json")
    wnids = classes["imagenet"]
    whole = {wnid: (number,) for number, wnid in enumerate(wnids)}
    return {
        "imagenet": whole,
        "tiny_imagenet": _tiny_folders(whole),
        "imagenet_sketch": whole,
        "imagenet_v2": {str(number): (number,) for number in range(len(whole))},
        "objectnet": {folder: tuple(numbers) for folder, numbers in classes["objectnet"].items()},
        "eurosat": {folder: (number,) for number, folder in enumerate(EUROSAT)},
        "ucf101": {name.replace(" ", ""): (number,) for number, name in enumerate(_assets()["ucf101"])},
        **{name: {wnids[number]: (number,) for number in classes[name]} for name in PARTS_OF_IMAGENET},
    }


def _tiny_folders(whole: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the WordNet ids of Tiny-ImageNet, whose names are a subsequence of ImageNet's."""
    remaining = iter(zip(whole, _assets()["imagenet"], strict=True))
    names = _assets()["tiny_imagenet"]
    wnids = [next(wnid for wnid, other in remaining if other == name) for name in names]
    return {wnid: (label,) for label, wnid in enumerate(wnids)}


def plain(name: str, cut: str = "") -> str:
    """Converts a class name to a form for comparison: without case, apostrophes, and differences of blanks.

    Args:
        name: folder or class name.
        cut: regular expression of a publisher's additions to names, such as a number.
    """
    text = unicodedata.normalize("NFC", re.sub(cut, "", name) if cut else name).casefold()
    return " ".join(re.split(r"[\s_/-]+", text.replace("'", ""))).strip()


def _read(name: str) -> Any:
    return json.loads(resources.files("robustclip.data").joinpath("assets", name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class CatalogEntry:
    """A published data set.

    Args:
        name: key in the catalogue and name of the task, `[a-z0-9_]+`.
        title: name for readers.
        templates: prompts with "{}" in place of the class name.
        split: split that the papers test on; "all" is the whole set, "val" the labelled validation images. In the
            clip_benchmark layout, the exported split is always named `test`.
        images: number of images in that split.
        source: default source, without the network: `wds:NAME` is a folder below the data root in the clip_benchmark
            layout; `torchvision:CLASS` is used if that layout has other images or other labels.
        native_size: whether images are attacked at their own size, 32 or 96 pixels, and resized inside the model.
        words: name of the set with the same class names; None if the set has its own.
        border: number of pixels that are cut off on every side of an image first.
        cut: regular expression of the publisher's additions to class names, such as numbers.
        others: regular expression of published folders, in plain form, whose classes do not belong to the set.
        exported: other numbers of classes, in exports that come with class names.
        version: number that rises when class names, templates, split or label order change, so that results of an
            older definition can be told from new ones.
    """

    name: str
    title: str
    templates: tuple[str, ...]
    split: str
    images: int
    source: str
    native_size: bool = False
    words: str | None = None
    border: int = 0
    cut: str = ""
    others: str = ""
    exported: tuple[int, ...] = ()
    version: int = 1

    @property
    def class_names(self) -> tuple[str, ...]:
        """The ``C`` names for a template; in label order, unless there are groups."""
        return _assets()[self.words or self.name]

    @property
    def keys(self) -> tuple[str, ...]:
        """Distinct keys of the classes, in the order of their names: WordNet ids for ImageNet's, else the names."""
        return tuple(_folders()["imagenet"]) if "imagenet" in (self.name, self.words) else self.class_names

    @property
    def class_count(self) -> int:
        """Number of labels."""
        return len(self.groups or self.class_names)

    @property
    def folders(self) -> tuple[str, ...]:
        """Published sub-folders of the set in label order; empty if they are not needed."""
        return tuple(_folders().get(self.name, ()))

    @property
    def groups(self) -> tuple[tuple[int, ...], ...] | None:
        """Positions of the class names of each label; None if every name is a label."""
        groups = tuple(_folders().get(self.name, {}).values())
        return groups if groups and groups != tuple((number,) for number in range(len(self.class_names))) else None


_DOMAINS = {
    "office": {"amazon": 2_817, "dslr": 498, "webcam": 795},
    "office_home": {"art": 2_427, "clipart": 4_365, "product": 4_439, "real_world": 4_357},
    "visda": {"train": 152_397, "validation": 55_388},
    "vlcs": {"caltech": 1_415, "labelme": 2_656, "pascal": 3_376, "sun": 3_282},
}
_TITLES = {"office": "Office-31", "office_home": "Office-Home", "visda": "VisDA-C", "vlcs": "VLCS"}

_ENTRIES = (
    CatalogEntry("imagenet", "ImageNet", (PHOTO,), "val", 50_000, "wds:imagenet1k"),
    CatalogEntry("tiny_imagenet", "Tiny-ImageNet", (PHOTO,), "val", 10_000, "wds:tiny_imagenet"),
    CatalogEntry("cifar10", "CIFAR-10", (PHOTO,), "test", 10_000, "wds:cifar10", native_size=True),
    CatalogEntry("cifar100", "CIFAR-100", (PHOTO,), "test", 10_000, "wds:cifar100", native_size=True),
    CatalogEntry("stl10", "STL-10", (PHOTO,), "test", 8_000, "wds:stl10", native_size=True),
    CatalogEntry(
        "caltech101",
        "Caltech-101",
        (PHOTO,),
        "all",
        8_677,
        "torchvision:Caltech101",
        others="background google",
        exported=(102,),
    ),
    CatalogEntry(
        "caltech256",
        "Caltech-256",
        ("A photo of a {}.",),
        "all",
        30_607,
        "torchvision:Caltech256",
        cut=r"^\d{3}\.|-101$",
    ),
    CatalogEntry(
        "oxford_pets", "Oxford-IIIT Pet", ("A photo of a {}, a type of pet.",), "test", 3_669, "wds:oxford_pets"
    ),
    CatalogEntry(
        "stanford_cars", "Stanford Cars", ("A photo of a {}.",), "test", 8_041, "wds:stanford_cars", cut=r" \d{4}$"
    ),
    CatalogEntry("food101", "Food-101", ("A photo of {}, a type of food.",), "test", 25_250, "wds:food101"),
    CatalogEntry("flowers102", "Flowers-102", ("A photo of a {}, a type of flower.",), "test", 6_149, "wds:flowers102"),
    CatalogEntry(
        "fgvc_aircraft",
        "FGVC Aircraft",
        ("A photo of a {}, a type of aircraft.",),
        "test",
        3_333,
        "wds:fgvc_aircraft",
        cut="(?i)^boeing ",
    ),
    CatalogEntry("sun397", "SUN397", (PHOTO,), "all", 108_754, "wds:sun397"),
    CatalogEntry("dtd", "Describable Textures", ("A surface with a {} texture.",), "test", 1_880, "wds:dtd"),
    CatalogEntry("eurosat", "EuroSAT", ("A centered satellite photo of {}.",), "all", 27_000, "torchvision:EuroSAT"),
    CatalogEntry("pcam", "PatchCamelyon", ("{}",), "test", 32_768, "wds:pcam"),
    CatalogEntry("hateful_memes", "Hateful Memes", ("a {}.",), "test", 3_000, "wds:hateful_memes"),
    CatalogEntry("ucf101", "UCF101", ("a photo of a person doing {}.",), "test", 3_783, "wds:ucf101"),
    CatalogEntry("imagenet_v2", "ImageNet-V2", (PHOTO,), "test", 10_000, "wds:imagenetv2", words="imagenet"),
    CatalogEntry(
        "imagenet_sketch", "ImageNet-Sketch", (PHOTO,), "test", 50_889, "wds:imagenet_sketch", words="imagenet"
    ),
    CatalogEntry("imagenet_r", "ImageNet-R", (PHOTO,), "test", 30_000, "wds:imagenet-r", words="imagenet"),
    CatalogEntry("imagenet_a", "ImageNet-A", (PHOTO,), "test", 7_500, "wds:imagenet-a", words="imagenet"),
    CatalogEntry(
        "objectnet", "ObjectNet", (PHOTO,), "test", 18_574, "wds:objectnet", words="imagenet", border=2, others=".*"
    ),
    *(
        CatalogEntry(
            f"{words}_{domain}",
            f"{_TITLES[words]}, {domain.replace('_', ' ')}",
            ("a photo of a {}.",),
            "all",
            images,
            f"wds:{words}_{domain}",
            words=words,
        )
        for words, domains in _DOMAINS.items()
        for domain, images in domains.items()
    ),
)

CATALOG: Mapping[str, CatalogEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""All data sets by name."""


_OTHER_NAMES = {
    "imagenet": "imagenet1k imagenet_1k ilsvrc2012 cls_loc",
    "imagenet_v2": "imagenetv2 imagenetv2_matched_frequency_format_val",
    "tiny_imagenet": "tiny_imagenet_200 tinyimagenet",
    "caltech101": "101_objectcategories",
    "caltech256": "256_objectcategories",
    "oxford_pets": "pets oxford_iiit_pet oxfordiiitpet",
    "stanford_cars": "cars stanfordcars",
    "food101": "food_101",
    "flowers102": "flowers flowers_102",
    "fgvc_aircraft": "fgvcaircraft",
    "ucf101": "ucf_101 ucf_101_midframes",
}
ALIASES = {other: name for name, others in _OTHER_NAMES.items() for other in others.split()}
"""Names by other names: those of clip_benchmark's folders, torchvision's classes and publishers' archives."""

TECOA_SETS: tuple[str, ...] = (
    *("imagenet", "cifar10", "cifar100", "stl10", "caltech101", "caltech256", "oxford_pets", "stanford_cars"),
    *("food101", "flowers102", "fgvc_aircraft", "sun397", "dtd", "eurosat", "pcam", "hateful_memes"),
)
"""ImageNet and the fifteen zero-shot sets of TeCoA (https://arxiv.org/abs/2212.07016)."""

PMG_AFT_SETS: tuple[str, ...] = (
    *("tiny_imagenet", "cifar10", "cifar100", "stl10", "sun397", "food101", "oxford_pets", "flowers102", "dtd"),
    *("eurosat", "fgvc_aircraft", "imagenet", "caltech101", "caltech256", "stanford_cars", "pcam"),
)
"""Tiny-ImageNet and the fifteen zero-shot sets of PMG-AFT (https://arxiv.org/abs/2401.04350)."""

SHIFTS_OF_IMAGENET: tuple[str, ...] = ("imagenet_v2", "imagenet_r", "imagenet_a", "imagenet_sketch", "objectnet")
"""Sets with ImageNet's classes and other distributions, as in WiSE-FT (https://arxiv.org/abs/2109.01903)."""

DOMAIN_SETS: tuple[str, ...] = tuple(f"{words}_{domain}" for words, domains in _DOMAINS.items() for domain in domains)
"""The domains of Office-31, Office-Home, VisDA-C (all in UEO, https://github.com/tim-learn/UEO) and VLCS."""


def named(name: str) -> CatalogEntry | None:
    """Finds a data set by its name or another name, with or without clip_benchmark's ``wds_`` and ``vtab_``."""
    short = re.sub("^(wds_)?(vtab_)?", "", name)
    return CATALOG.get(name) or CATALOG.get(short) or CATALOG.get(ALIASES.get(short, ""))


def lookup(name: str) -> CatalogEntry:
    """Returns the data set of a name.

    Raises:
        ValueError: the catalogue has no such name; the message suggests the closest ones.
    """
    if name in CATALOG:
        return CATALOG[name]
    close = difflib.get_close_matches(name, CATALOG, cutoff=0.5)
    others = "a folder is written folder:/my/photos, a class of yours my_module.MySet"
    if Path(name).is_dir():
        close = [f"folder:{name}"]
    hint = f"did you mean {' or '.join(close)}?" if close else f"{others}; known are {', '.join(CATALOG)}"
    raise ValueError(f"data set must be a name of the catalogue, got {name!r}; {hint}")
