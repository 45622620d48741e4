"""Attacks run in cheap precisions first; flags of TF32 are restored, and fp32 decides."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_test
from torch import Tensor, nn

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule
from robustclip.evaluation import ResultsWriter, RobustEvaluation
from robustclip.evaluation.engine import ROBUST, Rung, examine
from robustclip.evaluation.precision_ladder import description, exact, ladder, rungs
from robustclip.methods import ZeroShot
from robustclip.models import tf32 as tf32_flags
from robustclip.models.tf32 import tf32
from robustclip.results.run import Run

if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    pytest.skip("needs PyTorch's newer flags of TF32", allow_module_level=True)
BACKENDS: Any = (
    *(torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),  # type: ignore[attr-defined]
    *(torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv),  # type: ignore[attr-defined]
)


def flags() -> list[Any]:
    new = [backend.fp32_precision for backend in BACKENDS]
    return [*new, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]


@pytest.fixture(params=["as it starts", "high", "new interface"])
def start(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    before = flags()
    if request.param == "high":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = False
    if request.param == "new interface":
        torch.backends.mkldnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    yield flags()
    torch.set_float32_matmul_precision(before[-2])
    torch.backends.cudnn.allow_tf32 = before[-1]
    for backend, value in zip(BACKENDS, before, strict=False):
        backend.fp32_precision = value


def test_flags_hold_inside_and_are_restored(start: list[Any]) -> None:
    with tf32(is_allowed=True):
        assert flags() == ["tf32"] * 3 + ["ieee"] * 2 + ["high", True]
        with tf32(is_allowed=False):
            assert flags() == ["ieee"] * 5 + ["highest", False]
        assert flags() == ["tf32"] * 3 + ["ieee"] * 2 + ["high", True]
    assert flags() == start
    with pytest.raises(KeyError), tf32(is_allowed=False):
        raise KeyError
    assert flags() == start


def test_older_versions_of_pytorch_have_the_older_flags_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = flags()
    with monkeypatch.context() as patch:
        patch.setattr(tf32_flags, "_BACKENDS", {})
        with tf32(is_allowed=True):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
            with tf32(is_allowed=False):
                assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        assert flags()[-2:] == before[-2:]
    for backend, value in zip(BACKENDS, before, strict=False):
        backend.fp32_precision = value


def test_rungs_of_every_precision() -> None:
    assert [rungs("fp32", device) for device in ("cuda", "cpu")] == [[], []]
    assert [rungs("tf32", device) for device in ("cuda", "cpu")] == [["tf32"], []]
    assert [rungs("bf16", device) for device in ("cuda", "cpu")] == [["bf16", "tf32"], ["bf16"]]
    assert [rungs("bf16", device, "last") for device in ("cuda", "cpu")] == [["bf16"], ["bf16"]]


@pytest.mark.parametrize(
    ("precision", "device", "stop", "text"),
    [
        ("fp32", "cpu", "worst", "attack fp32, verdict fp32"),
        ("fp32", "cuda", "last", "attack fp32, verdict fp32"),
        ("bf16", "cuda", "worst", "attack bf16 then tf32 then fp32, verdict fp32"),
        ("tf32", "cuda", "worst", "attack tf32 then fp32, verdict fp32"),
        ("bf16", "cuda", "last", "attack bf16, verdict fp32"),
        ("bf16", "cpu", "worst", "attack bf16 then fp32 (tf32 skipped: it does not exist on cpu), verdict fp32"),
        ("tf32", "cpu", "worst", "attack fp32 (tf32 skipped: it does not exist on cpu), verdict fp32"),
    ],
)
def test_the_protocol_names_every_rung(precision: Any, device: str, stop: Any, text: str) -> None:
    assert description(precision, device, stop) == text


class Sensitive(nn.Module):
    """A model that is misclassified, and notes the flags of its passes, where TF32 is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        is_tf32 = torch.get_float32_matmul_precision() == "high"
        self.passes.append((is_tf32, torch.is_autocast_enabled("cpu")))
        value = images.flatten(1).mean(1) - images.flatten(1).mean(1).detach()
        sign = 1 if is_tf32 or torch.is_autocast_enabled("cpu") else -1
        return torch.stack([sign * (value - 1), torch.zeros_like(value)], dim=1)


def test_tf32_and_bf16_decide_no_verdict() -> None:
    """A model whose answers in both differ from those in fp32: all samples stay robust, and are attacked in fp32."""
    model, images = Sensitive(), torch.rand(4, 3, 8, 8)
    labels = torch.zeros(4, dtype=torch.int64)
    members = PGD(eps=0.1, alpha=0.05, steps=2).members(2)
    verdict = examine(images, labels, exact(model), members, cheaper=ladder(model, ["bf16", "tf32"], "cpu"))
    assert verdict.by.tolist() == [ROBUST] * 4
    assert set(model.passes) == {(False, True), (True, False), (False, False)}
    assert verdict.exact.tolist() == [2] * 4  # both steps
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_backward_pass_is_in_tf32_too() -> None:
    seen: list[bool] = []

    def forward(images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :2]
        if logits.requires_grad:
            logits.register_hook(lambda _: seen.append(torch.get_float32_matmul_precision() == "high"))
        return logits

    images, labels = torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    rung = Rung(forward, partial(tf32, is_allowed=True))
    members = PGD(eps=0.0, steps=1).members(2)
    examine(images, images.flatten(1)[:, :2].argmax(1) + 0 * labels, exact(forward), members, cheaper=[rung])
    assert seen == [True, False]


def test_a_test_in_bf16_skips_tf32_aloud_and_restores_the_flags(tiny_model: Path, tmp_path: Path) -> None:
    before = flags()
    writer = ResultsWriter(str(tmp_path))
    evaluation = RobustEvaluation({"pgd": PGD(steps=2)}, max_samples=8, attack_precision="bf16")
    data = CLIPDataModule(test=["shapes:colours"], batch_size=8, image_size=32)
    run_test(ZeroShot(pretrained=str(tiny_model)), data, evaluation, writer)
    assert writer.path is not None
    axes = Run.open(writer.path).result["protocol"]["colours"]["pgd"]["axes"]
    assert axes["precision"] == "attack bf16 then fp32 (tf32 skipped: it does not exist on cpu), verdict fp32"
    assert flags() == before
