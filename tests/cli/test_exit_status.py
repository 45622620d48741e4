"""Exit statuses: zero is success and nothing else."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robustclip.cli.main import run

CONFIGS = Path(__file__).parents[2] / "robustclip" / "configs"
QUICK = (
    "--config", str(CONFIGS / "demo.yaml"), "--trainer.accelerator", "cpu", "--trainer.logger", "false",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--data.batch_size", "4",
    "--trainer.max_steps", "1", "--data.holdout", "0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["robustclip"])
    return tmp_path


def write_method(folder: Path, name: str, step: str, at_import: str = "") -> str:
    """A method of the user whose training step does something else; returns its class path."""
    text = f"import os, signal, sys\n{at_import}\nfrom robustclip.methods import TeCoA\n\nclass Mine(TeCoA):\n"
    text += f"    def training_loss(self, batch):\n        {step}\n        return super().training_loss(batch)\n"
    (folder / f"{name}.py").write_text(text)
    return f"{name}.Mine"


@pytest.mark.parametrize(
    ("step", "status"),
    [
        ("sys.exit()", 1),
        ("sys.exit(0)", 1),
        ("sys.exit(3)", 3),
        ("sys.exit('out of quota')", 1),
        ("raise SystemExit(143)", 143),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_an_exit_of_other_code_is_no_success(
    step: str, status: int, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    method = write_method(folder, f"exits_{status}_{abs(hash(step))}", step)
    assert run(["fit", *QUICK, "--model", method]) == status
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert status in (3, 143) or "error: " in errors
    assert "quota" not in step or "out of quota" in errors


def test_an_exit_of_a_module_while_it_is_imported_is_no_success(folder: Path) -> None:
    method = write_method(folder, "exits_at_import", "pass", at_import="sys.exit(0)")
    assert run(["fit", *QUICK, "--model", method]) == 1


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["fit", "--print_config"], ["fit", "--help"], ["fit", "--model.help", "TeCoA"]]
)
def test_answers_of_the_parser_are_a_success(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 0
    assert len(capfd.readouterr().out) > 10


def test_an_error_of_the_program_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: list[str]) -> int:
        raise AssertionError("a defect")

    monkeypatch.setattr("robustclip.cli.main._answer", fail)
    with pytest.raises(AssertionError, match="a defect"):
        run(["table", "x"])


@pytest.mark.parametrize("words", ["--help", "table {run} {run}"])
def test_a_reader_that_goes_away_ends_the_program_quietly(words: str, folder: Path) -> None:
    scores = (
        '{"method": "M", "tasks": {"x": {"clean": {"acc1": 0.5}}}, "mean": {"clean": {"acc1": 0.5}}, "protocol": {}}'
    )
    (folder / "result.json").write_text(scores)
    command = [sys.executable, "-m", "robustclip", *words.replace("{run}", str(folder)).split()]
    read, write = os.pipe()
    os.close(read)  # the reader is gone before anything is written
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "words",
    [
        "fit --config no.yaml",
        "fit -c no.yaml",
        "test --ckpt_path no.ckpt",
        "test --results.baseline no",
        "doctor --config no.yaml",
        "verify no",
        "replay no",
        "export no.ckpt --out x --config no.yaml",
        "cache --config no.yaml",
    ],
)
def test_a_missing_file_is_reported_before_anything_is_loaded(words: str) -> None:
    code = "import sys; from robustclip.cli.main import run; s = run(sys.argv[1:]); print(s, 'torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"]
    assert done.stderr.startswith("error: ")
    assert "no" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert time.perf_counter() - start < 5  # one tenth of a second and a busy machine; libraries take 10
