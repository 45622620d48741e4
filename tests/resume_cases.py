"""Run by test_resume.py: fits whole, fits that are killed by SIGKILL, and their continuations, each a process.

usage: python resume_cases.py FOLDER, which holds `cases.json` and the data; writes `ends.json` into it.

Every process is forked after the slow imports and runs the command line as `python -m robustclip` would.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import robustclip.cli  # noqa: F401  # loaded once, before the forks
from robustclip.__main__ import run
from robustclip.methods import TeCoA
from robustclip.types import Batch

PATIENCE_SECONDS = 60


class Restless(TeCoA):
    """A user's method that draws from every global generator, and can be told where to die."""

    validation_batches = 0

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        self._die_at(f"train {self.global_step}")
        images = self.perturb(batch) + 0.1 * torch.rand_like(batch.images)
        images = images * (1 - 0.1 * random.random()) * float(1 - 0.1 * np.random.rand())
        return {"noisy_ce": F.cross_entropy(self.logits(images.clamp(0, 1)), batch.labels)}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self._die_at(f"validation {self.global_step}")
        return super().validation_step(batch, batch_idx, dataloader_idx)

    def _die_at(self, moment: str) -> None:
        if os.environ.get("DIE_AT") == moment:
            os.kill(os.getpid(), signal.SIGKILL)


def start(arguments: list[str], log: Path, die_at: str = "") -> int:
    """Forks a process that runs the command line; returns its id."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    os.environ["DIE_AT"] = die_at
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 1
    try:
        sys.argv = ["robustclip", *arguments]
        status = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(child: int, *, expected: int, patience: float = PATIENCE_SECONDS) -> None:
    """Waits for a process; its status must be as expected."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code != expected:
                raise SystemExit(f"a process ended with {code}, expected {expected}; see the logs")
            return
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    raise SystemExit("a process did not end in time")


def kill_once_there(child: int, checkpoint: Path) -> None:
    """Kills a process, from outside, as soon as it has written a checkpoint."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)


def end_of(folder: Path) -> dict[str, Any]:
    """What a finished run left: step, and digests of weights, optimiser and schedule."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    parts = {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}
    return {"step": checkpoint["global_step"]} | {key: digest(part) for key, part in parts.items()}


def digest(value: Any) -> str:
    """Of tensors in nested containers, bit for bit."""
    if isinstance(value, dict):
        text = "".join(f"{key}:{digest(each)}," for key, each in sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(value, list | tuple):
        text = "".join(f"{digest(each)}," for each in value)
    else:
        text = value.detach().numpy().tobytes().hex() if isinstance(value, Tensor) else repr(value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main(folder: Path) -> None:
    os.chdir(folder)
    ends: dict[str, dict[str, Any]] = {}
    cases = json.loads(Path("cases.json").read_text())
    sys.argv = ["robustclip", *next(iter(cases.values()))["fit"], "--checkpoint.dirpath", "warm_up"]
    run()  # imports what is imported late, once for all forks
    for name, case in cases.items():
        log = Path(f"{name}.log")
        where = folder / name
        if case["whole"]:
            whole = [*case["fit"], "--checkpoint.dirpath", str(where / "whole")]
            finish(start(whole, log), expected=0)
            ends[f"{name} whole"] = end_of(where / "whole")
        for number, moment in enumerate(case["die_at"]):
            part = where / str(number)
            arguments = [*case["fit"], "--checkpoint.dirpath", str(part)]
            child = start(arguments, log, die_at=moment)
            if moment == "outside":
                kill_once_there(child, part / "last.ckpt")
            finish(child, expected=-signal.SIGKILL)
            finish(start([*arguments, "--ckpt_path", str(part / "last.ckpt")], log), expected=0)
            ends[f"{name} {moment}"] = end_of(part)
    Path("ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]).resolve())
