"""The tutorials run as printed, in a new folder and offline; the reference has every public name."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from robustclip.cli.main import COMMANDS, run

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BUILDER = ROOT / ".venv-docs/bin/mkdocs"
sys.path.insert(0, str(ROOT / "docs"))


def lines(code: str) -> list[list[str]]:
    """Splits a shell block into the words of its commands."""
    return [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_as_printed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for language, title, code in BLOCK.findall(page.read_text()):
        if title:
            Path(title).write_text(code)
        elif language == "python":
            Path("block.py").write_text(code)
            runpy.run_path("block.py")
        for words in lines(code) if language == "bash" else ():
            if words[0] == "robustclip":
                assert run(words[1:]) == 0, f"{shlex.join(words)}: {capfd.readouterr().err[-800:]}"
            else:
                assert words[0] == "python"
                subprocess.run([sys.executable, *words[1:]], check=True)


def test_tutorials_use_only_commands_that_exist() -> None:
    for page in TUTORIALS:
        shell = [
            words
            for language, _, code in BLOCK.findall(page.read_text())
            if language == "bash"
            for words in lines(code)
        ]
        assert shell, page
        for words in shell:
            assert words[0] in ("robustclip", "python")
            assert words[0] == "python" or words[1] in COMMANDS


@pytest.mark.parametrize("room", ["attacks", "defences", "data", "evaluation", "methods"])
def test_the_reference_has_every_public_name(room: str) -> None:
    pytest.importorskip("rich")
    from pages import pages

    made = pages()
    text = "\n".join(made.values())
    module = __import__(f"robustclip.{room}", fromlist=["__all__"])
    missing = [name for name in module.__all__ if f"::: robustclip.{room}.{name}\n" not in text]
    assert missing == []


def test_every_method_has_a_page_with_its_configuration_and_its_claims() -> None:
    from pages import pages

    made = pages()
    assert "lr: 1.0e-05" in made["methods/TeCoA.md"] or "optimizer" in made["methods/TeCoA.md"]
    assert "| AutoAttack | 1/255 | 16 sets | 17.88 |" in made["methods/PMGAFT.md"]
    assert "Recipe of the paper" in made["methods/ARF.md"]


@pytest.mark.slow
@pytest.mark.skipif(not BUILDER.is_file(), reason="`make docs` has not installed the tools of the documentation")
def test_the_documentation_builds_without_warnings() -> None:
    subprocess.run(["make", "docs"], cwd=ROOT, check=True)
    assert (ROOT / "build/site/methods/TeCoA/index.html").is_file()
