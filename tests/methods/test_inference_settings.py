"""A checkpoint is loaded by the function that it was trained as, or refused with both values."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from robustclip import methods
from robustclip.cli.main import run
from robustclip.convert.open_clip_folder import write
from robustclip.methods import PMGAFT, UEO, CLIPAdapter, CoOp, CRoFT, RobustMethod, TeCoA, TipAdapter, ZeroShot
from robustclip.methods._shared.saved_state import identity, read_checkpoint
from robustclip.models.clip import CLIPModel

# Constructor arguments that define the function of given weights; every other argument must be of training alone.
PROMPT = {"prompt", "prompt_size", "prompt_tokens"}
EXPECTED = {
    **dict.fromkeys(("TeCoA", "AGFT", "CAW", "UCAT"), PROMPT),
    "PMGAFT": PROMPT | {"logit_scale", "normalisation"},
    "CRoFT": {"ratio", "ratio_text"},
    "CLIPAdapter": {"ratio", "narrowing"},
    "TipAdapter": {"alpha", "beta"},
    **{key: {"tokens", "phrase"} for key in ("CoOp", "APT")},
    "FAP": {"tokens", "phrase", "between", "depth"},
    **{name: {"phrase"} for name in ("UEO", "UPL", "POUF", "DANCE")},
}


def saved(method: RobustMethod) -> dict[str, Any]:
    """The identity of a method in its checkpoint, without a fit."""
    method.freeze_untrained()
    learns = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    state = {name: tensor for name, tensor in method.state_dict().items() if name in learns}
    settings = json.loads(json.dumps(method.inference_settings))  # plain values, which survive any file
    return {"state_dict": state, "base_model": identity(method.clip), "inference_settings": settings}


@pytest.mark.parametrize("name", [name for name in methods.__all__ if name != "RobustMethod"])
def test_every_argument_is_of_inference_or_of_training(name: str, tiny_model: Path) -> None:
    options = {"tokens": 4} if name in ("CoOp", "APT") else {"depth": 1} if name == "FAP" else {}
    method = getattr(methods, name)(pretrained=str(tiny_model), **options)
    ours = method.inference_settings.keys() - method.clip.settings.keys() - {"method", "lora"}
    assert ours == EXPECTED.get(name, set())
    method.on_load_checkpoint(saved(method))


class Sharpened(TeCoA):
    """Somebody's own method, which declares nothing."""

    def __init__(self, power: float = 1.0, crops: tuple[int, ...] = (1, 2), helper: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.power = power


class Quietened(TeCoA):
    """Somebody's own method, whose argument is of training alone."""

    training_arguments = ("noise",)

    def __init__(self, noise: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)


Case = tuple[type[RobustMethod], dict[str, Any], type[RobustMethod], dict[str, Any], tuple[str, ...]]
REFUSED: dict[str, Case] = {
    "ratio": (CRoFT, {"ratio": 0.9}, CRoFT, {}, ("ratio 0.9", "0.2", "--model.ratio 0.9")),
    "text ratio": (CRoFT, {"ratio_text": 0.1}, CRoFT, {}, ("ratio_text 0.1", "0.5")),
    "adapter": (CLIPAdapter, {"ratio": 0.6}, CLIPAdapter, {}, ("ratio 0.6", "0.2")),
    "scale": (PMGAFT, {"logit_scale": 1.0}, PMGAFT, {}, ("logit_scale 1.0", "None", "--model.logit_scale 1.0")),
    "own scale": (PMGAFT, {}, PMGAFT, {"logit_scale": 1.0}, ("logit_scale None", "1.0", "--model.logit_scale null")),
    "statistics": (PMGAFT, {"normalisation": "imagenet"}, PMGAFT, {}, ("normalisation 'imagenet'", "'model'")),
    "cache": (TipAdapter, {"alpha": 1.17}, TipAdapter, {}, ("alpha 1.17", "1.0")),
    "keys": (TipAdapter, {"beta": 1.0}, TipAdapter, {}, ("beta 1.0", "10.0")),
    "phrase": (CoOp, {"phrase": "a photo of a"}, CoOp, {"phrase": "a sketch of a"}, ("'a photo of a'", "'a sketch")),
    "unlabelled": (UEO, {"phrase": "a sketch of a"}, UEO, {}, ("phrase 'a sketch of a'", "'a photo of a'")),
    "place": (
        TeCoA,
        {"prompt": "random_patch", "prompt_size": 4},
        TeCoA,
        {"prompt": "fixed_patch", "prompt_size": 4},
        ("prompt 'random_patch'", "'fixed_patch'"),
    ),
    "image size": (TeCoA, {"image_size": 64}, TeCoA, {}, ("image_size 64", "32", "--model.image_size 64")),
    "method": (PMGAFT, {}, TeCoA, {}, ("method 'PMGAFT'", "'TeCoA'", "--model PMGAFT")),
    "own method": (Sharpened, {"power": 3.0}, Sharpened, {}, ("power 3.0", "1.0", "--model.power 3.0")),
    "own tuple": (Sharpened, {"crops": (1, 2, 3)}, Sharpened, {}, ("crops [1, 2, 3]", "[1, 2]")),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_other_inference_settings_are_refused_with_both_values(case: Case, tiny_model: Path) -> None:
    cls, trained, other, given, words = case
    checkpoint = saved(cls(pretrained=str(tiny_model), **trained))
    cls(pretrained=str(tiny_model), **trained).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="the checkpoint was trained with") as caught:
        other(pretrained=str(tiny_model), **given).on_load_checkpoint(checkpoint)
    for word in words:
        assert word in str(caught.value)


def test_settings_of_training_may_differ(tiny_model: Path) -> None:
    checkpoint = saved(Quietened(noise=2.0, pretrained=str(tiny_model), warmup_steps=5, schedule="constant"))
    Quietened(pretrained=str(tiny_model), has_activation_checkpointing=True).on_load_checkpoint(checkpoint)


def test_an_image_size_that_is_the_models_own_is_the_same_setting(tiny_model: Path) -> None:
    TeCoA(pretrained=str(tiny_model), image_size=32).on_load_checkpoint(saved(TeCoA(pretrained=str(tiny_model))))


def test_a_value_that_was_assigned_later_counts(tiny_model: Path) -> None:
    method = CRoFT(pretrained=str(tiny_model))
    method.ratio = 0.7
    with pytest.raises(ValueError, match=r"ratio 0\.7"):
        CRoFT(pretrained=str(tiny_model)).on_load_checkpoint(saved(method))


def test_objects_among_the_arguments_are_no_hindrance(tiny_model: Path) -> None:
    method = Sharpened(pretrained=str(tiny_model), helper=object())
    assert "helper" not in method.inference_settings
    method.on_load_checkpoint(saved(method))


def test_the_same_weights_in_another_architecture_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Neither the number of attention heads nor the activation nor the pixels' statistics show in any tensor."""
    checkpoint = saved(TeCoA(pretrained=str(tiny_model)))
    changes: list[tuple[tuple[str, ...], Any]] = [
        (("model_cfg", "vision_cfg", "head_width"), 8),
        (("model_cfg", "quick_gelu"), True),
        (("preprocess_cfg", "mean"), [0.4, 0.5, 0.5]),
    ]
    for number, ((*sections, key), value) in enumerate(changes):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_model, folder)
        config = json.loads((folder / "open_clip_config.json").read_text())
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        method = TeCoA(pretrained=str(folder))
        assert method.clip.fingerprint == checkpoint["base_model"]["weights"]
        with pytest.raises(ValueError, match=f"{key} .* this run has"):
            method.on_load_checkpoint(checkpoint)


def test_another_tokenizer_is_refused(tiny_model: Path) -> None:
    checkpoint = saved(TeCoA(pretrained=str(tiny_model)))
    method = TeCoA(pretrained=str(tiny_model))
    tokenizer = method.clip.tokenizer
    method.clip.tokenizer = lambda prompts: tokenizer([prompt.lower().replace("cat", "dog") for prompt in prompts])
    with pytest.raises(ValueError, match="tokens "):
        method.on_load_checkpoint(checkpoint)


def test_an_old_checkpoint_warns_about_settings_that_it_lacks(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = saved(CRoFT(pretrained=str(tiny_model)))
    del checkpoint["inference_settings"]
    CRoFT(pretrained=str(tiny_model), ratio=0.9).on_load_checkpoint(checkpoint)
    assert "could not be compared" in caplog.text
    assert "ratio" in caplog.text


def test_statistics_of_the_method_are_exported(tiny_model: Path, tmp_path: Path) -> None:
    method = PMGAFT(pretrained=str(tiny_model), normalisation="imagenet")
    tmp_path.joinpath("out").mkdir()
    write(method.clip, tmp_path / "out")
    again = CLIPModel(pretrained=str(tmp_path / "out"))
    torch.testing.assert_close(again.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]), rtol=0, atol=1e-6)
    torch.testing.assert_close(again.std.flatten(), torch.tensor([0.229, 0.224, 0.225]), rtol=0, atol=1e-6)


def test_settings_of_a_fit_hold_for_its_test(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    model = ["--model", "CRoFT", "--model.pretrained", str(tiny_model), "--data.batch_size", "8"]
    fit = ["fit", *model, "--model.ratio", "0.9", *quiet, "--data.train", "shapes:source", "--data.shots", "1"]
    assert run([*fit, "--trainer.max_epochs", "1", "--data.holdout", "0"]) == 0
    checkpoint = str(next(tmp_path.rglob("last.ckpt")))
    assert read_checkpoint(Path(checkpoint))["inference_settings"]["ratio"] == 0.9
    test = ["test", *model, *quiet, "--data.test", "[shapes:colours]", "--ckpt_path", checkpoint]
    test += ["--trainer.limit_test_batches", "1"]
    capfd.readouterr()
    assert run(test) == 2
    assert "ratio 0.9, this run has 0.2; give --model.ratio 0.9" in capfd.readouterr().err
    assert run([*test, "--model.ratio", "0.9"]) == 0


def test_a_zero_shot_run_has_the_settings_of_its_model(tiny_model: Path) -> None:
    method = ZeroShot(pretrained=str(tiny_model))
    assert method.inference_settings == {"method": "ZeroShot", "lora": None, **method.clip.settings}
    assert method.inference_settings["base.mean"] == [0.5, 0.5, 0.5]
