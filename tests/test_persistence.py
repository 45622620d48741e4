"""Files are written whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustclip.persistence import AppendLog, atomic_folder, atomic_write, lock, sweep


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    atomic_write(tmp_path / "a", "old")
    monkeypatch.setattr(*((os, "fsync", fail) if broken == "fsync" else (Path, "replace", fail)))
    with pytest.raises(OSError, match="no space left"):
        atomic_write(tmp_path / "a", "new and longer")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_an_entry_that_was_cut_off_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    AppendLog(path, b"header\n").append(b"one\n")
    with path.open("ab") as file:
        file.write(b"tw")
    AppendLog(path, b"header\n").append(b"three\n")
    assert path.read_bytes() == b"header\none\nthree\n"


def test_a_log_with_another_header_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"other\nhalf")
    AppendLog(tmp_path / "log", b"header\n")
    assert (tmp_path / "log").read_bytes() == b"other\nhalf"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out") as aside:
        (aside / "no folder" / "a").touch()
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "out") as aside:
        (aside / "a").touch()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    with pytest.raises(ValueError, match="never overwritten"), atomic_folder(tmp_path / "out"):
        pass


def test_leftovers_of_dead_processes_alone_are_removed(tmp_path: Path) -> None:
    dead, alive, mine = (tmp_path / f".a.{end}" for end in ("999999999", os.getppid(), "notes"))
    for path in (dead, alive, mine):
        path.touch()
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {alive, mine}


def test_a_second_process_is_locked_out(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from robustclip.persistence import lock; lock(Path(sys.argv[1]), 'no')"
    )
    with lock(tmp_path / "lock", "no"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], capture_output=True, text=True)
    assert "ValueError: no" in done.stderr
    assert not subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")]).returncode
