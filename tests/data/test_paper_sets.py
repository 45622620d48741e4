"""The data of ready configurations open from the layouts that they name, with the classes that their papers have."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import write_shards
from PIL import Image

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.catalog import CATALOG
from robustclip.data.transforms import Augmentation
from robustclip.types import UNKNOWN

CONFIGS = Path(__file__).parents[2] / "robustclip" / "configs" / "data"


def configured(name: str, root: Path, **changes: Any) -> CLIPDataModule:
    """The data module of a configuration, on small images."""
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["init_args"]
    for kind in ("train", "test", "unknown"):
        sets = options.get(kind, [])
        sets = sets if isinstance(sets, list) else [sets]
        options[kind] = [DataSource(**each) if isinstance(each, dict) else each for each in sets]
    if "augmentation" in options:
        options["augmentation"] = Augmentation(**options["augmentation"])
    return CLIPDataModule(**options | {"root": str(root), "num_workers": 0, "image_size": 16} | changes)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def labels_of_training(data: CLIPDataModule) -> set[int]:
    return {int(label) for batch in data.train_dataloader() for label in batch.labels}


def test_vlcs_is_trained_on_but_for_one_domain(tmp_path: Path) -> None:
    classes = CATALOG["vlcs_sun"].class_names
    for name in ("vlcs_caltech", "vlcs_labelme", "vlcs_pascal"):
        write_shards(tmp_path, name, "train", [50], classes)
    write_shards(tmp_path, "vlcs_sun", "test", [10], classes)
    write_shards(tmp_path, "dtd", "test", [4], CATALOG["dtd"].class_names)
    data = configured("vlcs_leave_one_out", tmp_path)
    data.setup("fit")
    data.setup("test")
    assert data.train_positions is not None
    assert len(data.train_positions) == 3 * 5 * 5, "16 shots over three domains are 5 of each class and domain"
    assert sum(len(batch.labels) for batch in data.train_dataloader()) == 64, "the last batch of 11 is dropped"
    assert data.train_task.templates == ("a photo of a {}.",)
    assert [task.name for task in data.test_tasks] == ["vlcs_sun"]
    assert data.unknown_names == ["dtd"]


@pytest.mark.parametrize("name", ["visda", "domainnet_unlabelled"])
def test_a_domain_without_labels_has_known_and_unknown_classes(name: str, tmp_path: Path) -> None:
    if name == "visda":
        count, known = 12, 8
        for each in CATALOG["visda_validation"].class_names:
            picture(tmp_path / "visda" / "validation" / each / "1.png")
        trained = {*range(6), UNKNOWN}  # open_partial: 0-5 and the unknown 8-9
        images = 8
    else:
        count, known = 345, 300
        rows = [f"sketch/thing_{number}/1.png {number}" for number in range(count)]
        for row in rows:
            picture(tmp_path / "domainnet" / row.split()[0])
        for split in ("train", "test"):
            (tmp_path / "domainnet" / f"sketch_{split}.txt").write_text("\n".join(rows))
        trained = {*range(250), UNKNOWN}  # 0-249 and the unknown 300-329
        images = 280
    data = configured(name, tmp_path)
    data.setup("fit")
    data.setup("test")
    assert labels_of_training(data) == trained
    assert sum(len(batch.labels) for batch in data.train_dataloader()) == images
    (loader,) = data.test_dataloader()
    assert sum(len(batch.labels) for batch in loader) == len(data.test_tasks[0].class_names) == known
    (unknown,) = data.unknown_dataloaders().values()
    assert sum(len(batch.labels) for batch in unknown) == count - known


def test_fare_is_tested_with_the_names_of_the_data_and_the_templates_of_clip_benchmark(tmp_path: Path) -> None:
    sets = ("cifar10", "stl10", "cifar100", "stanford_cars", "caltech101", "oxford_pets", "flowers102", "dtd")
    for name in (*sets, "fgvc_aircraft"):
        write_shards(tmp_path, name, "test", [2], [word.upper() for word in CATALOG[name].class_names])
    write_shards(tmp_path, "eurosat", "test", [2], [f"land {number}" for number in range(10)])
    write_shards(tmp_path, "pcam", "test", [2], ["lymph node", "lymph node with a tumor"])
    for name in ("imagenet1k", "imagenet_sketch"):
        write_shards(tmp_path, name, "test", [2], CATALOG["imagenet"].class_names)
    write_shards(tmp_path, "imagenet-r", "test", [2], [f"thing {number}" for number in range(200)])
    data = configured("imagenet_fare", tmp_path)
    data.setup("test")
    tasks = {task.name: task for task in data.test_tasks}
    assert len(tasks) == 14
    assert tasks["pcam"].prompts[1] == [
        "a histopathology slide showing lymph node with a tumor", "histopathology image of lymph node with a tumor"
    ]  # fmt: skip
    assert tasks["cifar10"].prompts[0][8] == "a photo of a big AIRPLANE."
    assert tasks["imagenet"].class_names[0] == "tench"
    assert len(tasks["imagenet_r"].label_names) == 200
    counts = {name: len(task.templates) for name, task in tasks.items()}
    assert counts["imagenet_r"] == counts["imagenet"] == 80
    assert (counts["caltech101"], counts["stanford_cars"], counts["dtd"], counts["pcam"]) == (34, 8, 8, 2)
    for task in data.test_tasks:
        assert data.protocol(task.name)["preprocessing"].endswith("short side 16 bicubic antialiased, centre crop 16")
