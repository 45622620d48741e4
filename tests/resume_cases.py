"""Run by test_resume.py: fits whole, fits that signals end, and their continuations, each in processes of its own.

usage: python resume_cases.py FOLDER, which holds `cases.json` and the data; writes `ends.json` into it.

Every process is forked after the slow imports.
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
from helpers import quick_trainer
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from ranks import meeting_place
from torch import Tensor
from torch.nn import functional as F

import robustclip.cli.lightning  # noqa: F401  # loaded once, before the forks
from robustclip import methods
from robustclip.attacks import PGD
from robustclip.cli.main import run
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import RobustEvaluation
from robustclip.methods import RobustMethod, TeCoA
from robustclip.training import Checkpoints, Interruption
from robustclip.training.interruption import preempted_checkpoint
from robustclip.types import Batch

PATIENCE_SECONDS = 200
STATUS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGUSR1": 138}


class Restless(TeCoA):
    """A user's method that draws from every global generator."""

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        images = self.perturb(batch) + 0.1 * torch.rand_like(batch.images)
        images = images * (1 - 0.1 * random.random()) * float(1 - 0.1 * np.random.rand())
        return {"noisy_ce": F.cross_entropy(self.logits(images.clamp(0, 1)), batch.labels)}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        torch.rand(()), random.random(), np.random.rand()
        return super().validation_step(batch, batch_idx, dataloader_idx)


class Strike(Callback):
    """Sends this process a signal at the moment in the variable STRIKE, such as ``SIGTERM train 1.2``.

    The numbers are those of the epoch and of its batches that are done. In training the signal comes inside the
    attack, if there is one.
    """

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._is_now(f"train {trainer.current_epoch}.{batch_idx}"):
            if isinstance(module, RobustMethod) and module.attack is not None:
                Striking.is_armed = True
            else:
                strike()

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if not trainer.sanity_checking and self._is_now(f"validation {trainer.current_epoch}.{done}"):
            strike()

    def on_test_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._is_now(f"test {dataloader_idx}.{batch_idx}"):
            strike()

    def _is_now(self, moment: str) -> bool:
        return os.environ.get("STRIKE", "").partition(" ")[2] == moment


class Striking(PGD):
    """An attack during which the signal comes."""

    is_armed = False

    def perturb(self, *args: Any, **kwargs: Any) -> Tensor:
        if Striking.is_armed:
            Striking.is_armed = False
            strike()
        return super().perturb(*args, **kwargs)


def strike() -> None:
    name = os.environ.pop("STRIKE").partition(" ")[0]
    if name == "SIGKILL" or os.environ.get("LOCAL_RANK", "1") == "1":  # one rank of two hears of a softer signal
        os.kill(os.getpid(), getattr(signal, name))


def fit(root: Path, folder: Path, case: dict[str, Any], checkpoint: str | None) -> int:
    """Fits in this process."""
    seed_everything(0)
    ranks = case["ranks"]
    is_attacked = case["method"] in ("Restless", "TeCoA", "PMGAFT")
    method = (Restless if case["method"] == "Restless" else getattr(methods, case["method"]))(
        pretrained=str(root / "model"),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
        **({"attack": Striking(steps=2)} if is_attacked else {}),
        **case.get("options", {}),
    )
    keeper = Checkpoints(dirpath=folder, save_last=True, **case["saves"])
    callbacks = [Strike(), RobustEvaluation({"pgd2": PGD(steps=2)}), keeper, Interruption()]
    limits = {"max_epochs": 3, "default_root_dir": folder, "enable_checkpointing": True}
    strategy = "ddp_find_unused_parameters_true" if ranks > 1 else "auto"
    trainer = quick_trainer(*callbacks, processes=ranks, strategy=strategy, **limits, **case["trainer"])
    options = dict(case["data"])
    train = options.pop("train")
    options["train"] = DataSource(**train) if isinstance(train, dict) else train
    data = CLIPDataModule(
        root=str(root), image_size=32, batch_size=4 // ranks, holdout=0.2, bad_samples="skip", **options
    )
    requeued = preempted_checkpoint(trainer)
    if requeued is not None and requeued.exists():
        checkpoint = str(requeued)
    trainer.fit(method, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name}
        (folder / "metrics.json").write_text(json.dumps({n: v for n, v in metrics.items() if "seconds" not in n}))
    return 0


def start(arguments: Any, log: Path, environment: dict[str, str]) -> int:
    """Forks a process that fits, or runs the command line; returns its id."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status: Any = 1
    try:
        sys.argv = ["robustclip", *map(str, arguments)]
        status = run() if isinstance(arguments, list) else fit(*arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(child: int, *, expected: int | None, patience: float = PATIENCE_SECONDS) -> None:
    """Waits for a process; its status must be as expected."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if expected is not None and code != expected:
                raise SystemExit(f"a process ended with {code}, expected {expected}; see the logs")
            return
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    raise SystemExit("a process did not end in time")


def run_part(root: Path, folder: Path, case: dict[str, Any], checkpoint: str | None, blow: str) -> None:
    """Starts all ranks of a fit, and waits for their end."""
    environment = {"STRIKE": blow, **case.get("environment", {})}
    places = [{}] if case["ranks"] == 1 else [meeting_place() | {"LOCAL_RANK": str(rank)} for rank in (0, 1)]
    if len(places) == 2:
        places[1] |= {"MASTER_PORT": places[0]["MASTER_PORT"]}
    log = root / f"{folder.parent.name}.log"
    children = [start((root, folder, case, checkpoint), log, environment | place) for place in places]
    if " after " in blow:
        kill_after(children, folder / "last.ckpt", float(blow.split()[-1]))
        return
    expected = STATUS[blow.partition(" ")[0]] if blow else 0
    if expected == -signal.SIGKILL:
        finish(children[0], expected=None if len(children) > 1 else expected)
        for child in children[1:]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return
    for child in children:
        finish(child, expected=expected)


def kill_after(children: list[int], checkpoint: Path, seconds: float) -> None:
    """Kills processes some time after they have written a checkpoint."""
    before, end = written_at(checkpoint), time.monotonic() + PATIENCE_SECONDS
    while written_at(checkpoint) == before and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(seconds)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            raise SystemExit("a process had ended before it was killed")


def written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def end_of(folder: Path) -> dict[str, Any]:
    """Step, validation, and digests of weights, optimiser and schedule that a finished run left."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    parts = {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}
    found = {"step": checkpoint["global_step"], "epoch": checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]}
    found |= {"validation": json.loads((folder / "metrics.json").read_text())}
    return found | {key: digest(part) for key, part in parts.items()}


def digest(value: Any) -> str:
    """Of tensors in nested containers, bit for bit."""
    if isinstance(value, dict):
        text = "".join(f"{key}:{digest(each)}," for key, each in sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(value, list | tuple):
        text = "".join(f"{digest(each)}," for each in value)
    else:
        text = value.detach().numpy().tobytes().hex() if isinstance(value, Tensor) else repr(value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_case(root: Path, name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Runs a fit whole, and again with interruptions."""
    whole, resumed = root / name / "whole", root / name / "resumed"
    run_part(root, whole, case | {"environment": {}}, None, "")
    for number, blow in enumerate([*case["blows"], ""]):
        checkpoint = str(resumed / "last.ckpt") if number and (resumed / "last.ckpt").exists() else None
        run_part(root, resumed, case, checkpoint, blow)
    return {"whole": end_of(whole), "resumed": end_of(resumed)}


def main(root: Path) -> None:
    os.chdir(root)
    ends: dict[str, dict[str, Any]] = {}
    cases = json.loads((root / "cases.json").read_text())
    first = next(iter(cases.values()))
    (root / "warm_up").mkdir()
    fit(root, root / "warm_up", first | {"ranks": 1}, None)  # imports what is imported late, once for all forks
    for name, case in cases.items():
        try:
            ends[name] = run_case(root, name, case)
        except SystemExit as stop:  # so that one failure hides no other
            ends[name] = {"whole": {}, "resumed": {"error": str(stop)}}
        (root / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]).resolve())
