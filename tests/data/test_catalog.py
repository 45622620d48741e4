"""The catalogue agrees with the published protocols and with other libraries' label lists."""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torchvision
from torchvision.models import ResNet18_Weights

from robustclip.data import DataSource, catalog
from robustclip.data.catalog import (
    CATALOG,
    DOMAIN_SETS,
    PMG_AFT_SETS,
    SHIFTS_OF_IMAGENET,
    TECOA_SETS,
    CatalogEntry,
    lookup,
)
from robustclip.data.opened_source import open_source

CLASSES = {
    "imagenet": 1000,
    "tiny_imagenet": 200,
    "cifar10": 10,
    "cifar100": 100,
    "stl10": 10,
    "caltech101": 101,
    "caltech256": 257,
    "oxford_pets": 37,
    "stanford_cars": 196,
    "food101": 101,
    "flowers102": 102,
    "fgvc_aircraft": 100,
    "sun397": 397,
    "dtd": 47,
    "eurosat": 10,
    "pcam": 2,
    "hateful_memes": 2,
    "ucf101": 101,
    **dict.fromkeys(SHIFTS_OF_IMAGENET, 1000),
    **{name: {"office": 31, "visda": 12, "vlcs": 5}.get(name.partition("_")[0], 0) for name in DOMAIN_SETS},
    **{name: 65 for name in DOMAIN_SETS if name.startswith("office_home")},
}

# The first and the last label of each published list, and one between them: position, prompt.
PROMPTS = [
    ("imagenet", 0, "This is a photo of a tench"),
    ("imagenet", 999, "This is a photo of a toilet tissue"),
    ("tiny_imagenet", 0, "This is a photo of a goldfish"),
    ("tiny_imagenet", 199, "This is a photo of a acorn"),
    ("cifar10", 1, "This is a photo of a automobile"),
    ("cifar100", 1, "This is a photo of a aquarium fish"),
    ("stl10", 7, "This is a photo of a monkey"),
    ("caltech101", 0, "This is a photo of a faces"),
    ("caltech101", 4, "This is a photo of a accordion"),
    ("caltech101", 100, "This is a photo of a yin yang"),
    ("caltech256", 14, "A photo of a bonsai."),
    ("caltech256", 231, "A photo of a t shirt."),
    ("caltech256", 256, "A photo of a clutter."),
    ("oxford_pets", 14, "A photo of a german shorthaired, a type of pet."),
    ("stanford_cars", 0, "A photo of a am general hummer suv."),
    ("stanford_cars", 195, "A photo of a smart fortwo convertible."),
    ("food101", 7, "A photo of bibimbap, a type of food."),
    ("flowers102", 11, "A photo of a colts foot, a type of flower."),
    ("flowers102", 101, "A photo of a blackberry lily, a type of flower."),
    ("fgvc_aircraft", 0, "A photo of a boeing 707-320, a type of aircraft."),
    ("fgvc_aircraft", 41, "A photo of a boeing 717, a type of aircraft."),
    ("fgvc_aircraft", 73, "A photo of a f/a-18, a type of aircraft."),
    ("sun397", 8, "This is a photo of a apartment building outdoor"),
    ("sun397", 206, "This is a photo of a jail indoor"),  # CLIP's list has it behind "jail cell"
    ("sun397", 396, "This is a photo of a youth hostel"),
    ("dtd", 30, "A surface with a polka dotted texture."),
    ("eurosat", 9, "A centered satellite photo of a sea or a lake."),
    ("pcam", 0, "This is a photo of healthy lymph node tissue."),
    ("hateful_memes", 1, "a hatespeech meme."),
    ("ucf101", 0, "a photo of a person doing apply eye makeup."),
    ("ucf101", 15, "a photo of a person doing bowling."),
    ("ucf101", 100, "a photo of a person doing yo yo."),
    ("office_amazon", 24, "a photo of a ring binder."),  # the last known class
    ("office_amazon", 30, "a photo of a trash can."),
    ("office_home_art", 49, "a photo of a ruler."),  # the last known class
    ("office_home_real_world", 63, "a photo of a tv."),
    ("visda_validation", 7, "a photo of a person."),  # the last known class
    ("vlcs_sun", 4, "a photo of a person."),
]


def _repeated(entry: CatalogEntry) -> list[str]:
    return sorted(name for name, times in Counter(entry.class_names).items() if times > 1)


def _plain(name: str) -> str:
    return re.sub("[-_/]", " ", name.lower()).strip()


def test_catalog_holds_the_published_protocols() -> None:
    assert (
        set(CATALOG)
        == set(TECOA_SETS) | set(PMG_AFT_SETS) | set(SHIFTS_OF_IMAGENET) | set(DOMAIN_SETS) | {"ucf101"}
        == set(CLASSES)
    )


def test_protocols_have_sixteen_distinct_sets() -> None:
    assert len(TECOA_SETS) == len(set(TECOA_SETS)) == 16
    assert len(PMG_AFT_SETS) == len(set(PMG_AFT_SETS)) == 16
    assert TECOA_SETS[0] == "imagenet"
    assert PMG_AFT_SETS[0] == "tiny_imagenet"
    assert set(TECOA_SETS) ^ set(PMG_AFT_SETS) == {"hateful_memes", "tiny_imagenet"}


def test_images_add_up_to_the_published_totals() -> None:
    assert sum(CATALOG[name].images for name in TECOA_SETS) == 337_128
    assert sum(CATALOG[name].images for name in PMG_AFT_SETS) == 344_128
    totals = {"office_[adw]": 4_110, "office_home_": 15_588, "visda_": 207_785, "vlcs_": 10_729}
    for pattern, total in totals.items():
        assert sum(CATALOG[name].images for name in DOMAIN_SETS if re.match(pattern, name)) == total


@pytest.mark.parametrize("name", CLASSES)
def test_entry_is_well_formed(name: str) -> None:
    entry = CATALOG[name]
    assert entry.name == name
    assert re.fullmatch("[a-z0-9_]+", name)
    assert entry.templates
    assert all(template.count("{}") == 1 for template in entry.templates)
    assert entry.split in {"test", "val", "all"}
    assert len(entry.class_names) == CLASSES[name]
    assert all(label and label == " ".join(label.split()) for label in entry.class_names)
    assert name == "pcam" or all(label == label.lower() for label in entry.class_names)


def test_no_default_source_reaches_the_network() -> None:
    for entry in CATALOG.values():
        scheme, _, place = entry.source.partition(":")
        assert scheme in {"wds", "torchvision"}
        assert re.fullmatch("[A-Za-z0-9_-]+", place)
        if scheme == "torchvision":
            assert issubclass(getattr(torchvision.datasets, place), torchvision.datasets.VisionDataset)


def test_only_cifar_and_stl_are_attacked_at_native_size() -> None:
    assert {entry.name for entry in CATALOG.values() if entry.native_size} == {"cifar10", "cifar100", "stl10"}


@pytest.mark.parametrize(("name", "label", "prompt"), PROMPTS)
def test_prompt_is_the_published_one(name: str, label: int, prompt: str) -> None:
    entry = CATALOG[name]
    assert entry.templates[0].format(entry.class_names[label]) == prompt


def test_known_collisions_and_no_others() -> None:
    assert _repeated(CATALOG["imagenet"]) == ["cardigan", "crane", "maillot"]
    assert len(set(CATALOG["stanford_cars"].class_names)) == 189
    assert len(_repeated(CATALOG["stanford_cars"])) == 7
    assert not any(
        _repeated(CATALOG[name]) for name in set(CATALOG) - {"imagenet", "stanford_cars", *SHIFTS_OF_IMAGENET}
    )


def test_imagenet_agrees_with_torchvision() -> None:
    """torchvision distinguishes two of the pairs by more words; the other names are the same first synonyms."""
    theirs = [_plain(name) for name in ResNet18_Weights.DEFAULT.meta["categories"]]
    ours = CATALOG["imagenet"].class_names
    differences = {index: theirs[index] for index in range(1000) if ours[index] != theirs[index]}
    assert differences == {134: "crane bird", 639: "maillot tank suit"}


def test_imagenet_is_in_the_order_of_open_clip() -> None:
    """open_clip renamed many classes; the names that both lists hold exactly once must stand at the same label."""
    theirs = [_plain(name) for name in open_clip.IMAGENET_CLASSNAMES]
    ours = CATALOG["imagenet"].class_names
    shared = [name for name in set(ours) & set(theirs) if ours.count(name) == theirs.count(name) == 1]
    assert len(shared) > 500
    moved = {name for name in shared if ours.index(name) != theirs.index(name)}
    assert not moved


def test_tiny_imagenet_is_a_subsequence_of_imagenet() -> None:
    remaining = iter(CATALOG["imagenet"].class_names)
    assert all(name in remaining for name in CATALOG["tiny_imagenet"].class_names)


def test_flowers_agree_with_torchvision() -> None:
    theirs = getattr(torchvision.datasets.Flowers102, "classes", None)
    if theirs is None:
        pytest.skip("this torchvision does not name the flowers")
    ours = CATALOG["flowers102"].class_names
    assert [name.replace("'", "") for name in map(_plain, theirs)] == [name.replace("'", "") for name in ours]


def test_lookup_finds_every_set() -> None:
    assert all(lookup(name) is CATALOG[name] for name in CATALOG)


def test_unknown_name_is_answered_with_close_ones_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"got 'cifar_10'; did you mean cifar10 or cifar100\b") as error:
        lookup("cifar_10")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"got '!'; .*folder:/my/photos.*; known are imagenet, .*vlcs_sun$"):
        lookup("!")


def test_catalog_imports_the_standard_library_only() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(catalog.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported <= set(sys.stdlib_module_names)


def test_the_folders_of_office_home_are_labelled_by_their_names_in_any_case(tmp_path: Path) -> None:
    for folder in ("TV", "Table", "Trash_Can", "ToothBrush"):
        (tmp_path / "Art" / folder).mkdir(parents=True)
        (tmp_path / "Art" / folder / "a.png").touch()
    opened = open_source(DataSource("folder:Art", name="office_home_art"), root=str(tmp_path), split="test")
    names = opened.task.class_names
    assert names == CATALOG["office_home_art"].class_names
    assert [names[label] for label in opened.dataset.labels] == ["tv", "table", "toothbrush", "trash can"]  # type: ignore[union-attr]
