"""Checkpoints between two models, by the formula and by command."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import SMALL, fitted, trained_by_command

from robustclip.cli.lightning import main
from robustclip.cli.main import run
from robustclip.methods import TeCoA
from robustclip.methods._shared.saved_state import with_digest
from robustclip.tools.interpolate import interpolate


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TeCoA, Path]:
    """The original model, and the checkpoint of the fine-tuned one."""
    path = tmp_path_factory.mktemp("pair") / "last.ckpt"
    fitted(tiny_model, path)
    return TeCoA(pretrained=str(tiny_model)), path


def test_weights_lie_on_the_line_between_the_models(pair: tuple[TeCoA, Path], tmp_path: Path) -> None:
    method, path = pair
    original = {name: tensor.double() for name, tensor in method.state_dict().items()}
    tuned = torch.load(path, weights_only=True)["state_dict"]
    alphas = (0.0, 0.1, 0.5, 0.75, 1.0)
    for alpha, file in zip(alphas, interpolate(method, path, tmp_path / "out", alphas=alphas), strict=True):
        found = torch.load(file, weights_only=True)["state_dict"]
        assert found.keys() == tuned.keys()
        for name, tensor in found.items():
            expected = (1 - alpha) * original[name] + alpha * tuned[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-7)  # float32 near 1: 6e-8


def test_the_ends_are_the_two_models_exactly(pair: tuple[TeCoA, Path], tmp_path: Path) -> None:
    method, path = pair
    first, last = interpolate(method, path, tmp_path / "out", alphas=(0.0, 1.0))
    tuned = torch.load(path, weights_only=True)["state_dict"]
    ends = [torch.load(file, weights_only=True)["state_dict"] for file in (first, last)]
    assert any(not torch.equal(tuned[name], tensor) for name, tensor in ends[0].items())
    for name in tuned:
        assert torch.equal(ends[0][name], method.state_dict()[name])
        assert torch.equal(ends[1][name], tuned[name])


@pytest.mark.parametrize(
    ("alphas", "words"),
    [
        ((0.5, 1.5), r"in \[0, 1\], got 1.5"),
        ((-0.1,), r"in \[0, 1\], got -0.1"),
        ((float("nan"),), "got nan"),
        ((0.5, 0.5), "once each"),
        ((), "once each"),
    ],
)
def test_alphas_are_means(alphas: tuple[float, ...], words: str, pair: tuple[TeCoA, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        interpolate(*pair, tmp_path / "out", alphas=alphas)
    assert not list(tmp_path.iterdir())


def test_an_earlier_folder_is_kept(pair: tuple[TeCoA, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never overwritten"):
        interpolate(*pair, tmp_path, alphas=(0.5,))


def test_another_model_is_no_original(pair: tuple[TeCoA, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained with"):
        interpolate(TeCoA(pretrained="shapes"), pair[1], tmp_path / "out", alphas=(0.5,))


class WithHead(TeCoA):
    """Learns something that the original model does not have."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.probe = torch.nn.Linear(2, 2)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [*super().parameter_groups(), {"params": list(self.probe.parameters())}]


def test_parameters_that_the_original_lacks_are_not_interpolated(
    pair: tuple[TeCoA, Path], tiny_model: Path, tmp_path: Path
) -> None:
    method = WithHead(pretrained=str(tiny_model))
    content = torch.load(pair[1], weights_only=True)
    content["state_dict"] |= {f"probe.{name}": tensor for name, tensor in method.probe.state_dict().items()}
    content["inference_settings"]["method"] = "WithHead"
    torch.save(with_digest(content), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"WithHead.*'probe.*the original model does not have"):
        interpolate(method, tmp_path / "a.ckpt", tmp_path / "out", alphas=(0.5,))


@pytest.mark.slow
def test_the_command_leaves_checkpoints_that_test_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, tested = trained_by_command(tmp_path)
    capsys.readouterr()
    out = tmp_path / "alphas"
    assert run(["interpolate", str(checkpoint), "--alphas", "0,1", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out / "alpha-0.ckpt"), str(out / "alpha-1.ckpt")]
    place = ["--trainer.default_root_dir", str(tmp_path), "--results.folder", str(tmp_path)]
    zero_shot = ["--model", "ZeroShot", "--model.pretrained", "shapes"]
    for name, words in (
        ("original", zero_shot),
        ("zero", ["--ckpt_path", str(out / "alpha-0.ckpt")]),
        ("one", ["--ckpt_path", str(out / "alpha-1.ckpt")]),
    ):
        main(["test", *SMALL[: -2 if name == "original" else None], *place, "--results.name", name, *words])
    ledgers = {name: rows(tmp_path / name) for name in ("original", "zero", "one", tested.name)}
    assert ledgers["zero"] == ledgers["original"]
    assert ledgers["one"] == ledgers[tested.name]
    models = {name: json.loads((tmp_path / name / "result.json").read_text())["model"] for name in ledgers}
    assert models["original"]["interpolation"] is None
    for name, alpha in (("zero", 0.0), ("one", 1.0)):
        assert models[name]["interpolation"] == {"alpha": alpha, "fine_tuned": models[tested.name]["weights"]}


def rows(test: Path) -> list[dict[str, str]]:
    """What was measured of each sample, but for the time that it took."""
    with (test / "ledger" / "colours.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["none.ckpt", "--out", "x"], "'none.ckpt' is no file"),
        (["{checkpoint}", "--out", "x"], "holds no settings"),
        (["{checkpoint}"], "out is missing"),
        (["{checkpoint}", "--out", "x", "--model", "TeCoA", "--config", "none.yaml"], "none.yaml"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    words: list[str], told: str, pair: tuple[TeCoA, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(["interpolate", *(word.format(checkpoint=pair[1]) for word in words)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
