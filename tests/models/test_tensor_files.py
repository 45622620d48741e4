"""Damage to a file of weights never gives other weights, and what is no state dict is refused in one line."""

import copy
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick_trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from robustclip.convert.open_clip_folder import write_weights
from robustclip.data import CLIPDataModule
from robustclip.methods import CRoFT
from robustclip.methods._shared.saved_state import read_checkpoint, with_digest
from robustclip.models.clip import CLIPModel, fingerprint
from robustclip.models.tensor_files import checked_state, digest, is_finite, read_file


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = CRoFT(pretrained=str(tiny_model))
    trainer = quick_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(method, datamodule=CLIPDataModule(train="shapes:source", batch_size=4, image_size=32, shots=1))
    path = tmp_path_factory.mktemp("checkpoint") / "a.ckpt"
    trainer.save_checkpoint(path)
    return path


def same(one: Any, other: Any) -> bool:
    """Whether two contents are equal, bit for bit and type for type."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def damaged(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Copies with one flipped bit, with a byte replaced, with a hole of zeros, cut, or with a part twice."""
    chance = random.Random(seed)
    for number in range(count):
        place = chance.randrange(len(data))
        spoilt = bytearray(data)
        if number % 5 < 2:
            spoilt[place] ^= 1 << chance.randrange(8)
        elif number % 5 == 2:
            spoilt[place] = chance.randrange(256)
        elif number % 5 == 3:
            spoilt[place : place + 200] = bytes(len(spoilt[place : place + 200]))
        else:
            spoilt = spoilt[:place] if chance.random() < 0.7 else spoilt[:place] + spoilt[place - 64 :]
        yield bytes(spoilt)


def accepted(read: Callable[[Path], Any], path: Path, whole: Any, cases: Iterator[bytes]) -> list[bool]:
    """For each case that is not refused in one line, whether the content is the original one."""
    answers = []
    for data in cases:
        path.write_bytes(data)
        content, refusal = attempt(lambda: read(path))
        if refusal is None:
            answers.append(same(content, whole))
        else:
            assert str(path) in refusal
            assert "\n" not in refusal
    return answers


def attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What an action returns, or the message with which it refuses."""
    try:
        return action(), None
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("count", [120, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_refused_or_the_same(count: int, checkpoint: Path, tmp_path: Path) -> None:
    cases = damaged(checkpoint.read_bytes(), count, seed=count)
    answers = accepted(read_checkpoint, tmp_path / "a.ckpt", read_checkpoint(checkpoint), cases)
    assert all(answers)
    assert len(answers) < count / 2


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("count", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_damaged_weights_are_refused_or_the_same(count: int, suffix: str, checkpoint: Path, tmp_path: Path) -> None:
    state = read_checkpoint(checkpoint)["state_dict"]
    good = tmp_path / f"good.{suffix}"
    if suffix == "pt":
        torch.save(state, good)
    else:
        write_weights(good, state)
    cases = damaged(good.read_bytes(), count, seed=count)
    answers = accepted(read_file, tmp_path / f"a.{suffix}", read_file(good), cases)
    assert all(answers)
    assert len(answers) < count / 2


def test_a_changed_value_is_refused_though_the_file_is_whole(checkpoint: Path, tmp_path: Path) -> None:
    """The digest covers what the sums of a zip file cannot: a content that another program wrote."""
    content = torch.load(checkpoint, weights_only=True)
    for change in (
        {"state_dict": {name: tensor + 1e-7 for name, tensor in content["state_dict"].items()}},
        {"inference_settings": {**content["inference_settings"], "ratio": 0.5}},
        {"optimizer_states": []},
        {"global_step": 3},
    ):
        torch.save(content | change, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match="digest"):
            read_checkpoint(tmp_path / "a.ckpt")
    torch.save({key: value for key, value in content.items() if key != "digest"}, tmp_path / "a.ckpt")
    assert same(read_checkpoint(tmp_path / "a.ckpt")["state_dict"], content["state_dict"])


ODD: tuple[Any, ...] = (None, 3, "x", {"a": 1}, torch.zeros(2), [[torch.ones(1)]])


def changed(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    content = copy.copy(content)
    content[path[0]] = changed(content[path[0]], path[1:], value) if path[1:] else value
    return content


def test_every_key_of_an_odd_type_is_refused_in_one_line_or_does_no_harm(
    checkpoint: Path, tiny_model: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    paths: list[tuple[Any, ...]] = [(key,) for key in content if key != "digest"]
    paths += [("state_dict", name) for name in content["state_dict"]] + [("base_model", "weights")]
    paths += [("inference_settings", key) for key in ("ratio", "method", "image_size", "base.mean")]
    method, path = CRoFT(pretrained=str(tiny_model)), tmp_path / "a.ckpt"

    def load() -> dict[str, Any]:
        found = read_checkpoint(path)
        method.on_load_checkpoint(found)
        method.load_state_dict(found["state_dict"], strict=False)
        return found

    refused = 0
    for place in paths:
        for value in ODD:
            torch.save(with_digest(changed(content, place, value)), path)
            found, refusal = attempt(load)
            if refusal is None:
                assert same(found["state_dict"], content["state_dict"]), place
            else:
                assert "\n" not in refusal
                refused += 1
    assert refused > len(ODD) * (len(content["state_dict"]) + 6)


WRONG: dict[str, tuple[Any, str]] = {
    "list": ([1], "must map names to tensors, got list"),
    "empty": ({}, "empty dict"),
    "text": ({"a": "x"}, "got str for 'a'"),
    "number as a name": ({1: torch.zeros(1)}, "for 1"),
    "nested": ({"a": {"b": torch.zeros(1)}}, "got dict for 'a'"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "a of .* sparse_coo"),
    "complex": ({"a": torch.zeros(2, dtype=torch.complex64)}, "a of .* complex64"),
    "without memory": ({"a": torch.zeros(2, device="meta")}, "a of .* on meta"),
    "nan": ({"a": torch.tensor([1.0, float("nan")])}, "a of .* is not finite"),
    "infinities": ({"a": torch.tensor([float("inf"), -float("inf")])}, "a of .* is not finite"),
    "half": ({"a": torch.tensor([float("inf")]).half()}, "a of .* is not finite"),
    "8 bits": ({"a": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}, "a of .* is not finite"),
}


@pytest.mark.parametrize(("state", "message"), WRONG.values(), ids=WRONG.keys())
def test_files_other_than_state_dicts_are_refused(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_state(state, "weights.pt")


@pytest.mark.filterwarnings("ignore")  # torch calls both kinds young or old
def test_compressed_and_quantised_tensors_are_refused() -> None:
    for tensor, kind in (
        (torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
    ):
        with pytest.raises(ValueError, match=f"a of weights.pt .* {kind}"):
            checked_state({"a": tensor}, "weights.pt")


def test_large_numbers_are_finite_though_their_sum_is_not() -> None:
    assert is_finite(torch.full((9,), 3e38))
    assert is_finite(torch.full((9,), 60000.0, dtype=torch.float16))
    assert is_finite(torch.tensor([2**62] * 4))


def test_a_digest_depends_on_content_alone() -> None:
    tensor = torch.randn(4, 3, 2, 2)
    content = {"a": tensor, "b": [1, (2.5, "x", None)], "c": {"d": torch.tensor(True)}}
    assert digest(content) == digest(copy.deepcopy(content))
    assert digest(tensor) == digest(tensor.to(memory_format=torch.channels_last))
    assert digest(torch.zeros(2)) == digest(torch.zeros(2))
    others = [
        tensor.double(),
        tensor.flatten(),
        -tensor,
        tensor.bfloat16(),
        tensor[:3],
        [tensor],
        {"a": tensor},
        1,
        "1",
    ]
    assert len({digest(other) for other in [tensor, *others]}) == len(others) + 1


def test_a_fingerprint_sees_every_number(tiny_model: Path) -> None:
    """64 values of each tensor, as before, would not see this one."""
    clip = CLIPModel(pretrained=str(tiny_model))
    before = fingerprint(clip.net)
    assert before == clip.fingerprint
    with torch.no_grad():
        clip.token_embedding.weight[12345, 7] += 1e-3
    assert fingerprint(clip.net) != before


def test_non_finite_base_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    weights["visual.proj"][3, 1] = float("nan")
    save_file(weights, tmp_path / "model" / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"visual\.proj of .*model.* is not finite"):
        CLIPModel(pretrained=str(tmp_path / "model"))
