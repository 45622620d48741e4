"""Progress bars that name the data set and the attack."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from robustclip import display
from robustclip.arguments import CountOrZero, checked
from robustclip.types import data_of


@checked
class TaskProgress(RichProgressBar):
    """Lightning's rich progress bar, with elapsed and remaining time, under the name of what is being evaluated.

    Args:
        refresh_rate: redraws per second.
    """

    def __init__(self, refresh_rate: CountOrZero = 5) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._label = ""

    @property
    def test_description(self) -> str:
        """Data set and attack."""
        return self._label or "Testing"

    @property
    def validation_description(self) -> str:
        """Data set and attack."""
        return self._label or "Validation"

    def announce(self, label: str) -> None:
        """Renames the running bar."""
        self._label = display.label(label)
        bar = self.test_progress_bar_id if self.trainer.testing else self.val_progress_bar_id
        if self.progress is not None and bar is not None and bar in self.progress.task_ids:
            self.progress.update(bar, description=self._label)

    def close(self) -> None:
        """Takes the bar off the screen, so that a table can be printed."""
        self._stop_progress()
        self._progress_stopped = True

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Opens the bar of a new data set."""
        self._label = display.label(data_of(trainer).test_tasks[dataloader_idx].name)
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Opens the bar of a new data set."""
        self._label = display.label(data_of(trainer).val_tasks[dataloader_idx].name)
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Showing a number waits for the device, so it is done as rarely as logging one.
        if not trainer.training or trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            super()._update_metrics(trainer, pl_module)
