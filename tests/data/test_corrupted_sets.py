"""Corrupted copies of test sets: their tasks, pixels and protocol, and published files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustclip.data import CLIPDataModule
from robustclip.data.corrupted_sets import Corruptions
from robustclip.data.corruptions import Corruption

PAIR = Corruptions(["gaussian_noise", "contrast"], (1, 4))
NAMES = ["colours", *(f"colours_{kind}_{level}" for kind in ("gaussian_noise", "contrast") for level in (1, 4))]


def opened(**settings: Any) -> CLIPDataModule:
    data = CLIPDataModule(**{"test": "shapes:colours", "corruptions": PAIR, "eval_batch_size": 7, **settings})
    data.connect(limit=20)
    data.setup("test")
    return data


def test_every_kind_and_severity_is_a_task_on_the_same_samples() -> None:
    data = opened()
    assert [task.name for task in data.test_tasks] == NAMES
    assert len({(task.class_names, task.templates) for task in data.test_tasks}) == 1
    batches = [list(loader) for loader in data.test_dataloader()]
    clean, *copies = [torch.cat([batch.images for batch in of_task]) for of_task in batches]
    ids = [torch.cat([batch.index for batch in of_task]).tolist() for of_task in batches]
    assert all(other == ids[0] for other in ids)
    levels = (clean * 255).round().double().permute(0, 2, 3, 1).numpy() / 255
    for name, found in zip(NAMES[1:], copies, strict=True):
        kind, _, severity = name.removeprefix("colours_").rpartition("_")
        expected = [
            Corruption(kind, int(severity))(image, number) for image, number in zip(levels, ids[0], strict=True)
        ]
        assert torch.equal(
            (found * 255).round().to(torch.uint8).permute(0, 2, 3, 1), torch.from_numpy(np.stack(expected))
        )


def test_batches_and_loader_processes_do_not_change_the_draws() -> None:
    images = [
        torch.cat([batch.images for batch in opened(**settings).test_dataloader()[1]])
        for settings in ({}, {"eval_batch_size": 20, "num_workers": 2})
    ]
    order = [
        torch.cat([batch.index for batch in opened(**settings).test_dataloader()[1]])
        for settings in ({}, {"eval_batch_size": 20, "num_workers": 2})
    ]
    assert torch.equal(images[0][order[0].argsort()], images[1][order[1].argsort()])


def test_the_protocol_names_kind_severity_and_constants() -> None:
    data = opened()
    assert "corruption" not in data.protocol("colours")
    axis = data.protocol("colours_contrast_4")["corruption"]
    assert axis == {"of": "colours", **Corruption("contrast", 4).identity}


def test_other_stages_are_not_corrupted() -> None:
    data = CLIPDataModule(train="shapes:source", val="shapes:colours", corruptions=PAIR)
    data.setup("fit")
    assert [task.name for task in data.val_tasks] == ["colours"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kinds": []}, "listed once each"),
        ({"severities": (2, 2)}, "listed once each"),
        ({"kinds": ["rain"]}, "rain"),
        ({"severities": (0,)}, "0"),
        ({"files": "a", "frost": "b"}, "corruptions.frost must be null"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Corruptions(**settings)


def test_embeddings_and_corruptions_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="features_in_test must be false"):
        CLIPDataModule(corruptions=PAIR, features="cache", features_in_test=True)


def write_images(folder: Path, level: int) -> None:
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (level, 10 * number, 0)).save(folder / name / "1.png")


@pytest.mark.parametrize("category", ["", "noise"])
def test_published_files_are_read_as_they_are(category: str, tmp_path: Path) -> None:
    write_images(tmp_path / "clean", 7)
    for severity in (1, 2):
        write_images(tmp_path / "published" / category / "shot_noise" / str(severity), 100 * severity)
    settings = Corruptions(["shot_noise"], (1, 2), files="published")
    data = CLIPDataModule(test="folder:clean", root=str(tmp_path), corruptions=settings, image_size=32)
    data.setup("test")
    assert [task.name for task in data.test_tasks] == ["clean", "clean_shot_noise_1", "clean_shot_noise_2"]
    reds = [next(iter(loader)).images[:, 0].unique().mul(255).round().tolist() for loader in data.test_dataloader()]
    assert reds == [[7], [100], [200]]
    assert data.protocol("clean_shot_noise_2")["corruption"]["constants"] == "published files"


def test_published_files_of_other_classes_or_none_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "clean", 7)
    settings = Corruptions(["shot_noise"], (1,), files=str(tmp_path / "published"))
    data = CLIPDataModule(test=f"folder:{tmp_path / 'clean'}", corruptions=settings)
    with pytest.raises(ValueError, match=r"found none; list other kinds"):
        data.setup("test")
    write_images(tmp_path / "published" / "shot_noise" / "1", 7)
    (tmp_path / "published" / "shot_noise" / "1" / "cat").rename(tmp_path / "published" / "shot_noise" / "1" / "cow")
    with pytest.raises(ValueError, match=r"must have the classes of data\.test"):
        data.setup("test")


def test_published_files_belong_to_one_test_set(tmp_path: Path) -> None:
    data = CLIPDataModule(test=["shapes:colours", "shapes:shapes"], corruptions=Corruptions(files=str(tmp_path)))
    with pytest.raises(ValueError, match=r"copies of one set, but data\.test lists 2"):
        data.setup("test")
