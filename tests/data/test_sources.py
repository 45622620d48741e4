"""From a line of configuration to a data set: every kind of source, and whose class names go first."""

from pathlib import Path

import numpy as np
import pytest
from helpers import ShardWriter
from PIL import Image

from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.catalog import CATALOG
from robustclip.data.opened_source import OpenedSource, open_source
from robustclip.data.sources.source import labels_of


def opened(source: DataSource | str, root: Path | str = ".", split: str = "test") -> OpenedSource:
    return open_source(source, root=str(root), split=split)


def test_local_shards_are_read_at_random(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "My-Set", "test", [2, 3])
    source = opened("wds:My-Set", tmp_path)
    assert source.task.name == "my_set"
    assert source.task.class_names == ("red", "green", "blue")
    assert source.task.templates == ("a photo of a {}", "a drawing of a {}")  # `{c}` is how clip_benchmark writes it
    assert source.dataset is not None
    assert labels_of(source.dataset) == [0, 1, 2, 0, 1]
    assert not source.native_size


def test_a_url_is_streamed(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [2, 3])
    source = opened(f"wds:file://{base}", "/nowhere")
    assert source.dataset is None
    assert source.urls == (f"file://{base}/test/0.tar", f"file://{base}/test/1.tar")
    assert source.task.class_names == ("red", "green", "blue")


def test_an_absolute_path_does_not_start_at_the_root(tmp_path: Path, write_shards: ShardWriter) -> None:
    assert opened(f"wds:{write_shards(tmp_path, 'set', 'test', [1])}", "/nowhere").dataset is not None


def test_the_split_of_the_configuration_goes_first(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "set", "test", [1])
    write_shards(tmp_path, "set", "train", [2])
    for wanted, size in ((None, 1), ("train", 2)):
        dataset = opened(DataSource("wds:set", split=wanted), tmp_path).dataset
        assert len(dataset) == size  # type: ignore[arg-type]


def test_a_folder_of_class_folders_is_a_data_set(tmp_path: Path) -> None:
    for number, name in enumerate(("bus_stop", "apple")):
        (tmp_path / "pictures" / "test" / name).mkdir(parents=True)
        for index in range(2):
            pixels = np.full((8, 8, 3), 100 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / "test" / name / f"{index}.png")
    source = opened("folder:pictures", tmp_path)
    assert source.task.name == "pictures"
    assert source.task.class_names == ("apple", "bus stop")
    assert source.dataset is not None
    assert labels_of(source.dataset) == [0, 0, 1, 1]
    assert np.asarray(source.dataset[3][0]).max() == 0


def test_a_torchvision_set_needs_class_names_of_its_own() -> None:
    with pytest.raises(ValueError, match="torchvision:FakeData' brings no class names"):
        opened("torchvision:FakeData")
    names = [f"thing {number}" for number in range(10)]
    source = opened(DataSource("torchvision:FakeData", class_names=names))
    assert source.task.name == "fakedata"
    assert source.task.class_names == tuple(names)
    assert len(source.dataset) == 1000  # type: ignore[arg-type]


def test_a_torchvision_set_that_is_not_there_is_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torchvision:CIFAR10 does not open below"):
        opened("torchvision:CIFAR10", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_shapes_world_brings_its_words_and_keeps_its_size() -> None:
    source = opened("shapes:source", split="train")
    assert source.native_size
    assert source.dataset is not None
    assert len(source.task.class_names) > 1


def test_a_catalogue_name_brings_the_papers_words(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "cifar10", "test", [20], classes=[f"class {number}" for number in range(10)])
    source = opened("cifar10", tmp_path)
    assert source.task.name == "cifar10"
    assert source.task.class_names == CATALOG["cifar10"].class_names
    assert source.task.templates == CATALOG["cifar10"].templates
    assert source.native_size


def test_words_come_from_the_configuration_then_from_beside_the_data_then_from_the_catalogue(
    tmp_path: Path, write_shards: ShardWriter
) -> None:
    beside = [f"class {number}" for number in range(10)]
    configured = [f"thing {number}" for number in range(10)]
    base = write_shards(tmp_path, "cifar10", "test", [10], classes=beside)
    given = DataSource("wds:cifar10", class_names=configured, templates=["{}!"])
    assert opened(given, tmp_path).task.class_names == tuple(configured)
    assert opened(given, tmp_path).task.templates == ("{}!",)
    assert opened("wds:cifar10", tmp_path).task.class_names == tuple(beside)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (base / name).unlink()
    assert opened("wds:cifar10", tmp_path).task.class_names == CATALOG["cifar10"].class_names
    assert opened("wds:cifar10", tmp_path).task.templates == CATALOG["cifar10"].templates


def test_the_catalogue_decides_by_the_name_that_was_given(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "my_copy", "test", [3])
    (base / "classnames.txt").unlink()
    source = opened(DataSource("wds:my_copy", name="cifar10"), tmp_path)
    assert source.task.class_names == CATALOG["cifar10"].class_names
    assert source.native_size
    with pytest.raises(ValueError, match="brings no class names; give `class_names`"):
        opened("wds:my_copy", tmp_path)


def test_another_number_of_class_names_than_beside_the_data_is_refused(
    tmp_path: Path, write_shards: ShardWriter
) -> None:
    write_shards(tmp_path, "set", "test", [3])
    with pytest.raises(ValueError, match="has 2 class names for its 3 labels"):
        opened(DataSource("wds:set", class_names=["red", "green"]), tmp_path)


def test_a_label_without_a_class_is_named(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [3])
    (base / "classnames.txt").write_text("red\ngreen\n")
    with pytest.raises(ValueError, match=r"test/0\.tar key 's0000002' has label 2, but there are 2 class names"):
        opened("wds:set", tmp_path)


def test_an_empty_set_is_refused(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "set", "test", [0])
    with pytest.raises(ValueError, match="has no samples"):
        opened("wds:set", tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s3:bucket", "must begin with one of wds:, torchvision:, folder:, list:, npy:, shapes:"),
        ("cifar", "did you mean"),
        ("torchvision:Nothing", "torchvision has no data set 'Nothing'"),
        ("wds:nothing", "no such data set; check the path and `root`"),
        ("folder:nothing", "needs one sub-folder of images per class"),
    ],
)
def test_a_missing_source_is_reported(tmp_path: Path, source: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        opened(source, tmp_path)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "set", "test", [3])
    with pytest.raises(ValueError, match="2 data sets are named 'set'; give each its own `name`"):
        CLIPDataModule(test=["wds:set", "wds:set"], root=str(tmp_path)).setup("test")


def test_training_from_a_url_needs_its_length(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "train", [3])
    data = CLIPDataModule(f"wds:file://{base}")
    data.setup("fit")
    with pytest.raises(ValueError, match="give its number of samples as `length`"):
        data.train_dataloader()
