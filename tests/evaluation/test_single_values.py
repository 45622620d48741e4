"""Attacks by the names of recipes."""

from pathlib import Path

import pytest

from robustclip.attacks import PGD, Recipe
from robustclip.cli.main import run
from robustclip.evaluation import RobustEvaluation
from robustclip.results.run import Run


def test_the_name_of_a_recipe_stands_for_the_recipe() -> None:
    for given, names in (("pgd10", ["pgd10"]), (["pgd100", "cascade"], ["pgd100", "cascade"]), ({}, []), (None, [])):
        evaluation = RobustEvaluation(given)  # type: ignore[arg-type]  # the names are literals
        assert list(evaluation.attacks) == list(evaluation.fit_attacks) == names
        for name, attack in evaluation.attacks.items():
            assert isinstance(attack, Recipe)
            assert attack.settings == Recipe(name).settings  # type: ignore[arg-type]
    own = PGD("1/255")
    assert RobustEvaluation({"mine": own}, fit_attacks="pgd10").attacks == {"mine": own}
    assert RobustEvaluation("pgd10", fit_attacks={}).fit_attacks == {}
    with pytest.raises(ValueError, match="pgd11"):
        RobustEvaluation("pgd11")  # type: ignore[arg-type]


def test_one_value_is_taken_from_the_command_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["test", "--model", "ZeroShot", "--model.pretrained", str(tiny_model), "--trainer.accelerator", "cpu"]
    words += ["--trainer.enable_progress_bar", "false", "--evaluation.max_samples", "2", "--results.folder", "results"]
    source = "{source: shapes:colours, name: one, templates: 'a drawing of {}'}"
    for number, data in enumerate(("shapes:colours", "[shapes:colours]", source)):
        assert run([*words, "--data.test", data, "--evaluation.attacks", "pgd10", "--results.name", str(number)]) == 0
    results = [Run.open(tmp_path / "results" / name).result["tasks"] for name in "012"]
    assert results[0]["colours"]["pgd10"]["acc1"] == results[1]["colours"]["pgd10"]["acc1"]
    assert "pgd10" in results[2]["one"]
    capsys.readouterr()
    assert run([*words, "--data.test", "shapes:colours", "--evaluation.attacks", "pgd11"]) != 0
    message = capsys.readouterr().err
    assert "evaluation.attacks" in message
    assert "pgd11" in message
    assert "pgd100" in message
