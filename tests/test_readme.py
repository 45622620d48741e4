"""What the README shows, works."""

import re
import shlex
from pathlib import Path

import pytest

from robustclip.cli.lightning import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_method_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    command = re.search(r"^robustclip (fit .*consistency.*)$", README, re.MULTILINE)
    assert code
    assert command
    assert len(code[1].splitlines()) <= 30
    (tmp_path / "consistency.py").write_text(code[1])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    small = "--trainer.max_steps 2 --trainer.enable_progress_bar false --trainer.accelerator cpu --data.batch_size 4"
    finished = main([*shlex.split(command[1]), *shlex.split(small), "--evaluation.fit_max_samples", "4"])
    assert type(finished.model).__name__ == "Consistency"
    assert finished.model.beta == 3
    assert finished.model.attack.eps == pytest.approx(1 / 255)
    assert finished.model.attack.steps == 2, "what both classes take stays as the file has it"
    assert finished.trainer.callback_metrics["train/loss"] > 0


def test_its_links_and_configs_exist() -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"configs/[a-z_/]+\.yaml", README):
        assert (ROOT / path).is_file(), path
