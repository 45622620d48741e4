"""Code, commands, links and paths of the README and of the other pages work."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from PIL import Image

from robustclip import __version__
from robustclip.cli.lightning import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CITATION = (ROOT / "CITATION.cff").read_text()
CHANGES = (ROOT / "CHANGELOG.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").rglob("*.md")]


def test_citation_and_changelog_have_the_version_of_the_package() -> None:
    assert re.search(r"^version: (.+)$", CITATION, re.MULTILINE)[1] == __version__
    assert re.search(r"^## (\S+)", CHANGES, re.MULTILINE)[1] == __version__


def test_the_method_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(from typing.*?)```", README, re.DOTALL)
    command = re.search(r"^robustclip (fit .*consistency.*)$", README, re.MULTILINE)
    assert code
    assert command
    assert len(code[1].splitlines()) <= 30
    (tmp_path / "consistency.py").write_text(code[1])
    (tmp_path / "configs").symlink_to(ROOT / "robustclip" / "configs")
    monkeypatch.chdir(tmp_path)
    small = "--trainer.max_steps 2 --trainer.enable_progress_bar false --trainer.accelerator cpu --data.batch_size 4"
    finished = main([*shlex.split(command[1]), *shlex.split(small), "--evaluation.fit_max_samples", "4"])
    assert type(finished.model).__name__ == "Consistency"
    assert finished.model.beta == 3
    assert finished.model.attack.eps == pytest.approx(1 / 255)
    assert finished.model.attack.steps == 2, "settings that both classes have keep their values from the file"
    assert finished.trainer.callback_metrics["train/loss"] > 0


def test_the_evaluation_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(import robustclip\n.*?)```", README, re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    for colour in ("red", "blue"):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), colour).save(tmp_path / "photos" / colour / f"{number}.png")
    (tmp_path / "snippet.py").write_text(code[1].replace('"cascade"', '"pgd10"'))
    answers = {"my_model": lambda images: 9 * images.mean((2, 3))[:, [2, 0]]}  # blue before red, as folders are sorted
    runpy.run_path(str(tmp_path / "snippet.py"), init_globals=answers)
    assert "'clean': {'acc1': 1.0" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / path).is_file(), path
    for path in re.findall(r"(?:configs|benchmarks)/[a-z0-9_/]+\.(?:yaml|py|json)", text):
        assert (ROOT / path).is_file() or (ROOT / "robustclip" / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_anchors_of_a_page_exist(page: Path) -> None:
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()):
        target = page.parent / path if path else page
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in headings]


def commands() -> list[str]:
    """Commands of all pages that configure a run; a word in capitals stands for a folder of the user."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    lines = re.findall(r"^robustclip +((?:fit|test) .*)$", text, re.MULTILINE)
    own = ("consistency", "brighter", "margin.yaml", "smooth", "signs", "median", "flipped", "colours.Colours")
    return [line for line in lines if not any(word in line for word in own) and line.count("'") % 2 == 0]


@pytest.mark.slow
def test_the_commands_of_all_pages_parse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands():
        with pytest.raises(SystemExit) as ended:
            main([*shlex.split(command, comments=True), "--print_config"])
        assert ended.value.code in (0, None), f"{command}: {capsys.readouterr().err}"
    assert len(commands()) >= 10


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
