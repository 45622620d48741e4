"""Checkpoints to choose from and to continue from."""

import re
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from robustclip.callbacks.evaluation import RobustEvaluation

ACCURACY = re.compile("val/[^/]+/[^/]+/acc1")


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose ``last.ckpt`` is the last one.

    Lightning 2.6 renews ``last.ckpt`` only when the monitored metric improved, so a run that is continued from it
    would lose every epoch since the best.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks before a fit, not after its first epoch, whether validation measures the monitored accuracy.

        Raises:
            ValueError: it does not.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and "://" not in str(self.dirpath):
            _sweep(Path(str(self.dirpath)))
        if stage == "fit" and ACCURACY.fullmatch(self.monitor or ""):
            known = _validated(trainer)
            if not known:
                raise ValueError(f"checkpoint.monitor is {self.monitor!r}, but nothing is validated; set data.holdout")
            if self.monitor not in known:
                raise ValueError(f"checkpoint.monitor is {self.monitor!r}, but validation gives {', '.join(known)}")

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

    def save_now(self, trainer: Trainer) -> Path:
        """Saves ``last.ckpt``, or without `save_last: true` ``interrupted.ckpt``; returns its path."""
        if self.save_last is True:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            return Path(self.last_model_path)
        path = Path(str(self.dirpath)) / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        return path

    def _renew_last(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):  # nothing was saved at this step yet
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _sweep(folder: Path) -> None:
    """Removes halves of checkpoints whose writers were killed."""
    for aside in folder.glob(".*.ckpt.*"):
        writer = aside.suffix[1:]
        if writer.isdigit() and not Path(f"/proc/{writer}").exists():
            aside.unlink(missing_ok=True)


def _validated(trainer: Trainer) -> list[str]:
    """Names of the accuracies that a fit's validation logs."""
    tasks = [task.name for task in trainer.datamodule.val_tasks]  # type: ignore[attr-defined]
    evaluations = [each for each in trainer.callbacks if isinstance(each, RobustEvaluation)]  # type: ignore[attr-defined]
    names = ["clean", *(name for each in evaluations for name in each.fit_attacks)]
    return [f"val/{task}/{name}/acc1" for task in ("mean", *tasks) for name in names] if tasks else []
