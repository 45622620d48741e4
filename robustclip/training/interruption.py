"""Handling of signals that end a run: a signal is recorded when it arrives, and the run ends between two steps."""

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

from robustclip.evaluation.writer import writer_of
from robustclip.methods._shared.saved_state import is_validation_due
from robustclip.training.model_checkpoint import Checkpoints
from robustclip.types import data_of

RUN = "run"  # checkpoint key of the identity of the run that wrote it


class Interruption(Checkpoint):  # Lightning calls callbacks of this type last, after others have saved the step
    """Ends a run between two steps after SIGTERM or SIGINT, with a checkpoint of a fit and status 143 or 130.

    A second signal ends the process at once. Under SLURM, the signal of a preemption also requeues the job, and the
    requeued job resumes from the checkpoint.
    """

    def __init__(self) -> None:
        self._signal = 0  # number of the signal that arrived, or 0
        self._requeue_signal: int | None = None
        self._process = os.getpid()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over SLURM's signal from Lightning, which would save in the middle of a step."""
        self._signal = 0
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal, environment.auto_requeue = environment.requeue_signal, False

    # Lightning installs its own handlers just before these hooks, and removes all handlers at the end.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers."""
        self._listen()

    on_validation_start = on_test_start = on_sanity_check_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Installs the signal handlers, and prints the weights that the fit starts from."""
        self._listen()
        if trainer.is_global_zero:
            sys.stdout.write(f"starts from {trainer.ckpt_path or 'the base model'} (step {trainer.global_step})\n")
            sys.stdout.flush()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ends a fit if a signal has arrived on any process."""
        number = self._received(trainer)
        if trainer.world_size > 1:  # this wait costs little, since Lightning waits for all processes in each step
            tensor = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(tensor, reduce_op="max"))
        if number and not _is_over(trainer):
            self._end_fit(trainer, number)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ends a validation if a signal has arrived; one that belongs to a fit will be repeated."""
        number = self._received(trainer)
        if number and trainer.state.fn != TrainerFn.FITTING:
            self._end_alone(trainer, number, "the validation is not finished")
        elif number and trainer.world_size == 1:  # of several processes, those without further batches would not end
            if trainer.sanity_checking:
                self._end(trainer, number, "nothing was learnt yet")
            if not _is_over(trainer):
                self._end_fit(trainer, number)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ends a test if a signal has arrived; the ledgers contain this batch."""
        if number := self._received(trainer):
            has_ledgers = writer_of(trainer) is not None
            result = "the same command resumes the test" if has_ledgers else "the test is not finished"
            self._end_alone(trainer, number, result)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the run's identity to the checkpoint."""
        checkpoint[RUN] = run_identity(pl_module, data_of(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Sets the exit status of Lightning's own end after SIGTERM."""
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the run if a signal has arrived after the last step."""
        if self._signal:
            self._end(trainer, self._signal, "the run is complete")

    def _listen(self) -> None:
        if self._signal or threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        for number in self._signals():
            signal.signal(number, self._record)

    def _signals(self) -> set[int]:
        return {signal.SIGTERM, signal.SIGINT, *([] if self._requeue_signal is None else [self._requeue_signal])}

    def _record(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader worker inherits the handler; its parent ends it
            return
        self._signal = number
        for handled in self._signals():
            signal.signal(handled, signal.SIG_DFL)
        os.write(2, f"{signal.Signals(number).name}: ends after this step; a second signal ends at once\n".encode())

    def _received(self, trainer: Trainer) -> int:
        return self._signal or (signal.SIGTERM if trainer.received_sigterm else 0)

    def _end_fit(self, trainer: Trainer, number: int) -> None:
        path = None if self._requeue_signal is None else preempted_checkpoint(trainer)
        if path is not None:
            trainer.save_checkpoint(path)
            result = "the requeued job starts from it"
            if number == self._requeue_signal and trainer.is_global_zero:
                result = _requeue() or result
        else:
            keeper = next((part for part in trainer.checkpoint_callbacks if isinstance(part, Checkpoints)), None)
            path = Path(trainer.default_root_dir) / "interrupted.ckpt"
            if keeper is None:
                trainer.save_checkpoint(path)
            else:
                path = keeper.save_now(trainer)
            result = f"--ckpt_path {path} resumes"
        self._end(trainer, number, f"step {trainer.global_step} is in {path}; {result}")

    def _end_alone(self, trainer: Trainer, number: int, result: str) -> None:
        """Ends this process, which may have its own number of batches, and the processes that it has started."""
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)
        self._end(trainer, number, result)

    def _end(self, trainer: Trainer, number: int, result: str) -> None:
        if trainer.is_global_zero:
            sys.stderr.write(f"interrupted by {signal.Signals(number).name}: {result}\n")
        raise SystemExit(128 + number)


def _is_over(trainer: Trainer) -> bool:
    """Checks whether a fit has taken its last step and has no validation to repeat, so that it can finish normally."""
    is_last_batch = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 == trainer.max_epochs
    has_all_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return has_all_steps or (is_last_batch and is_last_epoch and not is_validation_due(trainer))


def run_identity(method: LightningModule, data: Any) -> dict[str, str]:
    """Describes the settings that a requeued job shares with the job that it resumes.

    Args:
        method: method of the fit.
        data: data module of the fit.
    """
    plain = (str, int, float, type(None))  # types whose text is the same in every process
    settings = {name: str(value) for name, value in method.hparams.items() if isinstance(value, plain)}
    names = sorted(name for name in settings if not name.startswith("_"))
    return {
        "model": type(method).__qualname__,
        "data.train": str(getattr(data, "train_sources", None)),
        **{f"model.{name}": settings[name] for name in names},
    }


def preempted_checkpoint(trainer: Trainer) -> Path | None:
    """Returns the path from which this SLURM job resumes after a requeue; None outside of SLURM's jobs."""
    job = _job()
    if job is None or not SLURMEnvironment.detect():
        return None
    return Path(trainer.default_root_dir) / "preempted" / f"hpc_ckpt_{job}.ckpt"


def check_same_run(path: Path, identity: dict[str, str]) -> None:
    """Refuses a preempted job's checkpoint that another fit has written.

    Args:
        path: path of the checkpoint.
        identity: identity of this fit.

    Raises:
        ValueError: another fit wrote it; the message has the first settings that differ.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(RUN, {})
    changes = [f"{key} {saved.get(key)} (here {own})" for key, own in identity.items() if saved.get(key) != own]
    if changes:
        raise ValueError(
            f"{path} was left by another fit of this SLURM job, with {'; '.join(changes[:3])};"
            " move it away, or give this fit another trainer.default_root_dir"
        )


def check_no_stray(folder: Path) -> None:
    """Refuses checkpoints that Lightning would load under SLURM without a request, whichever run wrote them.

    Raises:
        ValueError: there is such a checkpoint.
    """
    strays = sorted(folder.glob("*hpc_ckpt_*")) if SLURMEnvironment.detect() else []
    if strays:
        raise ValueError(f"{strays[0]} would be loaded unasked; give --ckpt_path {strays[0]}, or move it away")


def _job() -> str | None:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return job if job and re.fullmatch("[0-9_]+", job) else None


def _requeue() -> str:
    """Requeues this job; returns the reason of a failure, else an empty text."""
    command = ["scontrol", "requeue", str(_job())]
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        return f"{' '.join(command)} failed: {error}; requeue the job by hand"
    return f"{' '.join(command)} failed with status {status}; requeue the job by hand" if status else ""
