"""Corrupted copies of test sets: their tasks, pixels and protocol, and published files."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robustclip.data import CLIPDataModule
from robustclip.data.corrupted_sets import Corruptions
from robustclip.data.corruptions import Corruption
from robustclip.data.data_source import DataSource
from robustclip.data.opened_source import open_source

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


def test_published_files_that_lack_images_of_the_set_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "clean", 7)
    write_images(tmp_path / "published" / "fog" / "3", 7)
    Image.new("RGB", (32, 32)).save(tmp_path / "clean" / "dog" / "2.png")
    settings = Corruptions(["fog"], (3,), files=str(tmp_path / "published"))
    data = CLIPDataModule(test=f"folder:{tmp_path / 'clean'}", corruptions=settings)
    with pytest.raises(ValueError, match=r"for fog at severity 3, found 1 of 'dog' instead of 2"):
        data.setup("test")


@pytest.mark.parametrize("key", ["files", "frost"])
def test_urls_of_published_files_and_of_frost_are_refused(key: str) -> None:
    data = CLIPDataModule(test="shapes:colours", corruptions=Corruptions(["frost"], (1,), **{key: "s3://bucket/a"}))
    with pytest.raises(ValueError, match=rf"data\.corruptions\.{key} 's3://bucket/a' has the URL scheme"):
        data.setup("test")


def test_a_photograph_of_frost_that_does_not_decode_is_no_fault_of_the_images(tmp_path: Path) -> None:
    (tmp_path / "frost.png").write_bytes(b"no image")
    (tmp_path / "folder.png").mkdir()
    settings = Corruptions(["frost"], (1,), frost=str(tmp_path))
    data = CLIPDataModule(test="shapes:colours", corruptions=settings, bad_samples="skip")
    with pytest.raises(ValueError, match=rf"data\.corruptions\.frost: {tmp_path / 'frost.png'} does not decode"):
        data.setup("test")


def test_published_files_belong_to_one_test_set(tmp_path: Path) -> None:
    data = CLIPDataModule(test=["shapes:colours", "shapes:shapes"], corruptions=Corruptions(files=str(tmp_path)))
    with pytest.raises(ValueError, match=r"copies of one set, but data\.test lists 2"):
        data.setup("test")


# The layout of CIFAR-10-C: a file per kind, with the severities one after another.


def write_arrays(folder: Path, *, labels: Any = (0, 1), kinds: tuple[str, ...] = ("fog", "contrast")) -> None:
    """Two images per severity, whose red level is ten times the severity plus the image's number."""
    folder.mkdir(exist_ok=True)
    reds = np.array([10 * severity + number for severity in range(1, 6) for number in range(2)], dtype=np.uint8)
    for kind in kinds:
        np.save(folder / f"{kind}.npy", np.broadcast_to(reds[:, None, None, None], (10, 32, 32, 3)))
    np.save(folder / "labels.npy", np.tile(np.array(labels, dtype=np.uint8), 5))


def archive() -> bytes:
    content = io.BytesIO()
    np.savez(content, labels=np.zeros(10, np.uint8))
    return content.getvalue()


def of_arrays(folder: Path, **settings: Any) -> CLIPDataModule:
    if not (folder / "clean").exists():
        write_images(folder / "clean", 7)
    corruptions = Corruptions(["fog", "contrast"], (2, 5), files=str(folder / "published"))
    data = CLIPDataModule(test=f"folder:{folder / 'clean'}", corruptions=corruptions, image_size=32, **settings)
    data.setup("test")
    return data


@pytest.mark.parametrize("workers", [0, 1])
def test_numpy_files_give_the_images_and_labels_of_their_severities(tmp_path: Path, workers: int) -> None:
    write_arrays(tmp_path / "published")
    data = of_arrays(tmp_path, num_workers=workers)
    names = ["clean", "clean_fog_2", "clean_fog_5", "clean_contrast_2", "clean_contrast_5"]
    assert [task.name for task in data.test_tasks] == names
    batches = [next(iter(loader)) for loader in data.test_dataloader()[1:]]
    reds = [batch.images[:, 0, 0, 0].mul(255).round().tolist() for batch in batches]
    assert reds == [[20, 21], [50, 51]] * 2
    assert all(batch.labels.tolist() == [0, 1] for batch in batches)
    assert data.protocol("clean_fog_5")["corruption"] == {
        "of": "clean", "kind": "fog", "severity": 5, "constants": "published files",
    }  # fmt: skip


def test_a_numpy_file_is_a_source_of_all_severities_or_of_one(tmp_path: Path) -> None:
    write_arrays(tmp_path)
    source = {"source": "npy:fog.npy", "class_names": ["cat", "dog"]}
    data = CLIPDataModule(
        test=[DataSource(**source, name="all"), DataSource(**source, name="three", split="3")],
        root=str(tmp_path), image_size=32,
    )  # fmt: skip
    data.setup("test")
    batches = [next(iter(loader)) for loader in data.test_dataloader()]
    assert [len(batch.labels) for batch in batches] == [10, 2]
    assert batches[1].images[:, 0, 0, 0].mul(255).round().tolist() == [30, 31]
    with pytest.raises(ValueError, match="severity from '1' to '5'"):
        open_source(DataSource(**source, split="6"), root=str(tmp_path), split="test")


def test_labels_of_another_order_are_refused_where_no_catalogue_has_the_order(tmp_path: Path) -> None:
    write_arrays(tmp_path / "published", labels=(1, 0))
    with pytest.raises(ValueError, match=r"labels\.npy must have the labels of data\.test, 'clean', found others"):
        of_arrays(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("fog.npy", np.zeros((9, 32, 32, 3), np.uint8), r"found \(9, 32, 32, 3\) of uint8"),
        ("fog.npy", np.zeros((10, 3, 32, 32), np.uint8), r"found \(10, 3, 32, 32\)"),
        ("fog.npy", np.zeros((10, 32, 32, 3), np.float32), "of float32"),
        ("fog.npy", np.array([None]), "must be a NumPy file"),
        ("fog.npy", b"no array", "must be a NumPy file"),
        ("fog.npy", archive(), r"found an archive \(\.npz\)"),
        ("labels.npy", archive(), r"found an archive \(\.npz\)"),
        ("fog.npy", None, "is no file"),
        ("labels.npy", None, "is no file"),
        ("labels.npy", np.zeros(2, np.uint8), r"must have 10 integer labels, one per image, found \(2,\)"),
        ("labels.npy", np.zeros(10), "of float64"),
        ("labels.npy", np.arange(10), "labels of one severity five times"),
    ],
)
def test_numpy_files_of_another_layout_are_refused(tmp_path: Path, file: str, content: Any, words: str) -> None:
    write_arrays(tmp_path / "published")
    path = tmp_path / "published" / file
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ValueError, match=words) as error:
        of_arrays(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
