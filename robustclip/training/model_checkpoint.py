"""Checkpoints of a fit: the best by validation, and the last to resume from."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from robustclip.arguments import checked
from robustclip.evaluation.robust import RobustEvaluation
from robustclip.methods import RobustMethod
from robustclip.persistence import atomic_write, sweep
from robustclip.types import data_of

ACCURACY = re.compile("val/[^/]+/[^/]+/acc1")


@checked
class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint with a ``last.ckpt`` that is always the last checkpoint.

    Lightning 2.6 updates ``last.ckpt`` only when the monitored metric has improved, so a run that resumes from it
    would lose every epoch since the best.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fails before training starts if validation does not log the monitored accuracy.

        Raises:
            ValueError: the accuracy is not logged; the message lists those that are.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and "://" not in str(self.dirpath):
            sweep(Path(str(self.dirpath)))
        if stage == "fit" and ACCURACY.fullmatch(self.monitor or ""):
            known = _validated(trainer)
            if not known:
                raise ValueError(f"checkpoint.monitor is {self.monitor!r}, but nothing is validated; set data.holdout")
            if self.monitor not in known:
                raise ValueError(f"checkpoint.monitor is {self.monitor!r}, but validation gives {', '.join(known)}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the settings of the command line beside the checkpoints, which contain them too."""
        settings = pl_module.run_settings if isinstance(pl_module, RobustMethod) else None
        is_local = self.dirpath is not None and "://" not in str(self.dirpath)
        if settings is not None and is_local and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _write_settings(Path(str(self.dirpath)), settings)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the best and then the last checkpoint, if saving follows validation."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._renew_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the best and then the last checkpoint, if saving follows the epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._renew_last(trainer)

    def save_now(self, trainer: Trainer) -> Path:
        """Saves ``last.ckpt``, or ``interrupted.ckpt`` without `save_last: true`, and returns its path."""
        if self.save_last is True:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            return Path(self.last_model_path)
        path = Path(str(self.dirpath)) / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        return path

    def _renew_last(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):  # nothing was saved at this step yet
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of a fit as ``fit.yaml``, or under the next free name; overwrites no file."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    paths = (folder / (f"fit-{number}.yaml" if number else "fit.yaml") for number in itertools.count())
    path = next(path for path in paths if not path.exists() or path.read_bytes() == text.encode())
    if not path.exists():
        atomic_write(path, text)


def _validated(trainer: Trainer) -> list[str]:
    """Lists the names of the accuracies that a fit's validation logs."""
    tasks = [task.name for task in data_of(trainer).val_tasks]
    evaluations = [part for part in trainer.callbacks if isinstance(part, RobustEvaluation)]  # type: ignore[attr-defined]
    names = ["clean", *(name for evaluation in evaluations for name in evaluation.fit_attacks)]
    return [f"val/{task}/{name}/acc1" for task in ("mean", *tasks) for name in names] if tasks else []
