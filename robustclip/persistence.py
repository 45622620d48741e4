"""Writes files and folders whole or not at all; no other module writes files."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

Content = bytes | str | Callable[[IO[bytes]], object]
"""Bytes, text to encode as UTF-8, or a function that writes into an open file."""


def atomic_write(path: Path, content: Content) -> None:
    """Writes a file under a temporary name, waits for the disk, and renames it.

    Args:
        path: path of the file; its folder must exist.
        content: content of the file.

    Raises:
        OSError: the file cannot be written; an older file of that name is unchanged.
    """
    aside = _aside(path)
    try:
        with _naming(path), aside.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            _sync(file)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to ``path`` at the end, or removed after an error.

    Raises:
        ValueError: ``path`` exists; nothing is overwritten.
    """
    if path.exists():
        raise ValueError(f"out {str(path)!r} exists and is never overwritten; choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, f".{path.name}.*")
    aside = _aside(path)
    aside.mkdir()
    try:
        yield aside
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class AppendLog:
    """Appends whole entries to a file; each entry is on the disk before the next begins.

    Args:
        path: path of the file; an incomplete last entry of an existing file is removed.
        header: first line, with its end; a file with another header stays as it is, and its reader refuses it.
        end: last bytes of every entry.
    """

    def __init__(self, path: Path, header: bytes, end: bytes = b"\n") -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        begin = content.find(b"\n") + 1
        if not begin:
            atomic_write(path, header)
        elif content[:begin] == header:
            os.truncate(path, max(begin, content.rfind(end) + len(end)))

    def append(self, entry: bytes) -> None:
        """Adds an entry in one write and waits for the disk.

        Raises:
            OSError: the file cannot be written, for example on a full disk; with its path.
        """
        with _naming(self.path), self.path.open("ab") as file:
            file.write(entry)
            _sync(file)


def lock(path: Path, refusal: str) -> IO[str]:
    """Locks out other processes until the file is closed or this process ends in any way.

    Loader workers outlive the process for seconds; they do not inherit this kind of lock. No other code may open the
    file, since closing any handle of it frees the lock.

    Args:
        path: file of the lock.
        refusal: message for the second process.

    Raises:
        ValueError: another process holds the lock.
    """
    file = path.open("w", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(refusal) from None
    return file


def sweep(folder: Path, pattern: str = ".*.*") -> None:
    """Removes unfinished files and folders of killed processes.

    Args:
        folder: folder of the unfinished files.
        pattern: pattern of their names, for a folder with files of other code.
    """
    for aside in folder.glob(pattern):
        writer = aside.suffix[1:]
        if not writer.isdigit() or _is_running(int(writer)):
            continue
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only checks that the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        return True
    return True


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to the error of a failed write, since the system only gives the reason."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError that hides the system's reason
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"{path} cannot be written: {cause.strerror or cause}") from error
