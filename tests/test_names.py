"""Names from files and folders are shown as they are, wherever they are shown."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from report_cases import FEW, Reader, make_run

from robustclip import display
from robustclip.cli.main import run
from robustclip.names import csv_cell, markdown, plain

NAMES = ("[/nope]", "[red]", ":smile:", "=1+1", "a|b", "<script>", "`code`", "[x](y)", "@x", "-1", "*a*")


@pytest.mark.parametrize("name", NAMES)
def test_the_terminal_shows_a_name_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    display.console().print(name)
    assert capsys.readouterr().out == f"{name}\n"


# rich has no switch for emoji in a bar's description; bars show names of tasks, which have no colon.
@pytest.mark.parametrize("name", [name for name in NAMES if name != ":smile:"])
def test_a_progress_bar_shows_a_name_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(display.progress([1, 2], name)) == [1, 2]
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb", "a\\nb"),
        ("a\x00", "a\\x00"),
        ("\u202eb", "\\u202eb"),
        ("\udc80", "\\udc80"),
    ],
)
def test_control_characters_are_written_out(name: str, shown: str) -> None:
    assert plain(name) == shown
    assert shown in csv_cell(name)
    assert plain(name).encode()


def test_letters_of_every_language_stay() -> None:
    for name in ("café", "猫", "ñandú 95\N{NO-BREAK SPACE}%", "هوا\N{ZERO WIDTH NON-JOINER}پیما"):
        assert plain(name) == csv_cell(name) == markdown(name) == name


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1"])
def test_a_spreadsheet_takes_no_name_for_a_formula(name: str) -> None:
    assert csv_cell(name).startswith("'")


def test_markdown_takes_a_name_for_text_alone() -> None:
    assert markdown("a|b") == "a\\|b"
    assert markdown("`x`\n<script>") == "\\`x\\` &lt;script&gt;"
    assert markdown("[a](b) *c* \\|") == "\\[a\\](b) \\*c\\* \\\\\\|"


@pytest.mark.parametrize("name", [*NAMES, "a\x1b[31mb"])
def test_every_tool_shows_names_as_they_are(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / f"{number}{name}", method=name, attacks=FEW) for number in range(2)]
    shown = name.replace("\x1b", "\\x1b")
    words = [str(folder) for folder in folders]
    assert run(["table", *words]) == 0
    assert shown in capsys.readouterr().out
    assert run(["compare", *words]) in (0, 2)
    output = capsys.readouterr()
    assert f"({shown})" in output.out or shown in output.err
    assert "\x1b" not in output.out + output.err
    page = tmp_path / "page.html"
    assert run(["report", *words, "--out", str(page)]) == 0
    assert "script" not in Reader(page.read_text()).names
    rows = list(csv.reader(page.with_suffix(".csv").open(newline="")))
    assert {row[1].removeprefix("'") for row in rows[1:]} == {shown}
    assert not [row for row in rows for cell in row[:4] if cell.startswith(("=", "+", "-", "@"))]
    lines = page.with_suffix(".md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert not [line for line in table if "<" in line or line.replace("\\|", "").count("`") != line.count("\\`")]


@pytest.mark.parametrize("name", ["[/nope]", "=1+1", "a|b", "\x1b[2J"])
def test_a_line_of_error_shows_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["table", f"none/{name}"]) == 2
    assert plain(name) in capsys.readouterr().err


def test_a_run_folder_of_any_name_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "plain", attacks=FEW)
    result = json.loads((folder / "result.json").read_text())
    result["classes"] = {task: {"class_names": list(NAMES), "templates": ["[/nope] {}"]} for task in result["tasks"]}
    (folder / "result.json").write_text(json.dumps(result))
    shutil.move(folder, tmp_path / "[/nope]")
    assert run(["table", str(tmp_path / "[/nope]")]) == 0
    assert run(["report", str(tmp_path / "[/nope]"), "--out", str(tmp_path / "x.html")]) == 0
    assert "script" not in Reader((tmp_path / "x.html").read_text()).names
