"""The accuracy of a method on every task, with and without attacks."""

from functools import partial
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from robustclip.arguments import Count, CountOrZero, checked
from robustclip.attacks import Attack, Member
from robustclip.attacks.recipes import Attacks, by_name
from robustclip.evaluation.engine import StopRule, Verdict, examine
from robustclip.evaluation.identity import aims_of, describe, members_of
from robustclip.evaluation.journal import Examples, Journal, Row, sample_rows
from robustclip.evaluation.precision_ladder import AttackPrecision, description, exact, ladder, rungs
from robustclip.evaluation.probe_queue import ProbeQueue
from robustclip.evaluation.probes import QUOTA
from robustclip.evaluation.shards import check_share
from robustclip.evaluation.task_callback import (
    TaskCallback,
    announce,
    check_has_images,
    finished_batches,
    method_of,
    stage_of,
)
from robustclip.evaluation.ways import Ways, add_columns, clean_answers, columns_of, examine_defended, members_through
from robustclip.evaluation.writer import share_of, writer_of
from robustclip.methods import RobustMethod
from robustclip.models.layers import frozen
from robustclip.models.tf32 import tf32
from robustclip.names import TASK_NAME
from robustclip.results import ledger
from robustclip.results.run import EXAMPLES
from robustclip.results.summary import accuracies, scalars
from robustclip.results.tables import NOT_A_TASK
from robustclip.types import Batch, Task, data_of

# Keys that stand beside the attacks in parts of a result.
RESERVED = ("clean", "n", "seconds", "bad_samples", "images_of", "cost", "tasks")


@checked
class RobustEvaluation(TaskCallback):
    """Runs every attack on the samples of every validation and test task.

    Logs ``<stage>/<task>/<attack>/acc1`` and ``/correct``, ``<stage>/mean/<attack>/acc1`` and seconds per task. With a
    `ResultsWriter`, a test keeps a ledger of every sample, and an interrupted test resumes.

    Args:
        attacks: name to attack, or the names of recipes, such as ``pgd10``; none measures clean accuracy alone.
        max_samples: number of fixed samples of each task, clean and attacked; null for all.
        fit_attacks: attacks of the validations during ``fit``; null for ``attacks``.
        fit_max_samples: number of samples of these validations; null for ``max_samples``.
        seed: seed of the attacks' random numbers.
        stop: ``worst``: a sample is robust if it is classified correctly without attack and on every image that the
            attack evaluates; misclassified samples are not attacked further. ``last``: only the attack's last image
            counts, as in the papers.
        attack_precision: lowest precision of the attacks. ``bf16`` attacks in bfloat16 first, then robust samples again
            in TF32, then in fp32; ``tf32`` leaves out the first. TF32 is skipped on other devices than GPUs. Every
            verdict is fp32. Under ``stop`` ``last``, attacks run in the lowest precision alone.
        check_every: evaluations between two checks for misclassified samples; more suits devices with slow transfers.
        save_examples: number of misclassified attacked images to keep per task and attack.
        ways: how a method with a test-time defence (``model.defence``) is attacked.
        probes: number of samples per task, chosen by id, on which a test with a `ResultsWriter` measures for its audit;
            each costs about as much as 150 gradients of an attack. 0 for none.

    Raises:
        ValueError: an attack name that could not be a key of the results, or a number out of range.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from robustclip import PGD, CLIPDataModule, RobustEvaluation, ZeroShot
        >>> evaluation = RobustEvaluation({"pgd": PGD("5/255", alpha="2/255", steps=3)}, max_samples=8)
        >>> trainer = Trainer(accelerator="cpu", callbacks=[evaluation], logger=False, enable_progress_bar=False)
        >>> (metrics,) = trainer.test(ZeroShot(), CLIPDataModule(test="shapes:colours", image_size=32), verbose=False)
        >>> metrics["test/mean/pgd/acc1"] < metrics["test/mean/clean/acc1"]
        True
    """

    def __init__(
        self,
        attacks: Attacks | None = None,
        max_samples: Count | None = None,
        fit_attacks: Attacks | None = None,
        fit_max_samples: Count | None = None,
        seed: int = 0,
        stop: StopRule = "worst",
        attack_precision: AttackPrecision = "fp32",
        check_every: Count = 1,
        save_examples: CountOrZero = 0,
        ways: Ways = Ways(),
        probes: CountOrZero = QUOTA,
    ) -> None:
        self.attacks, self.max_samples, self.seed = by_name(attacks or {}), max_samples, seed
        self.fit_attacks = self.attacks if fit_attacks is None else by_name(fit_attacks)
        self.fit_max_samples = fit_max_samples or max_samples
        self.stop, self.attack_precision = stop, attack_precision
        self.check_every, self.save_examples, self.ways, self.probes = check_every, save_examples, ways, probes
        for name in {**self.attacks, **self.fit_attacks}:
            if not TASK_NAME.fullmatch(name) or name in RESERVED:
                raise ValueError(f"attack name must match [a-z0-9_]+ and be none of {RESERVED}, got {name!r}")
        self._running: dict[str, Attack] = {}
        self._members: dict[tuple[str, str], list[Member]] = {}
        self._through: dict[tuple[str, str], list[Member]] = {}  # once per way through a defence, else as above
        self._journal: Journal | None = None
        self._examples: Examples | None = None
        self._queue: ProbeQueue | None = None  # samples that wait for their probes; None without a folder
        self._start = self._spent = 0.0  # start of the batch; seconds that no row has yet

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Chooses the stage's attacks, and limits the data sets, so that clean and attacked accuracy share samples."""
        if str(trainer.precision).endswith("-true") and trainer.precision not in ("32-true", "64-true"):
            raise ValueError(
                f"verdicts are taken in fp32, which precision {trainer.precision} rules out; use bf16-mixed"
            )
        self._running = self.fit_attacks if stage == "fit" else self.attacks
        limit = self.fit_max_samples if stage == "fit" else self.max_samples
        if self._running:
            check_has_images(trainer, f"attacks, {', '.join(self._running)},")
        if self.attack_precision != "fp32" and method_of(pl_module).defence is not None:
            raise ValueError(
                f"evaluation.attack_precision must be fp32 for a model.defence, got {self.attack_precision}"
            )
        self._journal = self._examples = self._queue = None
        # A function, since the weights that identify the test are in place only when the loaders are made.
        done = (lambda task: self._opened(trainer, pl_module).done(task)) if stage == "test" else None
        share = share_of(trainer) if stage == "test" else None
        options = {} if share is None else {"share": check_share(trainer, share)}
        data_of(trainer).connect(limit=limit, done=done, **options)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the ledgers, if the data module has not done so when it made its loaders."""
        self._opened(trainer, pl_module)

    def begin(self, trainer: Trainer, method: RobustMethod) -> None:
        """Checks the finished samples of a resumed test; a validation starts without any."""
        if not trainer.testing:
            self._journal = None
        journal = self._opened(trainer, method)
        journal.check_images(partial(finished_batches, trainer))
        method.counts.clear()  # the ledgers count clean answers too

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Starts the clock of a batch."""
        self._start = perf_counter()

    on_validation_batch_start = on_test_batch_start

    def see(self, trainer: Trainer, method: RobustMethod, task: Task, batch: Batch, logits: Any) -> None:
        """Attacks the images of a batch and stores its rows."""
        journal = self._opened(trainer, method)
        if not journal.is_finished(task.name, batch):
            with torch.autocast(method.device.type, enabled=False), frozen(method):
                self._examine(trainer, method, journal, batch, logits, task)

    def end(self, trainer: Trainer, method: RobustMethod) -> None:
        """Logs accuracies and seconds from the ledgers, and the number of images that did not decode.

        A shard logs nothing, since its numbers are not those of the test.
        """
        stage, tasks = stage_of(trainer)
        journal, strategy, left_out = self._opened(trainer, method), trainer.strategy, {}
        if self._queue is not None:
            with torch.autocast(method.device.type, enabled=False), frozen(method):
                for name, rows in self._queue.finish().items():
                    self._append(trainer, journal, name, rows)
        for task in tasks:
            here = data_of(trainer).bad_sample_counts.get(task.name, 0)
            total = strategy.reduce(torch.tensor(here, device=strategy.root_device), reduce_op="sum")
            left_out[task.name] = int(total)
        writer = writer_of(trainer) if trainer.testing else None
        if writer is not None:
            writer.bad_samples = left_out
            if writer.share is not None:
                return
        names = {
            task.name: {name: [member.name for member in self._through[task.name, name]] for name in self._running}
            for task in tasks
        }
        ledgers = {task.name: journal.rows(task.name) for task in tasks}
        table = accuracies(ledgers, names, left_out, aims_of(self._members))
        for name, value in scalars(table).items():
            is_shown = stage == "val" and name.endswith("/acc1") and not name.startswith(f"{NOT_A_TASK}/")
            method.log(f"{stage}/{name}", value, prog_bar=is_shown)
        if writer is not None:
            writer.outputs |= {f"test/{name}" for name in scalars(table)}

    def _examine(
        self, trainer: Trainer, method: RobustMethod, journal: Journal, batch: Batch, logits: Tensor, task: Task
    ) -> None:
        if method.defence is None:
            verdicts = self._attacked(trainer, method, batch, logits, task)
            rows = sample_rows(batch, logits, verdicts, self._members, task.name)
        else:
            with tf32(is_allowed=False):
                verdicts, rows, logits = self._attacked_through(trainer, method, batch, task)
        # Images before rows, so that no row lacks its image after a kill.
        if self._examples is not None:
            for name, verdict in verdicts.items():
                self._examples.add(task.name, name, batch, rows, verdict)
        if self._queue is not None:
            rows = self._queue.add(task.name, batch, logits, verdicts, rows)
        self._append(trainer, journal, task.name, rows)

    def _append(self, trainer: Trainer, journal: Journal, task: str, rows: list[Row]) -> None:
        """Writes rows with the time of the batch, and that of batches whose rows were all held back."""
        self._start, start = perf_counter(), self._start
        self._spent += self._start - start
        if rows:
            # The processes share the time, so that the sum over all rows is the time of the task.
            share, self._spent = self._spent / len(rows) / trainer.world_size, 0.0
            journal.append(task, [{**row, ledger.TIME_COLUMN: f"{share:.6f}"} for row in rows])

    def _attacked(
        self, trainer: Trainer, method: RobustMethod, batch: Batch, logits: Tensor, task: Task
    ) -> dict[str, Verdict]:
        """Runs every attack on a method without a defence."""
        forward, device = partial(method.logits, task=task.name), method.device.type
        cheaper = ladder(forward, rungs(self.attack_precision, device, self.stop), device)
        options = {**self._options(batch), "cheaper": cheaper, "clean_logits": logits}
        verdicts = {}
        for name in self._running:
            announce(trainer, f"{task.name} under {name}")
            members = self._members[task.name, name]
            verdicts[name] = examine(batch.images, batch.labels, exact(forward), members, **options)
        return verdicts

    def _attacked_through(
        self, trainer: Trainer, method: RobustMethod, batch: Batch, task: Task
    ) -> tuple[dict[str, Verdict], list[Row], Tensor]:
        """Runs every attack without the defence and in all ways through it; returns verdicts, rows, answers."""
        with torch.inference_mode(False), torch.no_grad():
            clean = clean_answers(method, task.name, batch, self.ways)
        defended, keys = {}, {name: (task.name, name) for name in self._running}
        for name in self._running:
            announce(trainer, f"{task.name} under {name}")
            options = {**self._options(batch), "clean_logits": clean.logits}
            members = self._members[keys[name]]
            defended[name] = examine_defended(
                method, task.name, batch.images, batch.labels, members, self.ways, **options
            )
        verdicts = {name: verdict.adaptive for name, verdict in defended.items()}
        rows = sample_rows(batch, clean.logits, verdicts, self._through, task.name)
        add_columns(rows, clean.columns)
        for name, verdict in defended.items():
            columns = columns_of(verdict, self._members[keys[name]], self._through[keys[name]])
            add_columns(rows, {f"{name}.{column}": values for column, values in columns.items()})
        return verdicts, rows, clean.logits

    def _options(self, batch: Batch) -> dict[str, Any]:
        return {"index": batch.index, "seed": self.seed, "stop": self.stop, "check_every": self.check_every}

    def _opened(self, trainer: Trainer, module: LightningModule) -> Journal:
        """Opens the ledgers of the running test or validation at the first call; all processes must call it."""
        if self._journal is None:
            stage, tasks = stage_of(trainer)
            writer = writer_of(trainer) if stage == "test" else None
            self._members = self._through = members_of(tasks, self._running)
            if (defence := method_of(module).defence) is not None:
                self._through = {
                    key: members_through(defence, members, self.ways) for key, members in self._members.items()
                }
            if writer is None:
                attacks = [f"{name}.{column}" for name in self._running for column in ("by", "prediction")]
                columns = ["id", "label", "clean", *attacks, ledger.TIME_COLUMN]
                self._journal = Journal(trainer, {task.name: columns for task in tasks})
                return self._journal
            identity = describe(
                method_of(module),
                data_of(trainer),
                tasks,
                self._members,
                precision=description(self.attack_precision, module.device.type, self.stop),
                stop=self.stop,
                seed=self.seed,
                save_examples=self.save_examples,
                ways=self.ways,
            )
            self._journal = writer.begin(trainer, identity, self._through)
            folder = writer.opened / EXAMPLES
            self._examples = Examples(folder, self._through, self.save_examples, self._journal.earlier)
            sizes = {task.name: data_of(trainer).test_size(task.name) for task in tasks}
            limits: dict[str, Any] = {"sizes": sizes, "quota": self.probes, "seed": self.seed, "stop": self.stop}
            self._queue = ProbeQueue(method_of(module), tasks, self._through, ways=self.ways, **limits)
        return self._journal
