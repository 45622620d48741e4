"""Several ranks on this machine: a script in the background of a test, and its fork into all of them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

TIMEOUT_SECONDS = 400  # a rank that waits for ever for another must fail the test


@contextlib.contextmanager
def in_background(script: Path, folder: Path, *words: str) -> Iterator[None]:
    """Runs ``python SCRIPT FOLDER WORDS`` meanwhile, and ends all of its processes; it must have succeeded."""
    log = folder / f"{script.stem}.log"
    with log.open("w") as file:
        job = subprocess.Popen(
            [sys.executable, str(script), str(folder), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield
        status = job.wait(TIMEOUT_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)  # all ranks
    assert status == 0, log.read_text()[-3000:]


def meeting_place(count: int = 2) -> dict[str, str]:
    """What Lightning's launcher would tell the ranks, but for ``LOCAL_RANK``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "NODE_RANK": "0"}


def on_all(action: Callable[[], None], count: int = 2) -> None:
    """Runs it on ranks that share the imports made so far; the process ends with the first status that is not 0."""
    os.environ |= meeting_place(count)
    others: list[int] = []
    rank = 0
    for number in range(1, count):
        if not (child := os.fork()):
            rank, others = number, []
            break
        others.append(child)
    os.environ["LOCAL_RANK"] = str(rank)
    action()
    if rank == 0:
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in others]
        raise SystemExit(next(filter(None, statuses), 0))
