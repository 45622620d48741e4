"""The tutorials run as printed, in a new folder and offline; the reference has every public name."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robustclip.cli.main import COMMANDS, run

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/tutorials/first_steps.ipynb"
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


@pytest.mark.slow
def test_the_notebook_defends_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    values: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), values)
    before, after = (values[name].result["mean"]["pgd10"]["acc1"] for name in ("before", "after"))
    assert after > before + 0.3
    batch, place = values["batch"], values["place"]
    assert values["answer"](values["original"], values["attacked"])[place] != batch.labels[place]
    assert (values["attacked"] - batch.images).abs().max() <= 5 / 255 + 1e-6
    assert (tmp_path / "adversarial_image.png").stat().st_size > 10_000


def test_the_notebook_is_small_and_has_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert NOTEBOOK.stat().st_size < 60_000
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_the_notebook_is_a_page_of_the_site() -> None:
    pytest.importorskip("rich")
    from pages import pages

    page = pages()["tutorials/first_steps.md"]
    code = "\n".join(code for language, _, code in BLOCK.findall(page) if language == "python")
    assert "trainer.fit(tecoa, data)" in code
    compile(code, "notebook", "exec")


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
