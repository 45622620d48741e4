"""The base class of the methods: `RobustMethod` holds everything that they share."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from robustclip.arguments import Checked, Count, CountOrZero
from robustclip.attacks import Attack, cross_entropy
from robustclip.attacks.attack import Forward, Loss
from robustclip.defences import Defence
from robustclip.methods._shared import saved_state, step_checks
from robustclip.methods._shared.clean_accuracy import PREFIX
from robustclip.methods._shared.data_checks import check_data
from robustclip.methods._shared.evaluation_steps import EvaluationSteps
from robustclip.methods._shared.schedules import steps_of_run, warmup_cosine
from robustclip.methods._shared.weight_perturbation import AWP, WeightPerturbation
from robustclip.metrics import Top1
from robustclip.models.clip import CLIPModel
from robustclip.models.compilation import compile_towers
from robustclip.models.heads import encode_head, encode_heads, has_gradient, head_logits
from robustclip.models.layers import checkpoint_activations, frozen, train_only, trained_parameters
from robustclip.models.lora import LoRA, cached, factors_alone, inject
from robustclip.models.tf32 import tf32
from robustclip.models.weight_origin import read_origin
from robustclip.overrides import check_overrides, check_shape
from robustclip.types import Batch, Task, TrainingImages, data_of

PROBES_OF_TRAINING = 128  # training images that a checkpoint identifies by digests
TRAIN = "train"  # name of the task of the training classes
HOOKS = (  # functions that a method may override
    *("training_loss", "parameter_groups", "idle_parameters"),
    *("image_features", "grid_features", "class_features", "head", "logits"),
)
IMAGE_TOWER = "clip.net.visual."  # prefix of the names of its parameters


class RobustMethod(Checked, EvaluationSteps):
    """Base class of every method: zero-shot classifier, training attack, clean accuracy, optimiser and checkpoints.

    A method overrides `training_loss` and, where its paper differs, `parameter_groups`, `image_features` and
    `class_features`. The trainer's data module provides ``train_task``, ``val_tasks`` and ``test_tasks``.

    Args:
        arch: open_clip architecture; null when ``pretrained`` is a folder or repository.
        pretrained: open_clip tag, weights file, local-dir folder, ``hf-hub:ORG/NAME``, ``shapes``, or null (random).
        image_size: side of the image tower's input in pixels; null takes the model's own.
        has_fixed_batch_norm: keep the pre-trained BatchNorm statistics during training.
        has_activation_checkpointing: recompute the image tower's activations in backward passes, to save memory.
        compile: compile the blocks of both towers by `torch.compile`; checkpoints stay as they are.
        is_robust: whether the weights of ``pretrained`` are robust already, so that a test of them is no baseline; null
            reads it from the folder of ``robustclip export``, and else leaves it open.
        lora: train low-rank changes of the towers' matrices in place of the towers; null trains the towers.
        attack: training attack; null for methods that train on clean images.
        awp: adversarial weight perturbation around the training attack; null for none.
        optimizer: function that builds the optimiser from `parameter_groups()`.
        warmup_steps: optimiser steps of linear warm-up; 0 for none.
        schedule: ``cosine`` to 0 over the run after the warm-up, or ``constant``.
        defence: test-time defence, which evaluation puts before the model and attacks; null for none.

    Examples:
        >>> import torch
        >>> from robustclip import Batch, RobustMethod, Task
        >>> class Clean(RobustMethod):
        ...     '''Trains the image tower by the cross-entropy on clean images.'''
        ...
        ...     def training_loss(self, batch):
        ...         return {"ce": torch.nn.functional.cross_entropy(self.logits(batch.images), batch.labels)}
        >>> model = Clean(pretrained="shapes")
        >>> model.prepare_training(Task("colours", ("red", "blue"), ("a {} shape",)))
        >>> sorted(model.training_loss(Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2))))
        ['ce']
    """

    # Prefixes of the names of the tensors that the pre-trained model determines.
    pretrained_prefixes: tuple[str, ...] = ("clip.net.",)
    takes_unknown: bool = False  # whether the method also trains on images labelled UNKNOWN
    is_tower_frozen: bool = False  # whether both towers are always in eval mode
    takes_features: bool = False  # whether it accepts embeddings (B, D) of its frozen image tower instead of images
    # Constructor arguments that are objects, which would break weights_only loading.
    object_arguments: tuple[str, ...] = ("attack", "optimizer", "lora", "defence", "awp")
    # Constructor arguments that do not change the function of given weights. Each class lists its own; every argument
    # that no class lists is an inference setting. A checkpoint identifies arch and pretrained by the weights.
    training_arguments: tuple[str, ...] = (
        *("arch", "pretrained", "has_fixed_batch_norm", "has_activation_checkpointing", "compile", "is_robust"),
        *("attack", "optimizer", "warmup_steps", "schedule", "defence", "awp"),
    )

    def __init__(
        self,
        arch: str | None = None,
        pretrained: str | None = "shapes",
        image_size: Count | None = None,
        has_fixed_batch_norm: bool = True,
        has_activation_checkpointing: bool = False,
        compile: bool = False,
        is_robust: bool | None = None,
        lora: LoRA | None = None,
        attack: Attack | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        warmup_steps: CountOrZero = 0,
        schedule: Literal["cosine", "constant"] = "cosine",
        defence: Defence | None = None,
        awp: AWP | None = None,
    ) -> None:
        super().__init__()
        if attack is not None and attack.target is not None:
            raise ValueError(f"attack.target must be null in training, got {attack.target!r}; it is for evaluation")
        self.save_hyperparameters(ignore=self.object_arguments)
        self.has_attacked: bool | None = None  # whether `perturb` has run in training; None before training
        self.strict_loading = False  # checkpoints omit frozen weights; `on_load_checkpoint` compares the names instead
        self.attack, self.optimizer, self.warmup_steps, self.schedule = attack, optimizer, warmup_steps, schedule
        self.clip = CLIPModel(arch, pretrained, image_size, has_fixed_batch_norm)
        self.origin = read_origin(self.clip.folder)
        is_trained_so = None if self.origin is None else self.origin.training_attack is not None
        self.is_robust = is_trained_so if is_robust is None else is_robust
        if lora is not None:
            inject(self.clip.net, lora, is_compiled=compile)
        if has_activation_checkpointing:
            checkpoint_activations(self.clip.net.visual)
        if compile:
            compile_towers(self.clip)
        self.defence, self.lora, self.awp = defence, lora, None if awp is None else WeightPerturbation(awp, self)
        self.heads: dict[str, Tensor] = {}
        self.tasks: dict[str, Task] = {}  # those with a head, by name
        self.train_task: Task | None = None  # the training classes, where their head learns
        self._attacked_heads: dict[str, Tensor] | None = None  # constant heads, while an attack runs
        self.trained_on = TrainingImages() if self.origin is None else self.origin.trained_on  # with labels
        self.interpolation: dict[str, Any] | None = None  # the loaded checkpoint's mixture with the original model
        self.counts = nn.ModuleDict()
        self.run_settings: dict[str, Any] | None = None  # settings of `robustclip fit`; saved in its checkpoints
        self._watch = step_checks.DivergenceWatch()
        self._stepped: set[int] = set()  # ids of the optimisers whose first step was checked
        self._resumed: dict[str, list[dict[str, Any]]] = {}  # state of the processes of an interrupted run
        self._before_validation: dict[str, Any] = {}  # random state when validation began

    # Hooks that a method may override

    @abstractmethod
    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the named scalar terms of the loss, already weighted; their sum is minimised and each is logged."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the optimiser groups of the parameters to train (default: the image tower); the rest is frozen."""
        return [{"params": list(self.clip.net.visual.parameters())}]

    def idle_parameters(self) -> list[nn.Parameter]:
        """Returns the trained parameters that may have no gradient yet; all others must get one in the first step."""
        return []

    def image_features(self, images: Tensor) -> Tensor:
        """Encodes images ``(B, 3, H, W)`` in [0, 1] as unit features ``(B, D)``."""
        return self.clip.encode_image(images)

    def grid_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images and their P positions as unit features ``(B, D)`` and ``(B, P, D)``.

        A method that changes the features of images changes these in the same way.

        Raises:
            ValueError: the method does not, or the tower has no features of positions.
        """
        if type(self).image_features is not RobustMethod.image_features:
            raise ValueError(f"{type(self).__name__} has image_features but no grid_features, which gl_mcm needs")
        return self.clip.encode_grid(images)

    def class_features(self, task: Task) -> Tensor:
        """Returns unit features ``(C, D)``, one row per class of the task."""
        return self.clip.encode_classes(task)

    def head(self, task: str = TRAIN) -> Tensor:
        """Returns the classifier weights of a task, ``(C, D)``, or ``(C, G, D)`` for labels of up to G class names.

        The head of the training classes is encoded anew at every call, with gradients, if `class_features` depends on a
        trained parameter. All other heads are constants that `prepare` has encoded.

        Raises:
            ValueError: `prepare` was not called with the task.
        """
        if task == TRAIN and self.train_task is not None:
            return encode_head(self.class_features, self.train_task)
        if task not in self.heads:
            raise ValueError(
                f"{type(self).__name__} has no classifier for task {task!r}; call `prepare` with the task first"
            )
        return self.heads[task]

    # Members that a method may use

    @property
    def image_size(self) -> int:
        """Side of the square images that the image tower receives, in pixels."""
        return self.clip.image_size

    @property
    def inference_settings(self) -> dict[str, Any]:
        """Settings beside the tensors that define the evaluated function: saved, and compared at loading.

        They comprise the method's name, all plain constructor arguments that are not in `training_arguments`, and
        `CLIPModel.settings`. If the attribute of an argument's name was assigned later, its value is used.
        """
        return saved_state.inference_settings(self)

    def logits(self, images: Tensor, task: str = TRAIN) -> Tensor:
        """Computes the zero-shot logits ``(B, C)`` of images.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            task: name of the task, whose classifier `prepare` has built.
        """
        return head_logits(self.image_features(images), self._present_head(task), self.clip.logit_scale)

    def grid_logits(self, images: Tensor, task: str) -> Tensor:
        """Computes the zero-shot logits ``(B, 1 + P, C)`` of images, whose row 0 is `logits`, and of their positions.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            task: name of the task.

        Raises:
            ValueError: the method has other logits, or no features of positions.
        """
        if type(self).logits is not RobustMethod.logits:
            raise ValueError(f"{type(self).__name__} has logits of its own, and none of the positions of an image")
        (whole, local), head, scale = self.grid_features(images), self._present_head(task), self.clip.logit_scale
        of_local = head_logits(local.flatten(0, 1), head, scale)
        return torch.cat([head_logits(whole, head, scale)[:, None], of_local.view(*local.shape[:2], -1)], dim=1)

    def _present_head(self, task: str) -> Tensor:
        """Returns `head`; an attack, during which no parameter changes, calls it once."""
        if self._attacked_heads is None:
            return self.head(task)
        if task not in self._attacked_heads:
            with torch.no_grad():
                self._attacked_heads[task] = self.head(task)
        return self._attacked_heads[task]

    def answers(self, images: Tensor, task: str = "train", *, index: Tensor | None = None, draw: int = 0) -> Tensor:
        """Computes the logits ``(B, C)`` of the defence, or `logits` without one.

        Args:
            images: see `logits`.
            task: see `logits`.
            index: ``(B,)`` sample ids, which a random defence needs.
            draw: number of the draw of a random defence.
        """
        if self.defence is not None:
            return self.defence.answer(self, images, task, index=index, draw=draw)
        logits = self.logits(images, task)
        if task in self.heads:
            check_shape(self, "logits", logits, (len(images), len(self.heads[task])), "(B, C)")
        return logits

    def perturb(
        self,
        batch: Batch,
        task: str = TRAIN,
        loss: Loss = cross_entropy,
        *,
        forward: Forward | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Runs the training attack on a batch; returns adversarial images ``(B, 3, H, W)`` in [0, 1], without gradient.

        During the attack the model is frozen and in eval mode; every flag is restored afterwards. `logits` encodes the
        present `head` once per attack. The random start depends on the sample ids and the step alone.

        Args:
            batch: clean images with their labels and sample ids.
            task: name of the task whose zero-shot logits are attacked.
            loss: loss per sample, which the attack maximises.
            forward: function of the images that is attacked; default the zero-shot logits.
            targets: second argument of the loss, ``(B, ...)``; default the labels.

        Raises:
            ValueError: the method has no attack.
        """
        if self.attack is None:
            raise ValueError(f"{type(self).__name__} trains on attacked images; set model.attack")
        forward = forward or partial(self.logits, task=task)
        targets = batch.labels if targets is None else targets
        self._attacked_heads, self.has_attacked = {}, True
        try:
            with frozen(self), cached():  # no weight changes, so that LoRA's are computed once
                attack = partial(
                    self.attack, batch.images, forward, targets, loss, index=batch.index, seed=self.global_step
                )
                return attack() if self.awp is None else self.awp.attacked(attack)
        finally:
            self._attacked_heads = None

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Encodes each task's classes as zero-shot classifier weights, once, in fp32 and without gradients."""
        # Inference mode is left first: its tensors could not take part in an attack's graph.
        with torch.inference_mode(False), torch.no_grad(), frozen(self), tf32(is_allowed=False):
            self.heads |= encode_heads(self.class_features, tasks)
        self.tasks |= {task.name: task for task in tasks}

    def prepare_training(self, task: Task) -> None:
        """Encodes the training classes, as the task ``train``, for `training_loss`, unless their head learns."""
        task = replace(task, name=TRAIN)
        is_text_fixed = all(name.startswith(IMAGE_TOWER) for name in self.trained_names)
        self.train_task = None if is_text_fixed or not has_gradient(self.class_features, task) else task
        if self.train_task is None:
            self.prepare([task])

    def trained_groups(self) -> list[dict[str, Any]]:
        """Returns `parameter_groups`, of adapted towers with the factors of LoRA alone."""
        groups: list[dict[str, Any]] = factors_alone(self.clip.net, self.parameter_groups(), self.lora)
        return groups

    @property
    def trained_names(self) -> set[str]:
        """Names of the parameters to train, also while an attack has frozen them."""
        trained = {id(parameter) for parameter in trained_parameters(self, self.trained_groups())}
        return {name for name, parameter in self.named_parameters() if id(parameter) in trained}

    def freeze_untrained(self) -> list[nn.Parameter]:
        """Freezes everything but the parameters of `parameter_groups()`, and returns these."""
        trained = trained_parameters(self, self.trained_groups())
        train_only(self, trained)
        return trained

    def total(self, terms: dict[str, Tensor], batch: Batch) -> Tensor:
        """Checks and logs the terms of a training step's loss, and returns their sum.

        Args:
            terms: scalar terms that `training_loss` returned.
            batch: batch of the step.

        Raises:
            ValueError: a term is no scalar tensor, or is not finite (noticed some steps later on an accelerator).
        """
        step_checks.check_terms(terms, self)
        values = torch.stack(list(terms.values()))
        loss = values.sum()
        values_and_sum = torch.cat([values.detach(), loss.detach()[None]])
        if self._watch.note((*terms, "the sum of the terms"), values_and_sum, self.global_step):
            self._watch.check(self.trainer)
        logged = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(logged | {"train/loss": loss.detach()}, prog_bar=True, batch_size=len(batch.labels))
        return loss

    # Lightning

    def __getattr__(self, name: str) -> Any:
        """Returns a part of the module, whose tables the base's constructor makes.

        Raises:
            ValueError: a subclass's constructor has not called that of its base.
        """
        if name in ("_modules", "_parameters", "_buffers"):
            raise ValueError(f"{type(self).__name__}.__init__ must call super().__init__(**kwargs) first")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses a module or parameter that has the name of a method, by which it could not be read."""
        if isinstance(value, nn.Module | nn.Parameter) and callable(getattr(type(self), name, None)):
            raise ValueError(f"{name!r} is a method of {type(self).__name__}; give this part another name")
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Self:
        """Sets the training mode, except for frozen towers."""
        super().train(mode)
        if self.is_tower_frozen:
            self.clip.eval()
        return self

    def setup(self, stage: str) -> None:
        """Checks the subclass, freezes what is not trained, and makes an accuracy metric for each task."""
        check_overrides(self, RobustMethod, HOOKS)
        if self.defence is not None:
            check_overrides(self.defence, Defence, self.defence.overrides)
        if not self.freeze_untrained() and stage == "fit":
            raise ValueError(f"{type(self).__name__}.parameter_groups() has no parameter, so there is nothing to fit")
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin that the user chose is kept
            self.trainer.strategy.checkpoint_io = saved_state.RenamedCheckpointIO()
        if stage == "fit" and self.awp is not None:
            self.awp.check(self)
        data = data_of(self.trainer)
        check_data(self, data, stage)
        tasks = {"fit": data.val_tasks, "validate": data.val_tasks, "test": data.test_tasks}.get(stage, [])
        self.counts = nn.ModuleDict({f"{PREFIX}{task.name}": Top1() for task in tasks})

    def on_fit_start(self) -> None:
        """Builds the zero-shot classifier of the training classes, and remembers some images for later tests."""
        data = data_of(self.trainer)
        self.prepare_training(data.train_task)
        if self.global_rank == 0 and not self.takes_unknown:
            self.trained_on = self.trained_on.joined(data.training_images(PROBES_OF_TRAINING))

    def on_train_start(self) -> None:
        """Restores the random states, pending gradients and epoch position of an interrupted run."""
        saved_state.restore_run_state(self, self._resumed)
        self._resumed, self._stepped = {}, set()
        self.has_attacked = bool(self.has_attacked)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Checks before each optimiser's first step that all of its parameters have a gradient."""
        if id(optimizer) not in self._stepped and step_checks.check_gradients(self, optimizer, self.idle_parameters()):
            self._stepped.add(id(optimizer))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Checks that a method with manual optimisation steps its optimiser."""
        step_checks.check_manual_step(self, is_epoch_over=False)

    def on_train_epoch_end(self) -> None:
        """Checks at the epoch's end that a method with manual optimisation has stepped, and that its attack has run."""
        step_checks.check_manual_step(self, is_epoch_over=True)
        step_checks.check_attacked(self)

    def on_train_end(self) -> None:
        """Checks the loss and weights of the last steps, which no checkpoint may have followed."""
        self._check_is_finite()

    def _check_is_finite(self) -> None:
        self._watch.check(self.trainer)
        step_checks.check_weights(self, self.trained_groups())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the sum of the terms of `training_loss`, and logs them."""
        loss = partial(self.training_loss, batch)
        return self.total(loss() if self.awp is None else self.awp.loss(self, loss), batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs the backward pass, after which perturbed weights have their own values again."""
        with nullcontext() if self.awp is None else self.awp.restored():
            super().backward(loss, *args, **kwargs)

    def on_validation_start(self) -> None:
        """Stores the random state, which a checkpoint written during this validation saves."""
        self._before_validation = saved_state.random_state(self.device)

    def configure_optimizers(self) -> Any:
        """Builds the optimiser over `parameter_groups()` and its schedule, which is updated every step."""
        optimizer = self.optimizer(self.trained_groups())
        total = steps_of_run(self.trainer, self.schedule)
        scheduler = warmup_cosine(optimizer, warmup_steps=self.warmup_steps, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the trained parameters (or all, for random initial weights) and the state for an exact resume.

        Raises:
            ValueError: the loss or the weights are not finite; nothing is saved.
        """
        self._check_is_finite()
        saved_state.add_run_state(checkpoint, self, self._before_validation)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that does not belong to this model.

        Raises:
            ValueError: the architecture, the pre-trained weights or the inference settings differ, or parameters are
                missing or unknown.
        """
        self.freeze_untrained()
        settings, trained = self.inference_settings, self.trained_names
        saved_state.check_belongs(checkpoint, self, self.clip, settings=settings, trained=trained)
        self._resumed = {key: checkpoint.get(key, []) for key in saved_state.RESUMED}
        self.interpolation = checkpoint.get("interpolation")
        self.has_attacked = checkpoint.get(saved_state.ATTACKED)
        if saved_state.TRAINED_ON in checkpoint:
            self.trained_on = TrainingImages.read(checkpoint[saved_state.TRAINED_ON])
