"""Checkpoints to choose from and to continue from."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose ``last.ckpt`` is the last one.

    Lightning 2.6 renews ``last.ckpt`` only when the monitored metric improved, so a run that is continued from it
    would lose every epoch since the best.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the best, then the last, where validation decides when."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._renew_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the best, then the last, where the epoch decides when."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._renew_last(trainer)

    def _renew_last(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):  # nothing was saved at this step yet
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
