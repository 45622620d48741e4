"""RobustMethod: what every method shares; a subclass adds what its paper adds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from robustclip.arguments import Checked, Count, CountOrZero
from robustclip.attacks import Attack, cross_entropy
from robustclip.attacks.attack import Forward, Loss
from robustclip.methods._shared.clean_accuracy import PREFIX, log_counts, synchronise_forwards
from robustclip.methods._shared.data_checks import check_intake
from robustclip.methods._shared.saved_state import (
    SETTINGS,
    RenamedCheckpointIO,
    check_belongs,
    identity,
    is_validation_due,
    on_rank_zero,
    pending_gradients,
    plain_values,
    random_state,
    set_random_state,
    settle_progress,
    settle_resumed_loop,
)
from robustclip.methods._shared.schedules import steps_of_run, warmup_cosine
from robustclip.methods._shared.step_checks import (
    DivergenceWatch,
    check_gradients,
    check_manual_step,
    check_terms,
    check_weights,
)
from robustclip.metrics import Top1
from robustclip.models.clip import CLIPModel
from robustclip.models.heads import encode_heads, head_logits
from robustclip.models.layers import checkpoint_activations, frozen, learn_only, learning_parameters
from robustclip.types import Batch, Task


class RobustMethod(Checked, LightningModule, ABC):
    """Base of every method: frozen zero-shot heads, the training attack, metrics, optimiser, checkpoints.

    A method overrides `training_loss` and, where its paper differs, `parameter_groups`, `image_features` and
    `class_features`. The trainer's data module gives ``train_task``, ``val_tasks`` and ``test_tasks``.

    Args:
        arch: open_clip architecture; null when ``pretrained`` is a folder.
        pretrained: open_clip tag, weights file, local-dir folder, ``shapes``, or null for random weights.
        image_size: side of the tower's input in pixels; null for the model's own.
        has_fixed_batch_norm: keep BatchNorm statistics as pre-trained while fitting.
        has_activation_checkpointing: recompute the image tower's activations in backward passes, to save memory.
        attack: training attack; null for methods that train on clean images.
        optimizer: called with `parameter_groups()`.
        warmup_steps: steps of linear warm-up; 0 for none.
        schedule: ``cosine`` to 0 over the run after the warm-up, or ``constant``.
    """

    of_original: tuple[str, ...] = ("clip.net.",)  # so begin the names of tensors that the pre-trained model determines
    takes_unknown: bool = False  # trains on images that are labelled UNKNOWN too
    takes_features: bool = False  # takes embeddings (B, D) of its frozen tower in place of images
    # Constructor arguments that do not change the function of given weights. A class lists its own; every argument
    # that no class lists is an inference setting. A checkpoint identifies arch and pretrained by the weights.
    of_training: tuple[str, ...] = (
        *("arch", "pretrained", "has_fixed_batch_norm", "has_activation_checkpointing"),
        *("attack", "optimizer", "warmup_steps", "schedule"),
    )

    def __init__(
        self,
        arch: str | None = None,
        pretrained: str | None = "shapes",
        image_size: Count | None = None,
        has_fixed_batch_norm: bool = True,
        has_activation_checkpointing: bool = False,
        attack: Attack | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        warmup_steps: CountOrZero = 0,
        schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["attack", "optimizer"])  # objects would break weights_only loading
        self.strict_loading = False  # frozen weights are not in our checkpoints; `on_load_checkpoint` checks instead
        self.attack, self.optimizer, self.warmup_steps, self.schedule = attack, optimizer, warmup_steps, schedule
        self.clip = CLIPModel(arch, pretrained, image_size, has_fixed_batch_norm)
        if has_activation_checkpointing:
            checkpoint_activations(self.clip.net.visual)
        self.heads: dict[str, Tensor] = {}
        self.interpolation: dict[str, Any] | None = None  # of the loaded checkpoint, with the original model
        self.counts = nn.ModuleDict()
        self.run_settings: dict[str, Any] | None = None  # of `robustclip fit`; saved in its checkpoints
        self._random_states: list[dict[str, Any]] = []
        self._watch = DivergenceWatch()
        self._stepped: set[int] = set()  # optimisers whose first step was looked at
        self._pending_gradients: list[dict[str, Tensor]] = []
        self._before_validation: dict[str, Any] = {}  # random state

    # What a method overrides

    @abstractmethod
    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; their sum is minimised and each is logged."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, as optimiser groups; everything else is frozen. Default: the image tower."""
        return [{"params": list(self.clip.net.visual.parameters())}]

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters of the groups that need no gradient yet; all others must get one in the first step."""
        return []

    def image_features(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to unit features ``(B, D)``."""
        return self.clip.encode_image(images)

    def class_features(self, task: Task) -> Tensor:
        """Unit features ``(C, D)``, one row per class of the task."""
        return self.clip.encode_classes(task)

    # What a method uses

    @property
    def image_size(self) -> int:
        """Side of the square images that the tower sees, in pixels."""
        return self.clip.image_size

    @property
    def inference_settings(self) -> dict[str, Any]:
        """Values beside the tensors that define the evaluated function: saved, and compared at loading.

        These are the method's name, all plain constructor arguments that are not in `of_training`, and
        `CLIPModel.settings`. A value that was assigned later to the attribute of that name counts.
        """
        listed = {name for cls in type(self).__mro__ for name in vars(cls).get("of_training", ())}
        names = [name for name in self.hparams if name not in listed and not name.startswith("_")]
        passed = plain_values({name: self.hparams[name] for name in names})
        assigned = plain_values({name: vars(self)[name] for name in names if name in vars(self)})
        return {"method": type(self).__name__, **passed, **assigned, **self.clip.settings}

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        """Zero-shot logits ``(B, C)`` of images ``(B, 3, H, W)`` in [0, 1], for a task whose head was built."""
        return head_logits(self.image_features(images), self.heads[task], self.clip.logit_scale)

    def perturb(
        self,
        batch: Batch,
        task: str = "train",
        loss: Loss = cross_entropy,
        *,
        forward: Forward | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """The batch's images under the training attack, ``(B, 3, H, W)`` in [0, 1], without gradient.

        The model is frozen and in eval mode meanwhile and every flag is put back. The random start is a function of
        the sample ids and the step.

        Args:
            batch: of clean images.
            task: whose zero-shot logits are attacked.
            loss: per sample, to maximise.
            forward: what is attacked instead of the zero-shot logits.
            targets: second argument of the loss, ``(B, ...)``; default the labels.

        Raises:
            ValueError: the method has no attack.
        """
        if self.attack is None:
            raise ValueError(f"{type(self).__name__} trains on attacked images; set model.attack")
        forward = forward or partial(self.logits, task=task)
        targets = batch.labels if targets is None else targets
        with frozen(self):
            return self.attack(batch.images, forward, targets, loss, index=batch.index, seed=self.global_step)

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Encodes each task's classes into its zero-shot head, once and without gradients."""
        # Outside inference mode, whose tensors could not take part in an attack's graph.
        with torch.inference_mode(False), torch.no_grad(), frozen(self):
            self.heads |= encode_heads(self.class_features, tasks)

    def prepare_training(self, task: Task) -> None:
        """Encodes what `training_loss` compares images with: the head ``train``."""
        self.prepare([replace(task, name="train")])

    @property
    def learning_names(self) -> set[str]:
        """Names of the parameters that learn, whether or not an attack has frozen them at this moment."""
        learning = {id(parameter) for parameter in learning_parameters(self, self.parameter_groups())}
        return {name for name, parameter in self.named_parameters() if id(parameter) in learning}

    def freeze_the_rest(self) -> list[nn.Parameter]:
        """Leaves gradients to `parameter_groups()` alone, and returns its parameters."""
        learning = learning_parameters(self, self.parameter_groups())
        learn_only(self, learning)
        return learning

    def total(self, terms: dict[str, Tensor], batch: Batch) -> Tensor:
        """Checks, logs and sums the terms of a training step's loss.

        Args:
            terms: of `training_loss`.
            batch: of the step.

        Raises:
            ValueError: a term that is no scalar tensor, or, on an accelerator some steps later, one that is not finite.
        """
        check_terms(terms, self)
        values = torch.stack(list(terms.values()))
        loss = values.sum()
        noted = torch.cat([values.detach(), loss.detach()[None]])
        if self._watch.note((*terms, "the sum of the terms"), noted, self.global_step):
            self._watch.check(self.trainer)
        logged = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(logged | {"train/loss": loss.detach()}, prog_bar=True, batch_size=len(batch.labels))
        return loss

    # Lightning

    def setup(self, stage: str) -> None:
        """Freezes what does not learn, and makes one count per task."""
        if not self.freeze_the_rest() and stage == "fit":
            raise ValueError(f"{type(self).__name__}.parameter_groups() has no parameter, so there is nothing to fit")
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a person's own choice stays
            self.trainer.strategy.checkpoint_io = RenamedCheckpointIO()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        check_intake(self, data, stage)
        tasks = {"fit": data.val_tasks, "validate": data.val_tasks, "test": data.test_tasks}.get(stage, [])
        self.counts = nn.ModuleDict({f"{PREFIX}{task.name}": Top1() for task in tasks})

    def on_fit_start(self) -> None:
        """Builds the training head."""
        self.prepare_training(self.trainer.datamodule.train_task)  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        """Continues the random streams, the accumulation window and the epoch of an interrupted run."""
        if self.global_rank < len(self._random_states):
            set_random_state(self._random_states[self.global_rank], self.device)
        if self.global_rank < len(self._pending_gradients):
            for name, gradient in self._pending_gradients[self.global_rank].items():
                self.get_parameter(name).grad = gradient.to(self.device)
        self._random_states, self._pending_gradients, self._stepped = [], [], set()
        settle_resumed_loop(self.trainer.fit_loop)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Checks before each optimiser's first step that all of its parameters learn."""
        if id(optimizer) not in self._stepped and check_gradients(self, optimizer, self.idle_parameters()):
            self._stepped.add(id(optimizer))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Checks that manual optimisation optimises."""
        check_manual_step(self, is_epoch_over=False)

    def on_train_epoch_end(self) -> None:
        """Checks that manual optimisation optimises."""
        check_manual_step(self, is_epoch_over=True)

    def on_train_end(self) -> None:
        """Checks the last steps, which no checkpoint may have followed."""
        self._check_is_finite()

    def _check_is_finite(self) -> None:
        self._watch.check(self.trainer)
        check_weights(self, self.parameter_groups())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sums and logs the terms of `training_loss`."""
        return self.total(self.training_loss(batch), batch)

    def on_validation_start(self) -> None:
        """Keeps the random state, to which a checkpoint inside this validation returns."""
        self._before_validation = random_state(self.device)

    def on_validation_epoch_start(self) -> None:
        """Builds the heads anew, since the text side may have learnt."""
        synchronise_forwards(self, is_on=False)
        self.prepare(self.trainer.datamodule.val_tasks)  # type: ignore[attr-defined]

    def on_test_epoch_start(self) -> None:
        """Builds the heads."""
        self.prepare(self.trainer.datamodule.test_tasks)  # type: ignore[attr-defined]

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Counts and returns clean logits ``(B, C)``."""
        return self._evaluate(batch, self.trainer.datamodule.val_tasks[dataloader_idx])  # type: ignore[attr-defined]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Counts and returns clean logits ``(B, C)``."""
        return self._evaluate(batch, self.trainer.datamodule.test_tasks[dataloader_idx])  # type: ignore[attr-defined]

    def _evaluate(self, batch: Batch, task: Task) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # verdicts are fp32, in any precision of the trainer
            logits = self.logits(batch.images, task.name)
        if (key := f"{PREFIX}{task.name}") in self.counts:  # empty where a `RobustEvaluation` counts
            cast(Top1, self.counts[key]).update(logits.argmax(-1) == batch.labels)
        return logits

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/<task>/clean/...``."""
        log_counts(self, self.counts, "val")
        synchronise_forwards(self, is_on=True)

    def on_test_epoch_end(self) -> None:
        """Logs ``test/<task>/clean/...``."""
        log_counts(self, self.counts, "test")

    def configure_optimizers(self) -> Any:
        """The optimiser over `parameter_groups()` and its schedule per step."""
        optimizer = self.optimizer(self.parameter_groups())
        total = steps_of_run(self.trainer, self.schedule)
        scheduler = warmup_cosine(optimizer, warmup_steps=self.warmup_steps, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps all that learns (or all, for random initial weights) and all that an exact resume needs.

        Raises:
            ValueError: the loss or the weights are not finite, so that nothing is saved.
        """
        self._check_is_finite()
        if self.run_settings is not None:
            checkpoint["settings"] = self.run_settings
        if self.clip.pretrained is not None:
            frozen = {name for name, _ in self.named_parameters()} - self.learning_names
            weights = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {name: tensor for name, tensor in weights if name not in frozen}
        checkpoint["base_model"] = identity(self.clip)
        checkpoint[SETTINGS] = self.inference_settings
        is_inside = self.trainer.validating and is_validation_due(self.trainer)
        state, world_size = self._before_validation if is_inside else random_state(self.device), self.trainer.world_size
        checkpoint["random_states"] = on_rank_zero(state, world_size)
        if self.trainer.state.fn == TrainerFn.FITTING:
            settle_progress(checkpoint["loops"]["fit_loop"], self.trainer)
            checkpoint["pending_gradients"] = on_rank_zero(pending_gradients(self, self.trainer), world_size)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that does not belong to this model.

        Raises:
            ValueError: another architecture, other pre-trained weights or inference settings, missing or unknown
                parameters.
        """
        self.freeze_the_rest()
        check_belongs(checkpoint, self, self.clip, settings=self.inference_settings, learning=self.learning_names)
        self._random_states = checkpoint.get("random_states", [])
        self._pending_gradients = checkpoint.get("pending_gradients", [])
        self.interpolation = checkpoint.get("interpolation")
