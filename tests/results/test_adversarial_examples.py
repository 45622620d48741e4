"""Examples come back bit by bit, and what is none is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from robustclip.results.adversarial_examples import Example, load, load_all, save


def example(**changes: Any) -> Example:
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    return Example(images[0], images[1], "digits", "pgd", 12, 3, 3, 5, "fgsm", 1 / 255, "l2")._replace(**changes)


@pytest.mark.parametrize("eps", [1 / 255, 0.1 + 0.2, float("inf")])
def test_an_example_comes_back_bit_by_bit(tmp_path: Path, eps: float) -> None:
    written = example(eps=eps, attacked=example().attacked.flip(0)[[2, 1, 0]] - 1e-8)
    path = save(written, tmp_path)
    assert path == tmp_path / "digits" / "pgd" / "12.safetensors"
    read = load(path)
    assert torch.equal(read.clean, written.clean)
    assert torch.equal(read.attacked, written.attacked)
    assert read[2:] == written[2:]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_view_of_a_batch_and_pixels_that_are_nan_come_back(tmp_path: Path) -> None:
    batch = torch.rand(4, 5, 7, 3).permute(0, 3, 1, 2)
    read = load(save(example(clean=batch[2], attacked=torch.full((3, 5, 7), torch.nan)), tmp_path))
    assert torch.equal(read.clean, batch[2])
    assert read.attacked.isnan().all()


def test_double_precision_is_stored_as_float32(tmp_path: Path) -> None:
    read = load(save(example(clean=example().clean.double()), tmp_path))
    assert torch.equal(read.clean, example().clean)


def test_examples_come_in_the_order_of_task_attack_and_number(tmp_path: Path) -> None:
    keys = [("b", "pgd", 2), ("b", "pgd", 10), ("a", "pgd", 3), ("a", "fgsm", 30), ("b", "pgd", 9)]
    for task, attack, number in keys:
        save(example(task=task, attack=attack, number=number), tmp_path)
    (tmp_path / "a" / "pgd" / ".7.safetensors.123").write_bytes(b"being written")
    assert [(each.task, each.attack, each.number) for each in load_all(tmp_path)] == sorted(keys)
    assert list(load_all(tmp_path / "none")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "../x"}, r"named \[a-z0-9_\]\+, got '\.\./x'"),
        ({"attack": ""}, "got ''"),
        ({"number": -1}, "number must be at least 0, got -1"),
        ({"clean": torch.rand(1, 5, 7)}, r"\(3, H, W\), found \(1, 5, 7\) and \(3, 5, 7\)"),
        ({"attacked": torch.rand(3, 5, 8)}, "one shape"),
        ({"norm": "l3"}, "norm linf, l2 or l1 .* found l3"),
        ({"eps": float("nan")}, "eps >= 0, found .* nan"),
    ],
)
def test_malformed_examples_are_not_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save(example(**changes), tmp_path)
    assert list(tmp_path.iterdir()) == []


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **metadata: str | None) -> None:
    """Changes a file without the checks of `save`; None drops an entry."""
    given = load(path)
    names = ("label", "clean_prediction", "prediction", "by", "eps", "norm", "task", "attack")
    text = {name: str(getattr(given, name)) for name in names} | {"id": str(given.number)} | metadata
    kept = {name: value for name, value in text.items() if value is not None}
    save_file(load_file(path) if tensors is None else tensors, path, metadata=kept)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "is no example"),
        (lambda path: path.write_bytes(b""), "is no example"),
        (lambda path: path.unlink(), "is no example"),
        (lambda path: rewrite(path, {"clean": torch.rand(3, 5, 7)}), r"expected the tensors .* found \['clean'\]"),
        (lambda path: rewrite(path, {name: torch.ones(3, 5, 7).double() for name in ("clean", "attacked")}), "float64"),
        (lambda path: rewrite(path, norm=None), "lacks 'norm'"),
        (lambda path: rewrite(path, label="three"), "'three'"),
        (lambda path: rewrite(path, eps="nan"), "eps >= 0"),
        (lambda path: rewrite(path, id="13"), "holds the example digits/pgd/13.safetensors"),
        (lambda path: rewrite(path, task="../../etc"), "named"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    path = save(example(), tmp_path)
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_files_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    path = save(example(), inside)
    path.rename(tmp_path / "12.safetensors")
    path.symlink_to(tmp_path / "12.safetensors")
    with pytest.raises(ValueError, match="leads out of"):
        list(load_all(inside))
    save(example(), outside).rename(outside / "digits" / "pgd" / "x.safetensors")
    with pytest.raises(ValueError, match=r"expected a name such as 12\.safetensors"):
        list(load_all(outside))


def test_the_same_example_is_the_same_bytes(tmp_path: Path) -> None:
    contents = {save(example(), tmp_path / str(number)).read_bytes() for number in range(8)}
    assert len(contents) == 1
