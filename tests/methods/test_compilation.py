"""Compiled towers compute what the others do, in every use of a method, and leave checkpoints as they are."""

import copy
import shutil
from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from helpers import quick_trainer, run_test
from torch import Tensor

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule
from robustclip.evaluation import RobustEvaluation
from robustclip.methods import PMGAFT, CoOp, RobustMethod, TeCoA
from robustclip.models.compilation import compile_towers
from robustclip.models.layers import checkpoint_activations, frozen

BOX = PGD(eps="8/255", alpha="4/255", steps=2)


def blocks(method: Any) -> list[Any]:
    net = method.clip.net
    return [*net.visual.transformer.resblocks, *net.transformer.resblocks]


@pytest.fixture(autouse=True)
def no_code_of_other_tests() -> None:
    torch._dynamo.reset()


@pytest.fixture
def compiler() -> None:
    """A compiler that works, else the test is skipped."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:
        pytest.skip(f"torch.compile does not work on this machine: {str(error).splitlines()[0]}")


def test_names_settings_and_copies_are_as_without(tiny_model: Path) -> None:
    plain, compiled = (PMGAFT(pretrained=str(tiny_model), compile=value) for value in (False, True))
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert plain.inference_settings == compiled.inference_settings
    assert [block._compiled_call_impl is None for block in blocks(plain)] == [True] * 3
    assert [block._compiled_call_impl is None for block in blocks(compiled)] == [False] * 3
    assert copy.deepcopy(compiled).clip.net.visual.transformer.resblocks[0]._compiled_call_impl is None
    teacher = compiled.teacher.clip.net.visual.transformer.resblocks
    assert all(block._compiled_call_impl is not None for block in teacher)


def test_problems_are_refused_in_one_line(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="layer must be logits or features where compile is true, got -1"):
        PMGAFT(pretrained=str(tiny_model), compile=True, layer=-1)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler"):
        TeCoA(pretrained=str(tiny_model), compile=True)


def gradients(method: Any, images: Tensor) -> list[Tensor]:
    """Gradients of the trained parameters, and of the pixels in eval mode with all parameters frozen."""
    method.zero_grad()
    method.logits(images).square().mean().backward()
    learnt = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    assert learnt
    pixels = images.clone().requires_grad_()
    with frozen(method):
        (found,) = torch.autograd.grad(method.logits(pixels).square().mean(), pixels)
    return [*learnt, found]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpointing", "prompted", "context"])
def test_captured_graphs_compute_the_same_in_every_use(kind: str, tiny_model: Path) -> None:
    """Without a code generator, so that the graphs themselves are compared, at two batch sizes."""
    prompts = {"prompt": "padding", "prompt_size": 4, "prompt_tokens": 3, "prompts_only": False}
    cls: type[RobustMethod] = CoOp if kind == "context" else TeCoA
    options: dict[str, Any] = {"prompted": prompts, "context": {"phrase": "a photo of a"}}.get(kind, {})
    plain, compiled = cases.make(cls, tiny_model, **options), cases.make(cls, tiny_model, **options)
    compiled.load_state_dict(plain.state_dict())
    if kind == "checkpointing":
        for method in (plain, compiled):
            checkpoint_activations(method.clip.net.visual)
    compile_towers(compiled.clip, backend="aot_eager")
    for size in (4, 3):
        images = cases.batch(size).images
        for ours, theirs in zip(gradients(compiled, images), gradients(plain, images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled.logits(images), plain.logits(images), rtol=0, atol=0.1)


@pytest.mark.slow
def test_fit_and_test_of_compiled_towers(compiler: None, tiny_model: Path, tmp_path: Path) -> None:
    results = []
    for value in (False, True):
        torch.manual_seed(0)
        method = TeCoA(
            pretrained=str(tiny_model), attack=BOX, compile=value, warmup_steps=0,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
        )  # fmt: skip
        data = CLIPDataModule("shapes:source", test=["shapes:colours"], batch_size=8, image_size=32, shots=1)
        evaluation = RobustEvaluation({"pgd": BOX}, max_samples=8)
        trainer = quick_trainer(evaluation, max_steps=2)
        trainer.fit(method, datamodule=data)
        trainer.save_checkpoint(tmp_path / f"{value}.ckpt")
        metrics = {name: float(number) for name, number in trainer.callback_metrics.items() if "acc1" in name}
        metrics |= cases.test(TeCoA(pretrained=str(tiny_model)), tmp_path / f"{value}.ckpt")
        tested = run_test(method, data, RobustEvaluation({"pgd": BOX}, max_samples=8)).callback_metrics
        metrics |= {name: float(number) for name, number in tested.items() if name.endswith("correct")}
        results.append((metrics, torch.load(tmp_path / f"{value}.ckpt", weights_only=True)["state_dict"]))
    (plain, weights), (compiled, their_weights) = results
    assert compiled == plain
    assert "test/colours/pgd/correct" in plain
    assert weights.keys() == their_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(their_weights[name], tensor, rtol=0, atol=1e-4)
