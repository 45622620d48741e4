"""Files and folders are written whole or not at all, here and nowhere else."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

Content = bytes | str | Callable[[IO[bytes]], object]
"""Bytes, text for UTF-8, or a function that writes into an open file."""


def atomic_write(path: Path, content: Content) -> None:
    """Writes a file beside its place, waits for the disk, and renames it.

    Args:
        path: of the file; its folder must exist.
        content: of the file.

    Raises:
        OSError: with the path; an older file of that name is unchanged.
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
    """Yields a folder beside ``path``, which gets that name at the end and is removed after an error.

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
    """A file that grows by whole entries, each on the disk before the next begins.

    Args:
        path: of the file; it may exist, and its last entry may be cut off, which is removed.
        header: first line, with its end. A file with another header is left as it is, for its reader to refuse.
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
        """Adds an entry in one write that is on the disk at the return.

        Raises:
            OSError: with the path, for example on a full disk.
        """
        with _naming(self.path), self.path.open("ab") as file:
            file.write(entry)
            _sync(file)


def lock(path: Path, refusal: str) -> IO[str]:
    """Locks out other processes until the file is closed or this process ends in any way.

    Loader workers, who outlive it for seconds, do not inherit this kind of lock. No other code may open the file, since
    closing any handle of it frees the lock.

    Args:
        path: file of the lock.
        refusal: message for the second process.

    Raises:
        ValueError: with the refusal.
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
        folder: in which they lie.
        pattern: of their names, for a folder that holds files of others too.
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
        os.kill(process, 0)  # signal 0 is not delivered; it fails where there is no such process
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        return True
    return True


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to the error of a failed write, since the system gives the reason alone."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError that hides the system's reason
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"{path} cannot be written: {cause.strerror or cause}") from error
