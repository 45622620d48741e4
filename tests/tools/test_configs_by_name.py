"""Configurations of the package: found by name from any folder, listed, copied, and part of the wheel."""

import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import build_wheel

from robustclip.cli.main import run
from robustclip.cli.settings import located
from robustclip.tools.configs import FOLDER, packaged


@pytest.mark.parametrize(
    ("option", "value", "path"),
    [
        ("config", "arf", "arf.yaml"),
        ("config", "arf.yaml", "arf.yaml"),
        ("config", "configs/arf.yaml", "arf.yaml"),
        ("data", "fifteen", "data/fifteen.yaml"),
        ("evaluation", "configs/evaluation/cascade.yaml", "evaluation/cascade.yaml"),
        ("trainer", "gpu", "trainer/gpu.yaml"),
        ("data", "CLIPDataModule", None),
        ("model", "arf", None),
        ("config", "../configs/arf.yaml", None),
        ("config", "no_such", None),
    ],
)
def test_an_option_names_a_configuration_of_the_package(
    option: str, value: str, path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert packaged(option, value) == (None if path is None else FOLDER / path)


def test_a_file_of_the_user_has_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "arf.yaml").write_text("seed_everything: 1\n")
    monkeypatch.chdir(tmp_path)
    assert packaged("config", "arf.yaml") is None
    assert packaged("config", "arf") == FOLDER / "arf.yaml"


def test_both_forms_of_an_option_are_replaced_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "arf", "--data=fifteen", "-c", "demo.yaml", "--model", "TeCoA"]
    paths = [FOLDER / "arf.yaml", FOLDER / "data/fifteen.yaml", FOLDER / "demo.yaml"]
    expected = ["--config", f"{paths[0]}", f"--data={paths[1]}", "-c", f"{paths[2]}", "--model", "TeCoA"]
    assert located(arguments) == expected
    assert capsys.readouterr().err.splitlines() == [
        f"config: arf of the package, {paths[0]}",
        f"data: fifteen of the package, {paths[1]}",
        f"config: demo.yaml of the package, {paths[2]}",
    ]


def test_the_list_has_a_sentence_for_every_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["configs"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {name for name, _ in lines} == {
        str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml")
    }
    assert all(len(sentence) > 20 for _, sentence in lines)


@pytest.mark.parametrize("kind", ["configs", "datasets"])
def test_list_knows_configurations_and_data_sets(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", kind]) == 0
    listed = capsys.readouterr().out
    assert run([kind]) == 0
    assert listed == capsys.readouterr().out != ""


def test_a_copy_is_complete_and_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "mine"
    assert run(["configs", "--copy", str(copy)]) == 0
    originals = {path.relative_to(FOLDER): path.read_bytes() for path in FOLDER.rglob("*.yaml")}
    assert {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*.yaml")} == originals
    assert run(["configs", "--copy", str(copy)]) == 2
    assert "copy" in capsys.readouterr().err


def test_fifteen_are_the_zero_shot_sets_of_the_training_configuration() -> None:
    fifteen, imagenet = (
        yaml.safe_load((FOLDER / "data" / f"{name}.yaml").read_text())["init_args"]["test"]
        for name in ("fifteen", "imagenet")
    )
    assert len(fifteen) == 15
    assert ["imagenet", *fifteen] == imagenet


@pytest.mark.slow
def test_the_wheel_holds_the_configurations(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"robustclip/configs/{path.relative_to(FOLDER)}" for path in FOLDER.rglob("*.yaml")} <= names
    assert wheel.stat().st_size < 4e6
