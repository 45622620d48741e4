"""Weight soups and task arithmetic: the formulas, the choice, what is refused, and the command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import SMALL, fitted
from helpers import tiny_clip

from robustclip.attacks import PGD
from robustclip.cli.lightning import main
from robustclip.cli.main import run
from robustclip.methods import TRADES, RobustMethod, TeCoA
from robustclip.methods._shared.saved_state import with_digest
from robustclip.models.lora import LoRA, merged_state
from robustclip.tools.soup import greedy, soup


@pytest.fixture(scope="module")
def members(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints of one base model, trained under unlike attacks."""
    folder = tmp_path_factory.mktemp("members")
    paths = [folder / f"{number}.ckpt" for number in range(3)]
    for number, path in enumerate(paths):
        fitted(tiny_model, path, attack=PGD(eps=f"{4 * number}/255", alpha="2/255", steps=2))
    return paths


def builder(model: Path, cls: type[RobustMethod] = TeCoA, **settings: Any) -> Callable[..., RobustMethod]:
    def build(path: Path, *options: str) -> RobustMethod:
        own = {key: value for key, value in settings.items() if key != "lora" or "--model.lora=null" not in options}
        return cls(pretrained=str(model), **own)

    return build


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_a_soup_is_the_mean_of_the_weights(members: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    (file,) = soup(builder(tiny_model), members, tmp_path / "out")
    assert file.name == "mean.ckpt"
    states, found = [weights(path) for path in members], weights(file)
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        expected = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-7)
    method = TeCoA(pretrained=str(tiny_model))
    content = torch.load(file, weights_only=True)
    method.on_load_checkpoint(content)
    method.load_state_dict(content["state_dict"], strict=False)
    assert "optimizer_states" not in content


def test_task_arithmetic_adds_scaled_changes(members: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    files = soup(builder(tiny_model), members[:2], tmp_path / "out", scales=(0.0, 0.3, 1.0))
    assert [file.name for file in files] == ["scale-0.ckpt", "scale-0.3.ckpt", "scale-1.ckpt"]
    original = TeCoA(pretrained=str(tiny_model)).state_dict()
    a, b = (weights(path) for path in members[:2])
    for scale, file in zip((0.0, 0.3, 1.0), files, strict=True):
        for name, tensor in weights(file).items():
            start = original[name].double()
            expected = start + scale * (a[name].double() - start + b[name].double() - start)
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    origin = torch.load(files[1], weights_only=True)["interpolation"]
    assert origin["alpha"] == 0.3


@pytest.mark.slow
def test_soups_of_lora_mix_weights_and_not_factors(tiny_model: Path, tmp_path: Path) -> None:
    """Ranks may differ between the members; the soup is a plain checkpoint."""
    paths, states = [], []
    for number, rank in enumerate((2, 3)):
        paths.append(tmp_path / f"{number}.ckpt")
        torch.manual_seed(number)
        states.append(merged_state(fitted(tiny_model, paths[-1], lora=LoRA(rank=rank))))

    def build(path: Path, *options: str) -> RobustMethod:
        rank = 2 + paths.index(path)
        return TeCoA(pretrained=str(tiny_model), lora=None if options else LoRA(rank=rank))

    (file,) = soup(build, paths, tmp_path / "out")
    found = weights(file)
    assert all("parametrizations" not in name for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2, rtol=0, atol=1e-6)
    changed = [name for name in found if not torch.equal(states[0][name], states[1][name])]
    assert changed
    plain = TeCoA(pretrained=str(tiny_model))
    plain.on_load_checkpoint(torch.load(file, weights_only=True))


def test_greedy_keeps_members_that_do_not_lower_the_accuracy() -> None:
    table = {(0,): 0.5, (1,): 0.7, (2,): 0.6, (1, 2): 0.65, (1, 0): 0.7}
    assert greedy(3, lambda places: table[tuple(places)]) == [1, 0]


@pytest.mark.slow
def test_the_choice_follows_the_measured_accuracy(members: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    """The measure is the nearness to the second member, so that it alone is kept, and the scale is near."""
    target = weights(members[1])

    def nearness(path: Path) -> float:
        state = weights(path)
        return -sum(float((state[name] - target[name]).square().sum()) for name in target)

    (file,) = soup(builder(tiny_model), members, tmp_path / "greedy", measure=nearness)
    assert file.name == "greedy.ckpt"
    assert all(torch.equal(tensor, target[name]) for name, tensor in weights(file).items())
    (file,) = soup(builder(tiny_model), members[:2], tmp_path / "scales", scales=(0.1, 0.5, 2.0), measure=nearness)
    assert file.name == "scale-0.5.ckpt"


@pytest.mark.parametrize(
    ("count", "scales", "words"),
    [(1, (), "two checkpoints or more"), (3, (0.5, 0.5), "scales must be given once each")],
)
def test_wrong_arguments_are_refused(
    count: int, scales: tuple[float, ...], words: str, members: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        soup(builder(tiny_model), members[:count], tmp_path / "out", scales=scales)
    with pytest.raises(ValueError, match="two checkpoints or more"):
        soup(builder(tiny_model), [members[0]] * 2, tmp_path / "out")


def test_an_existing_folder_is_refused_before_anything_is_measured(
    members: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists and is never overwritten"):
        soup(builder(tiny_model), members, tmp_path / "out", measure=lambda checkpoint: pytest.fail("measured"))


@pytest.mark.slow
def test_other_bases_methods_and_parameters_are_refused(members: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    other, path = tiny_clip(tmp_path / "model", width=48), tmp_path / "other.ckpt"
    fitted(other, path)

    def build(checkpoint: Path, *options: str) -> RobustMethod:
        return TeCoA(pretrained=str(other if checkpoint == path else tiny_model))

    with pytest.raises(ValueError, match=r"differ in base_model\.\w+, .*mix checkpoints of one base model"):
        soup(build, [members[0], path], tmp_path / "out")
    content = torch.load(members[1], weights_only=True)
    content["inference_settings"]["method"] = "TRADES"
    torch.save(with_digest(content), tmp_path / "trades.ckpt")

    def build_methods(checkpoint: Path, *options: str) -> RobustMethod:
        return (TRADES if checkpoint.stem == "trades" else TeCoA)(pretrained=str(tiny_model))

    with pytest.raises(ValueError, match="differ in method, 'TeCoA' against 'TRADES'"):
        soup(build_methods, [members[0], tmp_path / "trades.ckpt"], tmp_path / "out")
    del content["state_dict"]["clip.net.visual.conv1.weight"]
    content["inference_settings"]["method"] = "TeCoA"
    torch.save(with_digest(content), tmp_path / "part.ckpt")

    class Part(TeCoA):
        def parameter_groups(self) -> list[dict[str, Any]]:
            return [{"params": [self.clip.net.visual.proj]}]

    Part.__name__ = "TeCoA"
    with pytest.raises(ValueError, match="have trained unlike parameters, such as"):
        soup(
            lambda checkpoint, *options: (Part if checkpoint.stem == "part" else TeCoA)(pretrained=str(tiny_model)),
            [members[0], tmp_path / "part.ckpt"],
            tmp_path / "out",
        )


@pytest.mark.slow
def test_the_command_chooses_on_held_out_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, paths = ["--trainer.default_root_dir", str(tmp_path)], []
    for number, options in enumerate(([], ["--model.lora.rank", "2"])):
        folder = tmp_path / str(number)
        rate = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.001"]
        main(["fit", *SMALL, *place, *options, *rate, "--trainer.max_steps", "2", "--checkpoint.dirpath", str(folder)])
        paths.append(str(folder / "last.ckpt"))
    capsys.readouterr()
    quick = ["--evaluation.max_samples", "4"]
    monitor = ["--monitor", "val/mean/clean/acc1"]
    assert run(["soup", *paths, "--held_out", "true", "--out", str(tmp_path / "greedy"), *quick]) == 2
    assert "give one of val/source/clean/acc1" in capsys.readouterr().err
    choice = ["--held_out", "true", *monitor]
    assert run(["soup", *paths, *choice, "--out", str(tmp_path / "greedy"), *quick]) == 0
    out, err = capsys.readouterr()
    assert out.strip().endswith(str(tmp_path / "greedy" / "greedy.ckpt"))
    assert err.count("% on held-out images") == 3
    assert run(["soup", *paths, "--scales", "0.5,2", "--out", str(tmp_path / "scales"), *quick]) == 0
    results = ["--results.folder", str(tmp_path), "--results.name", "soup"]
    main(["test", *SMALL, *place, *results, "--ckpt_path", str(tmp_path / "scales" / "scale-0.5.ckpt")])
    assert (tmp_path / "soup" / "result.json").is_file()


def test_bad_input_of_the_command_is_one_line(
    members: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, text in (
        (["none.ckpt", str(members[0]), "--out", "x"], "'none.ckpt' is no file"),
        ([*map(str, members), "--out", "x"], "holds no settings"),
        ([*map(str, members), "--out", "x", "--scales", "a,b"], "scales must be numbers"),
    ):
        assert run(["soup", *words]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
