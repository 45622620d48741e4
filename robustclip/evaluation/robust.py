"""Accuracy under attack, for every method and every task."""

from collections.abc import Iterator
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from robustclip.arguments import Count, CountOrZero, checked
from robustclip.attacks import Attack
from robustclip.attacks.attack import Forward
from robustclip.attacks.recipes import Attacks, by_name
from robustclip.evaluation.engine import ROBUST, StopRule, examine
from robustclip.evaluation.identity import describe, members_of
from robustclip.evaluation.journal import Journal, sample_rows
from robustclip.evaluation.progress import TaskProgress
from robustclip.evaluation.writer import ResultsWriter
from robustclip.methods import RobustMethod
from robustclip.metrics import Top1
from robustclip.models.layers import frozen
from robustclip.results.tables import DETECTION, GEOMETRY
from robustclip.types import TASK_NAME, Batch, Task, data_of

NOT_AN_ATTACK = ("clean", "n", "seconds", "bad_samples", GEOMETRY, DETECTION)  # other keys of a task's results


@checked
class RobustEvaluation(Callback):
    """Runs every attack on every validation and test task, on the very samples of the clean accuracy.

    Logs ``<stage>/<task>/<attack>/acc1`` and ``/correct``, ``<stage>/mean/<attack>/acc1`` and seconds per task. Beside
    a `ResultsWriter`, a test keeps a ledger of every sample and goes on where an earlier start of it was ended.

    Args:
        attacks: name to attack, or the names of recipes, such as ``pgd10``; none measures clean accuracy alone.
        max_samples: evaluate this many fixed samples of each task, clean and attacked; null for all.
        fit_attacks: what the validations during ``fit`` run instead; null for ``attacks``.
        fit_max_samples: their ``max_samples``; null for the same.
        seed: of the attacks' random numbers.
        stop: ``worst``: a sample is robust if it is right clean and in every image that the attack evaluates, and is
            left alone once it is broken. ``last``: only the image that the attack ends with counts, as in the papers.
        attack_precision: ``bf16`` attacks in bfloat16 first and again in fp32 what survives. Every verdict is fp32.
        check_every: evaluations between two looks at what is broken; more suits devices that must be waited for.
        save_examples: keep this many attacked images that broke a sample, per task and attack.

    Raises:
        ValueError: an attack name that could not be a key of the results, or a number out of range.
    """

    def __init__(
        self,
        attacks: Attacks | None = None,
        max_samples: Count | None = None,
        fit_attacks: Attacks | None = None,
        fit_max_samples: Count | None = None,
        seed: int = 0,
        stop: StopRule = "worst",
        attack_precision: Literal["fp32", "bf16"] = "fp32",
        check_every: Count = 1,
        save_examples: CountOrZero = 0,
    ) -> None:
        self.attacks, self.max_samples, self.seed = by_name(attacks or {}), max_samples, seed
        self.fit_attacks = self.attacks if fit_attacks is None else by_name(fit_attacks)
        self.fit_max_samples = fit_max_samples or max_samples
        self.stop, self.attack_precision = stop, attack_precision
        self.check_every, self.save_examples = check_every, save_examples
        for name in {**self.attacks, **self.fit_attacks}:
            if not TASK_NAME.fullmatch(name) or name in NOT_AN_ATTACK:
                raise ValueError(f"attack name must match [a-z0-9_]+ and be none of {NOT_AN_ATTACK}, got {name!r}")
        self._running: dict[str, Attack] = {}
        self._journal: Journal | None = None
        self._counts: dict[tuple[str, str], Top1] = {}
        self._seconds: dict[str, float] = {}
        self._start = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Chooses the stage's attacks; limits the sets, so that clean and attacked accuracy share their samples."""
        if str(trainer.precision).endswith("-true") and trainer.precision not in ("32-true", "64-true"):
            raise ValueError(
                f"verdicts are taken in fp32, which precision {trainer.precision} rules out; use bf16-mixed"
            )
        self._running = self.fit_attacks if stage == "fit" else self.attacks
        limit = self.fit_max_samples if stage == "fit" else self.max_samples
        if self._running:
            check_has_images(trainer, f"attacks, {', '.join(self._running)},")
        done = partial(self._done_samples, trainer, pl_module) if stage == "test" else None
        self._journal = None
        data_of(trainer).connect(limit=limit, done=done)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting, after what an earlier start of the same test has counted."""
        _, tasks = stage_of(trainer)
        keys = [(task.name, attack) for task in tasks for attack in self._running]
        self._counts = {key: Top1().to(pl_module.device) for key in keys}
        self._seconds = {task.name: 0.0 for task in tasks}
        if self._journal is not None:
            self._journal.check_images(trainer, partial(finished_batches, trainer))
            if trainer.is_global_zero:
                self._count_again(self._journal, method_of(pl_module))

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
        _, tasks = stage_of(trainer)
        task, method = tasks[dataloader_idx], method_of(pl_module)
        with torch.autocast(method.device.type, enabled=False), frozen(method):
            self._examine(trainer, method, batch, outputs, task)
        self._seconds[task.name] += perf_counter() - self._start

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs accuracies, seconds and what did not decode."""
        stage, tasks = stage_of(trainer)
        self._log_accuracies(pl_module, stage, tasks)
        left_out = data_of(trainer).bad_sample_counts
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

    def _examine(self, trainer: Trainer, method: RobustMethod, batch: Batch, logits: Tensor, task: Task) -> None:
        forward = partial(method.logits, task=task.name)
        options: dict[str, Any] = {
            "index": batch.index,
            "seed": self.seed,
            "stop": self.stop,
            "check_every": self.check_every,
            "cheap_forward": self._cheap(forward, method.device.type),
        }
        verdicts = {}
        for name, attack in self._running.items():
            if isinstance(trainer.progress_bar_callback, TaskProgress):
                trainer.progress_bar_callback.announce(f"{task.name} under {name}")
            members = attack.members(len(task.label_names))
            verdict = examine(batch.images, batch.labels, forward, members, clean_logits=logits, **options)
            self._counts[task.name, name].update(verdict.by == ROBUST)
            verdicts[name] = verdict
        if self._journal is not None:
            options["clip"] = method.clip
            rows = sample_rows(batch, logits, verdicts, self._journal.members, task.name, forward, options)
            self._journal.write(task.name, batch, rows, verdicts, seconds=perf_counter() - self._start)

    def _cheap(self, forward: Forward, device: str) -> Forward | None:
        if self.attack_precision == "fp32":
            return None

        def cheap_forward(images: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return forward(images)

        return cheap_forward

    def _done_samples(self, trainer: Trainer, module: LightningModule, task: str) -> frozenset[int]:
        """Samples that an earlier start has behind it. Lightning asks for loaders when weights are in place."""
        writer = next((each for each in trainer.callbacks if isinstance(each, ResultsWriter)), None)  # type: ignore[attr-defined]
        if writer is None:
            return frozenset()
        if self._journal is None:
            data = data_of(trainer)
            members = members_of(data.test_tasks, self._running)
            identity = describe(
                method_of(module),
                data,
                data.test_tasks,
                members,
                precision=self.attack_precision,
                stop=self.stop,
                seed=self.seed,
                save_examples=self.save_examples,
            )
            folder = writer.begin(trainer, identity, members)
            self._journal = Journal(folder, trainer, data.test_tasks, members, self.save_examples)
        return self._journal.done(task)

    def _count_again(self, journal: Journal, method: RobustMethod) -> None:
        for task, rows in journal.earlier.items():
            is_right = torch.tensor([row["clean"] == row["label"] for row in rows], dtype=torch.bool)
            method.count(task).update(is_right.to(method.device))
            self._seconds[task] += sum(float(row["seconds"]) for row in rows)
            for attack in self._running:
                is_robust = torch.tensor([not row[f"{attack}.by"] for row in rows], dtype=torch.bool)
                self._counts[task, attack].update(is_robust.to(method.device))

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


def method_of(module: LightningModule) -> RobustMethod:
    """The module as what it must be.

    Raises:
        TypeError: it is another.
    """
    if not isinstance(module, RobustMethod):
        raise TypeError(f"the callbacks need a RobustMethod, got {type(module).__name__}")
    return module


def finished_batches(trainer: Trainer, task: str) -> Iterator[Batch]:
    """Read this process's share of the samples that an earlier start of the test has finished, on the device.

    Args:
        trainer: of the running test.
        task: name of a test task.
    """
    loader = data_of(trainer).done_dataloader(task)
    for batch in () if loader is None else loader:
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def check_has_images(trainer: Trainer, who: str) -> None:
    """Refuses embeddings in place of images.

    Raises:
        ValueError: the stage's batches hold embeddings.
    """
    if data_of(trainer).feature_model is not None:
        remedy = "run none there, as by `fit_attacks: {}`, or set data.features to null"
        raise ValueError(f"{who} need images, and data.features gives embeddings in this stage; {remedy}")


def stage_of(trainer: Trainer) -> tuple[str, list[Task]]:
    """Prefix of the metrics and tasks of what runs now."""
    data = data_of(trainer)
    return ("test", data.test_tasks) if trainer.testing else ("val", data.val_tasks)
