"""Plain lines about the progress of a run, for logs that no terminal shows."""

import math
import sys
from collections.abc import Mapping
from datetime import timedelta
from time import monotonic
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from robustclip.types import Batch, data_of

PATIENCE_SECONDS = 60  # a line follows after this time, however few steps were taken


class ProgressLines(Callback):
    """Prints step, loss, speed and remaining time every ``trainer.log_every_n_steps`` steps, if stdout is no terminal.

    The first step of a fit and the first batch of every test set have a line too, and so has a step that ends a minute
    or more after the last line. The first process prints, and counts the images of all.
    """

    def __init__(self) -> None:
        self._start = self._shown_at = 0.0  # times of the start of the stage and of the last line
        self._first_step = self._step = 0  # steps before the start and at the last line
        self._images = self._batches = 0  # images since the last line, and batches since the start of the stage

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the clock of a run."""
        self._restart()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of a fit."""
        self._restart()
        self._first_step = self._step = trainer.global_step

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of a test."""
        self._restart()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of a validation that belongs to no fit."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the time of a validation out of the speed of the fit."""
        self._shown_at, self._images = monotonic(), 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints the line of a training step."""
        step, first = trainer.global_step, self._first_step
        self._images += _images(batch)
        if step > self._step and self._is_due(trainer, step - first == 1, step):
            total = trainer.estimated_stepping_batches
            self._step = step
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            parts = [] if loss is None else [f"loss {float(loss):.4g}" if isinstance(loss, Tensor) else f"loss {loss}"]
            place = f"epoch {trainer.current_epoch}, step {step}{_of(total)}"
            self._print(trainer, place, [*parts, *self._speed(trainer, (total - step) / (step - first))])

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints the line of a batch of a test set."""
        counts = trainer.num_test_batches
        self._evaluated(trainer, "test", data_of(trainer).test_tasks[dataloader_idx].name, counts, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints the line of a batch of a validation set; within a fit, only after a minute without a line."""
        name, counts = data_of(trainer).val_tasks[dataloader_idx].name, trainer.num_val_batches
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._evaluated(trainer, "validation", name, list(counts), batch, batch_idx)
        elif monotonic() - self._shown_at >= PATIENCE_SECONDS:
            self._print(trainer, f"epoch {trainer.current_epoch}, validation of {name}, batch {batch_idx + 1}", [])

    def _evaluated(
        self, trainer: Trainer, stage: str, name: str, counts: list[int | float], batch: Any, batch_idx: int
    ) -> None:
        self._images, self._batches, total = self._images + _images(batch), self._batches + 1, sum(counts)
        if self._is_due(trainer, batch_idx == 0, batch_idx + 1):
            place = f"{stage} of {name}, batch {batch_idx + 1}, {self._batches}{_of(total)} in all"
            self._print(trainer, place, self._speed(trainer, (total - self._batches) / self._batches))

    def _restart(self) -> None:
        self._start = self._shown_at = monotonic()
        self._images = self._batches = self._step = self._first_step = 0

    def _is_due(self, trainer: Trainer, is_first: bool, step: int) -> bool:
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return is_first or step % every == 0 or monotonic() - self._shown_at >= PATIENCE_SECONDS

    def _speed(self, trainer: Trainer, rest: float) -> list[str]:
        """Formats the images per second since the last line, and the remaining time.

        Args:
            trainer: trainer of the run.
            rest: remaining work as a multiple of the work since the start; infinite if it is not known.
        """
        now = monotonic()
        speed = self._images * trainer.world_size / max(now - self._shown_at, 1e-9)
        parts = [f"{speed:.1f} images/s"] if self._images else []
        if math.isfinite(rest):
            parts.append(f"{timedelta(seconds=round(max(0, rest) * (now - self._start)))} remaining")
        return parts

    def _print(self, trainer: Trainer, place: str, parts: list[str]) -> None:
        self._shown_at, self._images = monotonic(), 0
        if trainer.is_global_zero and not sys.stdout.isatty():
            sys.stdout.write(f"{', '.join([place, *parts])}\n")
            sys.stdout.flush()


def _images(batch: Any) -> int:
    """Returns the number of images of a batch; 0 for a batch of another type."""
    return len(batch.index) if isinstance(batch, Batch) else 0


def _of(total: float) -> str:
    """Formats a number of steps that may not be known."""
    return f" of {total:.0f}" if math.isfinite(total) and total > 0 else ""
