"""Data sets of a user: classes from a file outside the package, and objects."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from robustclip.cli.main import run
from robustclip.data import CLIPDataModule, DataSource, Opened, Source
from robustclip.data.transforms import Augmentation, ToPixels
from robustclip.results.run import Run

OWN_SOURCE = """
import torch
from robustclip.data import Opened, Source

class Shades(Source):
    def open(self, split):
        pairs = [(torch.full((3, 40, 40), number / 7), number % 2) for number in range(8)]
        return Opened(pairs, names=["even shade", "odd shade"])
"""
OWN_DATASET = """
import torch
from torch.utils.data import Dataset

class Split(Dataset):
    classes = ["even shade", "odd shade"]
    def __init__(self, split, count=8):
        self.count = count if split == "test" else 2
        self.targets = [number % 2 for number in range(self.count)]
    def __len__(self):
        return self.count
    def __getitem__(self, number):
        return torch.full((3, 40, 40), number / 8), self.targets[number]
"""


class Given(Dataset[Any]):
    """Samples as they are given."""

    def __init__(self, samples: list[Any], **attributes: Any) -> None:
        self.samples = samples
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Any:
        return self.samples[number]


def shade(value: float, side: int = 40) -> Tensor:
    return torch.full((3, side, side), value)


def opened(given: Any, **options: Any) -> CLIPDataModule:
    data = CLIPDataModule(test=given, image_size=32, batch_size=8, **options)
    data.setup("test")
    return data


def batches(data: CLIPDataModule) -> list[Any]:
    return [batch for loader in data.test_dataloader() for batch in loader]


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module of the user's into the current folder, and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        name = f"own_{abs(hash(text)) % 10**8}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


@pytest.mark.parametrize("text", [OWN_SOURCE, OWN_DATASET])
def test_an_own_class_is_evaluated_from_the_command_line(
    own_file: Callable[[str], str], text: str, tiny_model: Path, tmp_path: Path
) -> None:
    assert len(text.strip().splitlines()) <= 15
    name = "Shades" if text is OWN_SOURCE else "Split"
    words = ["--model", "ZeroShot", "--model.pretrained", str(tiny_model), "--trainer.accelerator", "cpu"]
    words += ["--data.test", f"{own_file(text)}.{name}", "--results.folder", "results", "--results.name", "own"]
    assert run(["test", *words, "--trainer.enable_progress_bar", "false"]) == 0
    assert Run.open(tmp_path / "results" / "own").result["tasks"][name.lower()]["n"] == 8


def test_the_path_of_a_class_is_given_the_split_and_the_mapping_its_own_arguments(
    own_file: Callable[[str], str],
) -> None:
    module = own_file(OWN_DATASET)
    data = opened([f"{module}.Split", DataSource(f"{module}.Split", name="few", split="train")])
    assert [len(batch.labels) for batch in batches(data)] == [8, 2]
    assert data.test_tasks[0].class_names == ("even shade", "odd shade")


def test_a_source_is_named_and_worded_like_ours(own_file: Callable[[str], str]) -> None:
    source = DataSource(f"{own_file(OWN_SOURCE)}.Shades", name="mine", templates="a shade: {}")
    (task,) = opened(source).test_tasks
    assert (task.name, task.templates) == ("mine", ("a shade: {}",))
    assert task.prompts[0] == ["a shade: even shade"]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("absent_module.MySet", ("'absent_module.MySet'", "absent_module")),
        ("json.JSONDecoder", ("'json.JSONDecoder'", "torch.utils.data.Dataset")),
        ("json.nothing", ("'json.nothing'", "nothing")),
        ("nonsense:x", ("folder:/my/photos", "my_module.MySet")),
    ],
)
def test_classes_other_than_data_sets_are_refused(source: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="data") as error:
        opened(source)
    for part in parts:
        assert part in str(error.value)


def test_an_own_class_that_needs_arguments_is_refused_with_the_way_to_give_them(own_file: Callable[[str], str]) -> None:
    module = own_file(OWN_DATASET.replace("count=8", "count"))
    with pytest.raises(ValueError, match=r"count.*init_args"):
        opened(f"{module}.Split")


def test_an_object_gives_its_own_pixels_labels_and_names() -> None:
    values = (0.0, 0.3, 1.0)
    data = opened(Given([(shade(value, 48), number) for number, value in enumerate(values)], classes=["a", "b", "c"]))
    (batch,) = batches(data)
    assert data.test_tasks[0].name == "given"
    assert data.test_tasks[0].class_names == ("a", "b", "c")
    assert batch.labels.tolist() == batch.index.tolist() == [0, 1, 2]
    assert torch.allclose(batch.images, torch.tensor(values)[:, None, None, None].expand(3, 3, 32, 32))


def test_images_of_pillow_and_tensors_are_cropped_alike() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).double() / 255
    for border in (0, 3):
        by_pillow, by_tensor = (ToPixels(32, border)(image) for image in (Image.fromarray(pixels), tensor))
        assert by_tensor.shape == by_pillow.shape == (3, 32, 32)
        assert by_tensor.dtype == torch.float32
        assert (by_pillow - by_tensor).abs().max() <= 1.01 / 255  # Pillow rounds to 8 bits after each direction


def test_tensors_are_augmented_within_the_image() -> None:
    images = [(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(n)), n % 2) for n in range(6)]
    options = {"train": Given(images, classes=["a", "b"], targets=[n % 2 for n in range(6)]), "holdout": 0}
    data = CLIPDataModule(image_size=32, batch_size=6, augmentation=Augmentation((0.2, 0.4)), **options)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.images.shape == (6, 3, 32, 32)
    assert 0 <= batch.images.min() < batch.images.max() <= 1


@pytest.mark.parametrize(
    ("samples", "attributes", "parts"),
    [
        ([(shade(0.5), 0), (shade(0.5), 2)], {}, ("sample 1", "label 2", "2 class names")),
        ([(shade(0.5), 0), (shade(0.5), -2)], {}, ("sample 1", "label -2")),
        ([(shade(0.5), 0), (shade(0.5), 2)], {"targets": [0, 2]}, ("label 2", "2 class names")),
        ([(shade(2.0), 0)], {}, ("sample 0", "[0, 1]", "2 to 2")),
        ([(shade(torch.nan), 0)], {}, ("sample 0", "[0, 1]", "nan")),
        ([(shade(0.5)[0], 0)], {}, ("sample 0", "(3, H, W)", "(40, 40)")),
        ([(shade(1).byte(), 0)], {}, ("sample 0", "float", "uint8")),
        ([("a.png", 0)], {}, ("sample 0", "PIL", "str")),
        ([{"image": shade(0.5)}], {}, ("sample 0", "(image, label)", "dict")),
        ([(shade(0.5, 0), 0)], {}, ("sample 0", "(3, H, W)", "(3, 0, 0)")),
        ([(shade(0.5), 0), (shade(0.5), -1)], {}, ("sample 1", "label -1", "2 class names")),
        ([(shade(0.5), 0), (shade(0.5), 1)], {"targets": [0, 0]}, ("sample 1", "label 1", "lists 0")),
    ],
)
def test_samples_that_do_not_fit_are_refused_by_number(
    samples: list[Any], attributes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"given|sample") as error:
        batches(opened(Given(samples, classes=["a", "b"], **attributes)))
    for part in parts:
        assert part in str(error.value)


LABELS = [torch.nan, torch.inf, 0.5, "1", b"1", None, torch.eye(2)[1], np.eye(2)[1], {"boxes": 1}]


@pytest.mark.parametrize("label", LABELS, ids=lambda label: type(label).__name__ + str(label)[:4])
def test_labels_that_are_no_numbers_of_classes_are_refused_in_one_line(label: Any) -> None:
    pairs = [(shade(0.5), 0), (shade(0.5), label)]
    with pytest.raises(ValueError, match=r"sample 1 of given must have the number of a class") as read:
        batches(opened(Given(pairs, classes=["a", "b"])))
    with pytest.raises(ValueError, match=r"'targets' of Given at place 1 must have the number of a class") as listed:
        opened(Given(pairs, classes=["a", "b"], targets=[0, label]))
    assert all("\n" not in str(error.value) for error in (read, listed))


@pytest.mark.parametrize("given", [Path("photos"), 7])
def test_an_object_that_gives_no_samples_by_position_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"write a path as 'folder:PATH'|must be DataSource or a text"):
        opened(given)


def test_an_iterable_data_set_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        classes = ("a", "b")

        def __iter__(self) -> Any:
            return iter([(shade(0.5), 0)])

    with pytest.raises(ValueError, match=r"data source of Stream must give samples by position, with `__getitem__`"):
        opened(Stream())


def test_an_object_needs_names_of_its_classes_and_more_than_one_of_them() -> None:
    samples = [(shade(0.5), 0)]
    with pytest.raises(ValueError, match="class_names"):
        opened(Given(samples))
    with pytest.raises(ValueError, match="one class"):
        opened(Given(samples, classes=["a"]))
    (task,) = opened(DataSource(Given(samples), class_names=["x", "y"])).test_tasks
    assert task.class_names == ("x", "y")


def test_classes_without_an_image_are_named_where_the_labels_are_known_alone(caplog: pytest.LogCaptureFixture) -> None:
    samples = [(shade(0.5), 0), (shade(0.5), 0)]
    opened(Given(samples, classes=["a", "b"]))
    assert not caplog.messages
    opened(Given(samples, classes=["a", "b"], targets=[0, 0]))
    assert "has no image of 1 of its 2 classes: 'b'" in caplog.text


def test_parts_and_hold_outs_of_an_object_go_by_labels_that_need_no_decoding() -> None:
    class Lazy(Given):
        def __getitem__(self, number: int) -> Any:
            raise AssertionError("an image is read")

    labels = [number % 3 for number in range(30)]
    data = CLIPDataModule(train=Lazy(labels, targets=labels, classes=["a", "b", "c"]), holdout=0.1)
    data.setup("fit")
    assert data.val_positions is not None
    assert sorted(labels[position] for position in data.val_positions) == [0, 1, 2]
    source = DataSource(Lazy(labels, targets=torch.tensor(labels), classes=["a", "b", "c"]), classes="0-1")
    assert opened(source).test_tasks[0].class_names == ("a", "b")


def test_one_value_stands_for_a_list_of_one() -> None:
    for given in ("shapes:colours", ["shapes:colours"], ("shapes:colours",), DataSource("shapes:colours")):
        assert [task.name for task in opened(given).test_tasks] == ["colours"]
    data = CLIPDataModule(train=Given([(shade(0.5), 0)], classes=["a", "b"]), val="shapes:colours")
    data.setup("fit")
    assert [task.name for task in data.val_tasks] == ["colours"]


def test_the_contract_of_a_source_is_short() -> None:
    lines = [line for line in inspect.getsource(Source).splitlines() if line.strip()]
    assert len(lines) <= 12
    assert Opened([(shade(0), 0)]).urls == ()  # only the data set is required
