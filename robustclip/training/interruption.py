"""Signals that end a run: noted when they come, acted upon between two steps."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from robustclip.evaluation.writer import ResultsWriter
from robustclip.methods._shared.saved_state import is_validation_due
from robustclip.training.model_checkpoint import Checkpoints
from robustclip.types import data_of

RUN = "run"  # key of a checkpoint: identity of the run that wrote it


class Interruption(Checkpoint):  # callbacks of this type come last, after what the step itself saves
    """Ends a run between two steps after SIGTERM or SIGINT, with a checkpoint of a fit and status 143 or 130.

    A second signal ends the process at once. Under SLURM the signal of a preemption requeues the job, too, and the
    requeued job starts from the checkpoint.
    """

    def __init__(self) -> None:
        self._noted = 0  # number of the signal
        self._requeue_signal: int | None = None
        self._process = os.getpid()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes SLURM's signal over from Lightning, which would save in the middle of a step."""
        self._noted = 0
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal, environment.auto_requeue = environment.requeue_signal, False

    # Lightning installs handlers of its own just before these, and removes all handlers at the end.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens."""
        self._listen()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens."""
        self._listen()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens, and prints from which weights the fit starts."""
        self._listen()
        if trainer.is_global_zero:
            sys.stdout.write(f"starts from {trainer.ckpt_path or 'the base model'} (step {trainer.global_step})\n")
            sys.stdout.flush()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ends a fit of which a signal was noted on any process."""
        noted = self._received(trainer)
        if trainer.world_size > 1:  # Lightning waits for the other processes before each step, too
            tensor = torch.tensor(noted, device=trainer.strategy.root_device)
            noted = int(trainer.strategy.reduce(tensor, reduce_op="max"))
        if noted and not _is_over(trainer):
            self._end_fit(trainer, noted)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ends a validation; one that belongs to a fit will be repeated."""
        noted = self._received(trainer)
        if noted and trainer.state.fn != TrainerFn.FITTING:
            self._end_alone(trainer, noted, "the validation is not finished")
        elif noted and trainer.world_size == 1:  # else a process that has no batch left would not hear of it
            if trainer.sanity_checking:
                self._end(trainer, noted, "nothing was learnt yet")
            if not _is_over(trainer):
                self._end_fit(trainer, noted)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ends a test, whose ledgers hold this batch."""
        if noted := self._received(trainer):
            resumes = any(isinstance(each, ResultsWriter) for each in trainer.callbacks)  # type: ignore[attr-defined]
            result = "the same command resumes the test" if resumes else "the test is not finished"
            self._end_alone(trainer, noted, result)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the run's identity."""
        checkpoint[RUN] = run_identity(pl_module, data_of(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives Lightning's own end after SIGTERM its status."""
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Heeds a signal that came after the last step."""
        if self._noted:
            self._end(trainer, self._noted, "the run is complete")

    def _listen(self) -> None:
        if self._noted or threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        for each in self._signals():
            signal.signal(each, self._note)

    def _signals(self) -> set[int]:
        return {signal.SIGTERM, signal.SIGINT, *([] if self._requeue_signal is None else [self._requeue_signal])}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader worker, which its parent ends
            return
        self._noted = number
        for each in self._signals():
            signal.signal(each, signal.SIG_DFL)
        os.write(2, f"{signal.Signals(number).name}: ends after this step; a second signal ends at once\n".encode())

    def _received(self, trainer: Trainer) -> int:
        return self._noted or (signal.SIGTERM if trainer.received_sigterm else 0)

    def _end_fit(self, trainer: Trainer, number: int) -> None:
        path = None if self._requeue_signal is None else preempted_checkpoint(trainer)
        if path is not None:
            trainer.save_checkpoint(path)
            result = "the requeued job starts from it"
            if number == self._requeue_signal and trainer.is_global_zero:
                result = _requeue() or result
        else:
            keeper = next((each for each in trainer.checkpoint_callbacks if isinstance(each, Checkpoints)), None)
            path = Path(trainer.default_root_dir) / "interrupted.ckpt"
            if keeper is None:
                trainer.save_checkpoint(path)
            else:
                path = keeper.save_now(trainer)
            result = f"--ckpt_path {path} resumes"
        self._end(trainer, number, f"step {trainer.global_step} is in {path}; {result}")

    def _end_alone(self, trainer: Trainer, number: int, result: str) -> None:
        """Ends this process, whose number of batches may be its own, and those that it has started."""
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)
        self._end(trainer, number, result)

    def _end(self, trainer: Trainer, number: int, result: str) -> None:
        if trainer.is_global_zero:
            sys.stderr.write(f"interrupted by {signal.Signals(number).name}: {result}\n")
        raise SystemExit(128 + number)


def _is_over(trainer: Trainer) -> bool:
    """Whether a fit has taken its last step and has no validation to repeat, so that it may as well finish."""
    is_last_batch = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 == trainer.max_epochs
    has_all_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return has_all_steps or (is_last_batch and is_last_epoch and not is_validation_due(trainer))


def run_identity(method: LightningModule, data: Any) -> dict[str, str]:
    """What a requeued job has in common with the job that it continues."""
    plain = (str, int, float, type(None))  # whose text is the same in every process
    settings = {name: str(value) for name, value in method.hparams.items() if isinstance(value, plain)}
    names = sorted(name for name in settings if not name.startswith("_"))
    return {
        "model": type(method).__qualname__,
        "data.train": str(getattr(data, "wanted_train", None)),
        **{f"model.{name}": settings[name] for name in names},
    }


def preempted_checkpoint(trainer: Trainer) -> Path | None:
    """Checkpoint from which this SLURM job starts when it was requeued; None outside of SLURM's jobs."""
    job = _job()
    if job is None or not SLURMEnvironment.detect():
        return None
    return Path(trainer.default_root_dir) / "preempted" / f"hpc_ckpt_{job}.ckpt"


def check_same_run(path: Path, identity: dict[str, str]) -> None:
    """Refuses a preempted job's checkpoint that another fit has written.

    Args:
        path: of the checkpoint.
        identity: of this fit.

    Raises:
        ValueError: another fit's, with the first setting that differs.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(RUN, {})
    changes = [f"{key} {saved.get(key)} (here {own})" for key, own in identity.items() if saved.get(key) != own]
    if changes:
        raise ValueError(
            f"{path} was left by another fit of this SLURM job, with {'; '.join(changes[:3])};"
            " move it away, or give this fit another trainer.default_root_dir"
        )


def check_no_stray(folder: Path) -> None:
    """Refuses checkpoints that Lightning would load under SLURM unasked, whichever run wrote them.

    Raises:
        ValueError: there is one.
    """
    strays = sorted(folder.glob("*hpc_ckpt_*")) if SLURMEnvironment.detect() else []
    if strays:
        raise ValueError(f"{strays[0]} would be loaded unasked; give --ckpt_path {strays[0]}, or move it away")


def _job() -> str | None:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return job if job and re.fullmatch("[0-9_]+", job) else None


def _requeue() -> str:
    """Requeues this job; returns why that failed, else nothing."""
    command = ["scontrol", "requeue", str(_job())]
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        return f"{' '.join(command)} failed: {error}; requeue the job by hand"
    return f"{' '.join(command)} failed with status {status}; requeue the job by hand" if status else ""
