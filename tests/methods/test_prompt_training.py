"""What learns with a visual prompt, at which rate, on which tower, and what is refused."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import method_cases as cases
import open_clip
import pytest
import torch

from robustclip.convert.exporting import export
from robustclip.data import CLIPDataModule
from robustclip.methods import TeCoA
from robustclip.tools.interpolate import interpolate

PADDING = {"prompt": "padding", "prompt_size": 4}
BOTH = {**PADDING, "prompt_tokens": 3}


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """open_clip takes longer to build a tokenizer than most of these tests take."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(open_clip.factory, "SimpleTokenizer", functools.cache(open_clip.SimpleTokenizer))
        yield


def test_prompts_and_tower_have_their_own_rates(tiny_model: Path) -> None:
    method = TeCoA(pretrained=str(tiny_model), prompts_only=False, last_blocks=1, **PADDING)
    tower, prompts = method.optimizer(method.parameter_groups()).param_groups
    assert (tower["lr"], prompts["lr"], prompts["momentum"], prompts["weight_decay"]) == (1e-5, 40.0, 0.9, 0.0)
    assert {id(each) for each in prompts["params"]} == {id(each) for each in method.prompt.parameters()}
    assert len(tower["params"]) == 2 + 12  # ln_post and the twelve tensors of a block
    (alone,) = TeCoA(pretrained=str(tiny_model), prompt_tokens=2).parameter_groups()
    assert [tuple(each.shape) for each in alone["params"]] == [(1, 2, 32)]


def test_a_frozen_tower_is_in_eval_mode(tiny_model: Path) -> None:
    method = TeCoA(pretrained=str(tiny_model), **PADDING)
    assert (method.clip.training, method.prompt.training) == (False, True)
    assert TeCoA(pretrained=str(tiny_model), prompts_only=False, **PADDING).train().clip.training


def test_prompts_learn_on_top_of_a_fine_tuned_tower_and_only_there(tiny_model: Path, tmp_path: Path) -> None:
    """Train the tower, export it, train prompts on the export: the tower stays, export and interpolation refuse."""
    bold = {"warmup_steps": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
    tuned = TeCoA(pretrained=str(tiny_model), **bold)
    cases.fit(tuned, steps=2)
    export(tuned, tmp_path / "tuned")
    method = TeCoA(pretrained=str(tmp_path / "tuned"), warmup_steps=0, **BOTH)
    cases.fit(method, steps=2).save_checkpoint(tmp_path / "prompts.ckpt")
    for name, tensor in tuned.clip.net.state_dict().items():
        assert torch.equal(tensor, method.clip.net.state_dict()[name]), name
    again = TeCoA(pretrained=str(tmp_path / "tuned"), **BOTH)
    cases.test(again, tmp_path / "prompts.ckpt")
    images = cases.batch().images
    assert torch.equal(again.eval().image_features(images), method.eval().image_features(images))
    with pytest.raises(ValueError, match="trained with weights"):
        cases.test(TeCoA(pretrained=str(tiny_model), **BOTH), tmp_path / "prompts.ckpt")
    with pytest.raises(ValueError, match=r"adds to the towers at inference .* as prompts"):
        export(method, tmp_path / "out")
    with pytest.raises(ValueError, match=r"'prompt.*original model"):
        interpolate(again, tmp_path / "prompts.ckpt", tmp_path / "between", alphas=[0.5])
    with pytest.raises(ValueError, match=r"prompt 'padding', this run has None"):
        cases.test(TeCoA(pretrained=str(tmp_path / "tuned")), tmp_path / "prompts.ckpt")
    with pytest.raises(ValueError, match="prompt_tokens 3, this run has 4"):
        cases.test(TeCoA(pretrained=str(tmp_path / "tuned"), **BOTH | {"prompt_tokens": 4}), tmp_path / "prompts.ckpt")


def test_a_fit_at_the_papers_rate_lowers_the_loss_in_the_shapes_world_and_is_tested(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = TeCoA(warmup_steps=0, **PADDING)
    start = copy.deepcopy(method.prompt)
    cases.fit(method, steps=40).save_checkpoint(tmp_path / "a.ckpt")
    data = CLIPDataModule(train="shapes:source", batch_size=64, image_size=32)
    data.prepare_data()
    data.setup("fit")
    fixed = next(iter(data.train_dataloader()))
    after = method.training_loss(fixed)["adversarial_ce"]
    method.prompt = start
    assert after < method.training_loss(fixed)["adversarial_ce"]
    assert cases.test(TeCoA(**PADDING), tmp_path / "a.ckpt")["test/colours/n"] == 4


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        ("tiny", {"prompt": "padding"}, r"prompt_size must be in \[1, 15\] for padding on images of 32 pixels, got 30"),
        ("tiny", {"prompt": "random_patch", "prompt_size": 33}, r"\[1, 32\]"),
        ("tiny", {"prompt": "frame"}, "must be one of padding, fixed_patch, random_patch or null, got 'frame'"),
        ("tiny", {"prompt_tokens": -1}, "prompt_tokens must be .*at least 0, got -1"),
        ("tiny", {"last_blocks": 1, **PADDING}, "last_blocks must be null where prompts_only is true"),
        ("shapes", {"prompt_tokens": 3}, "prompt_tokens needs an open_clip VisionTransformer .* ModifiedResNet"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model: str, kwargs: dict[str, Any], words: str, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=words):
        TeCoA(pretrained=str(tiny_model) if model == "tiny" else model, **kwargs)
