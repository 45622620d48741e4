"""Base class of the callbacks that measure on the batches of test and validation tasks."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from robustclip.evaluation.progress import TaskProgress
from robustclip.evaluation.writer import writer_of
from robustclip.methods import RobustMethod
from robustclip.models.tf32 import tf32
from robustclip.types import Batch, Task, data_of


class TaskCallback(Callback):
    """Measures on the test and validation tasks: `begin` before the batches, `see` per batch, `end` after them."""

    def begin(self, trainer: Trainer, method: RobustMethod) -> None:
        """Prepares for the tasks of the running stage.

        Args:
            trainer: trainer of the stage.
            method: evaluated method.
        """

    def see(self, trainer: Trainer, method: RobustMethod, task: Task, batch: Batch, logits: Any) -> None:
        """Measures on a batch.

        Args:
            trainer: trainer of the stage.
            method: evaluated method.
            task: task of the batch.
            batch: clean images, on the device.
            logits: ``(B, C)`` of the images.
        """

    def end(self, trainer: Trainer, method: RobustMethod) -> None:
        """Logs the measurements; all processes call it.

        Args:
            trainer: trainer of the stage.
            method: evaluated method.
        """

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `begin` before the first batch."""
        self.begin(trainer, method_of(pl_module))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Calls `see` with the task of the batch."""
        with tf32(is_allowed=False):  # a prediction that counts is computed in fp32
            self.see(trainer, method_of(pl_module), stage_of(trainer)[1][dataloader_idx], batch, outputs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `end` after the last batch."""
        self.end(trainer, method_of(pl_module))

    # Validation is the same on other tasks.
    on_validation_epoch_start = on_test_epoch_start
    on_validation_batch_end = on_test_batch_end
    on_validation_epoch_end = on_test_epoch_end


def method_of(module: LightningModule) -> RobustMethod:
    """Returns the module, checked to be a method of the package.

    Raises:
        TypeError: it is of another class.
    """
    if not isinstance(module, RobustMethod):
        raise TypeError(f"the callbacks need a RobustMethod, got {type(module).__name__}")
    return module


def stage_of(trainer: Trainer) -> tuple[str, list[Task]]:
    """Returns the prefix of the metrics and the tasks of the running stage."""
    data = data_of(trainer)
    return ("test", data.test_tasks) if trainer.testing else ("val", data.val_tasks)


def check_has_images(trainer: Trainer, subject: str) -> None:
    """Refuses embeddings in place of images.

    Args:
        trainer: trainer of the running stage.
        subject: subject of the message, in the plural.

    Raises:
        ValueError: the stage's batches hold embeddings.
    """
    if data_of(trainer).feature_model is not None:
        remedy = "run none there, as by `fit_attacks: {}`, or set data.features to null"
        raise ValueError(f"{subject} need images, and data.features gives embeddings in this stage; {remedy}")


def announce(trainer: Trainer, label: str) -> None:
    """Renames the progress bar, if the trainer shows one that can be renamed.

    Args:
        trainer: trainer of the running stage.
        label: new name.
    """
    if isinstance(trainer.progress_bar_callback, TaskProgress):
        trainer.progress_bar_callback.announce(label)


def log_outputs(trainer: Trainer, method: RobustMethod, numbers: Mapping[str, Any]) -> None:
    """Logs numbers of a section; the result does not repeat them under ``other_metrics``.

    Args:
        trainer: trainer of the running stage.
        method: evaluated method.
        numbers: values by their full names.
    """
    method.log_dict(dict(numbers))
    if (writer := writer_of(trainer)) is not None:
        writer.outputs |= numbers.keys()


def finished_batches(trainer: Trainer, task: str) -> Iterator[Batch]:
    """Reads this process's share of the finished samples that the loaders of a test leave out, on the device.

    Args:
        trainer: trainer of the running test.
        task: name of a test task.
    """
    writer = writer_of(trainer)
    if writer is not None and writer.journal is not None and not writer.journal.skips(task):
        return
    loader = data_of(trainer).done_dataloader(task)
    for batch in () if loader is None else loader:
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
