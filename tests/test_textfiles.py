"""Every text file is UTF-8, whatever the locale; another encoding is refused with the name of the file."""

import ast
import re
from pathlib import Path

import pytest
from helpers import ShardWriter

from robustclip.cli.settings import read_config
from robustclip.data.opened_source import open_source
from robustclip.data.sources.wds import read_lines
from robustclip.textfiles import read_text

PACKAGE = Path(__file__).parents[1] / "robustclip"
TEXT_MODE = re.compile("[rwax+t]+")


def is_locale_dependent(call: ast.Call) -> bool:
    """Whether a call opens a file as text without an encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return not call.args or name == "write_text"
    if name not in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        return False
    words = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    if isinstance(call.func, ast.Attribute):  # path.open(), but not Image.open(file)
        is_path = len(call.args) < 2
        return is_path and (not words or any(map(TEXT_MODE.fullmatch, modes)))
    return not any("b" in mode for mode in modes)


def test_no_module_opens_a_text_file_in_the_encoding_of_the_locale() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and is_locale_dependent(call)
    ]
    assert not found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("path.open()", True),
        ("path.open('w')", True),
        ("path.open('rb')", False),
        ("path.open(newline='')", True),
        ("open(path)", True),
        ("open(path, 'ab')", False),
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("Image.open(file)", False),
        ("tarfile.open(path, 'w')", False),
    ],
)
def test_the_check_of_encodings_knows_text_from_bytes(code: str, expected: bool) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert is_locale_dependent(call) is expected


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b" \t\n", b"\xc2\xa0\r\n"])
def test_names_are_clean_however_an_editor_saved_them(tmp_path: Path, start: bytes, end: bytes) -> None:
    (tmp_path / "classnames.txt").write_bytes(start + end.join([b"caf\xc3\xa9", b"green", b""]))
    assert read_lines(str(tmp_path), "classnames.txt") == ["café", "green"]


@pytest.mark.parametrize(
    ("content", "byte", "position"),
    [
        (b"r\xe9d\ngreen\n", "0xE9", 1),
        ("red\n".encode("utf-16"), "0xFF", 0),
        (b"\xef\xbb\xbfr\xe9d\n", "0xE9", 4),
    ],
)
def test_another_encoding_is_refused_with_file_byte_and_position(
    tmp_path: Path, content: bytes, byte: str, position: int
) -> None:
    file = tmp_path / "classnames.txt"
    file.write_bytes(content)
    line = re.escape(f"{file} is not UTF-8 (byte {byte} at position {position}); save it as UTF-8")
    with pytest.raises(ValueError, match=f"^{line}$"):
        read_text(file)
    with pytest.raises(ValueError, match=line):
        read_lines(f"file://{tmp_path}", "classnames.txt")
    with pytest.raises(ValueError, match=line):
        read_config(file)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("red\0\ngreen\n", r"line 1 .*U\+0000"),
        ("red\ngre\ven\n", r"line 2 .*U\+000B"),
        ("red\ngre\x85en\n", r"line 2 .*U\+0085"),
        ("red\ngre\u2028en\n", r"line 2 .*U\+2028"),
        ("red\n\ufeffgreen\n", r"line 2 .*U\+FEFF"),
        ("red\tcrimson\n", r"line 1 .*U\+0009"),
        ("red\n\ngreen\n", "line 2 is empty"),
        ("\nred\n", "line 1 is empty"),
    ],
)
def test_a_line_that_would_shift_or_spoil_names_is_refused(tmp_path: Path, content: str, place: str) -> None:
    (tmp_path / "classnames.txt").write_bytes(content.encode())
    with pytest.raises(ValueError, match=f"classnames.txt {place}"):
        read_lines(str(tmp_path), "classnames.txt")


def test_a_byte_order_mark_stays_in_no_class_name_and_in_no_path(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "set", "test", [3])
    (base / "classnames.txt").write_bytes("\ufeffred\r\ngreen\r\nblue\r\n".encode())
    (base / "zeroshot_classification_templates.txt").write_bytes("\ufeffa photo of a {c}\r\n".encode())
    (base / "test" / "nshards.txt").write_bytes("\ufeff1\r\n".encode())
    task = open_source("wds:set", root=str(tmp_path), split="test").task
    assert task.class_names == ("red", "green", "blue")
    assert task.templates == ("a photo of a {}",)


def test_letters_outside_of_ascii_in_a_config_need_a_locale_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.yaml"
    config.write_bytes("\ufeffdata: {root: café}\n".encode())
    read_config(config)
    monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale=True: "ISO-8859-1")
    with pytest.raises(ValueError, match=r"run.yaml .*ISO-8859-1; set PYTHONUTF8=1"):
        read_config(config)
    config.write_bytes(b"data: {root: cafe}\n")
    read_config(config)
