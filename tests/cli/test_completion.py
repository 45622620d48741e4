"""The script for the tab key completes commands, options, and the names that options take."""

import shutil
import subprocess
from pathlib import Path

import pytest

from robustclip.cli.main import COMMANDS, run

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of `robustclip completion bash`, beside one file."""
    folder = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as patch, (folder / "script.sh").open("w") as file:
        patch.setattr("sys.stdout", file)
        assert run(["completion", "bash"]) == 0
    (folder / "mine.yaml").touch()
    return folder / "script.sh"


def completed(script: Path, line: str) -> list[str]:
    """Returns the candidates for the last word of a command line, as the shell asks for them."""
    words = line.split(" ")
    variables = f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}"
    code = f'source {script}; {variables}; _robustclip; printf "%s\\n" "${{COMPREPLY[@]}}"'
    answer = subprocess.run(["bash", "-uc", code], cwd=script.parent, capture_output=True, text=True, check=True)
    assert answer.stderr == ""
    return answer.stdout.split()


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("robustclip interp", ["interpolate"]),
        ("robustclip fit --model.opt", ["--model.optimizer", "--model.optimizer.lr"]),
        ("robustclip fit --trainer.max_e", ["--trainer.max_epochs"]),
        ("robustclip test --shard", ["--shard", "--shards"]),
        ("robustclip fit --config pmg", ["pmg_aft", "pmg_aft_code"]),
        ("robustclip fit --config m", ["mine.yaml"]),
        ("robustclip test --data fif", ["fifteen"]),
        ("robustclip fit --model Te", ["TeCoA"]),
        ("robustclip test --model.defence JP", ["JPEG"]),
        ("robustclip export RUN --t", ["--to"]),
        ("robustclip doctor --results.is_u", ["--results.is_undefended"]),
        ("robustclip list att", ["attacks"]),
        ("robustclip datasets oxford", ["oxford_pets"]),
        ("robustclip report mi", ["mine.yaml"]),
        ("robustclip table --data.r", []),
    ],
)
def test_a_word_is_completed(script: Path, line: str, candidates: list[str]) -> None:
    offered = completed(script, line)
    assert set(candidates) <= set(offered)
    assert all(word.startswith(line.rpartition(" ")[2]) for word in offered)
    assert offered or not candidates


def test_every_command_is_completed_and_has_its_help(script: Path) -> None:
    assert set(COMMANDS) <= set(completed(script, "robustclip "))
    assert all("--help" in completed(script, f"robustclip {command} --h") for command in ("fit", "verify", "soup"))


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "fish"]) == 2
    assert "shell" in capsys.readouterr().err
