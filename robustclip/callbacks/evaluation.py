"""Accuracy under attack, for every method and every task."""

from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from robustclip.attacks import Attack
from robustclip.callbacks.progress import TaskProgress
from robustclip.methods import RobustMethod
from robustclip.methods.freezing import frozen
from robustclip.metrics import Top1
from robustclip.types import TASK_NAME, Batch, Task

NOT_AN_ATTACK = ("clean", "n", "seconds", "bad_samples")  # other keys of a task's results


class RobustEvaluation(Callback):
    """Runs every attack on every validation and test task, on the very samples of the clean accuracy.

    Logs ``<stage>/<task>/<attack>/acc1`` and ``/correct``, ``<stage>/mean/<attack>/acc1`` and seconds per task.

    Args:
        attacks: name to attack; none measures clean accuracy alone.
        max_samples: evaluate this many fixed samples of each task, clean and attacked; null for all.
        fit_attacks: what the validations during ``fit`` run instead; null for ``attacks``.
        fit_max_samples: their ``max_samples``; null for the same.
        seed: of the attacks' random starts.

    Raises:
        ValueError: an attack name that could not be a key of the results.
    """

    def __init__(
        self,
        attacks: dict[str, Attack] | None = None,
        max_samples: int | None = None,
        fit_attacks: dict[str, Attack] | None = None,
        fit_max_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self.attacks, self.max_samples, self.seed = attacks or {}, max_samples, seed
        self.fit_attacks = self.attacks if fit_attacks is None else fit_attacks
        self.fit_max_samples = fit_max_samples or max_samples
        for name in {**self.attacks, **self.fit_attacks}:
            if not TASK_NAME.fullmatch(name) or name in NOT_AN_ATTACK:
                raise ValueError(f"attack name must match [a-z0-9_]+ and be none of {NOT_AN_ATTACK}, got {name!r}")
        for key, count in {"max_samples": max_samples, "fit_max_samples": fit_max_samples}.items():
            if count is not None and count < 1:
                raise ValueError(f"{key} must be at least 1, got {count}; null evaluates all")
        self._running: dict[str, Attack] = {}
        self._counts: dict[tuple[str, str], Top1] = {}
        self._seconds: dict[str, float] = {}
        self._start = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Chooses the stage's attacks; limits the sets, so that clean and attacked accuracy share their samples."""
        self._running = self.fit_attacks if stage == "fit" else self.attacks
        limit = self.fit_max_samples if stage == "fit" else self.max_samples
        trainer.datamodule.max_samples = limit  # type: ignore[attr-defined]

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting."""
        _, tasks = _stage(trainer)
        keys = [(task.name, attack) for task in tasks for attack in self._running]
        self._counts = {key: Top1().to(pl_module.device) for key in keys}
        self._seconds = {task.name: 0.0 for task in tasks}

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Starts the clock."""
        self._start = perf_counter()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Attacks the batch."""
        _, tasks = _stage(trainer)
        self._attack(trainer, pl_module, batch, tasks[dataloader_idx])
        self._seconds[tasks[dataloader_idx].name] += perf_counter() - self._start

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs accuracies, seconds and what did not decode."""
        stage, tasks = _stage(trainer)
        self._log_accuracies(pl_module, stage, tasks)
        left_out = trainer.datamodule.bad_sample_counts  # type: ignore[attr-defined]
        for task in tasks:
            bad = torch.tensor(float(left_out.get(task.name, 0)), device=pl_module.device)
            pl_module.log(f"{stage}/{task.name}/bad_samples", bad, sync_dist=True, reduce_fx="sum")
            seconds = torch.tensor(self._seconds[task.name], device=pl_module.device)
            pl_module.log(f"{stage}/{task.name}/seconds", seconds, sync_dist=True, reduce_fx="max")

    # Validation is the same on other tasks.
    on_validation_epoch_start = on_test_epoch_start
    on_validation_batch_start = on_test_batch_start
    on_validation_batch_end = on_test_batch_end
    on_validation_epoch_end = on_test_epoch_end

    def _attack(self, trainer: Trainer, module: LightningModule, batch: Batch, task: Task) -> None:
        if not isinstance(module, RobustMethod):
            raise TypeError(f"RobustEvaluation needs a RobustMethod, got {type(module).__name__}")

        def forward(images: Tensor) -> Tensor:
            return module.logits(images, task.name)

        progress = trainer.progress_bar_callback
        # Lightning opens autocast around the steps only; hooks have to open it themselves.
        with trainer.precision_plugin.forward_context(), frozen(module):
            for name, attack in self._running.items():
                if isinstance(progress, TaskProgress):
                    progress.announce(f"{task.name} under {name}")
                attacked = attack(batch.images, forward, batch.labels, index=batch.index, seed=self.seed)
                with torch.no_grad():
                    self._counts[task.name, name].update(forward(attacked), batch.labels)

    def _log_accuracies(self, module: LightningModule, stage: str, tasks: list[Task]) -> None:
        for attack in self._running:
            accuracies = []
            for task in tasks:
                values = self._counts[task.name, attack].compute()
                accuracies.append(values["acc1"])
                module.log(f"{stage}/{task.name}/{attack}/correct", values["correct"].float())
                module.log(f"{stage}/{task.name}/{attack}/acc1", values["acc1"], prog_bar=stage == "val")
            if accuracies:
                module.log(f"{stage}/mean/{attack}/acc1", torch.stack(accuracies).mean())


def _stage(trainer: Trainer) -> tuple[str, list[Task]]:
    """Prefix of the metrics and tasks of what runs now."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return ("test", data.test_tasks) if trainer.testing else ("val", data.val_tasks)
