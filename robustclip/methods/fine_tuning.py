"""Fine-tuning of a classifier that starts as the zero-shot classifier, for the baselines that train without text."""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.arguments import CountOrZero, NonNegative
from robustclip.methods._shared.saved_state import saved_classes
from robustclip.methods.base import RobustMethod
from robustclip.models.heads import head_logits
from robustclip.models.layers import frozen
from robustclip.models.teacher import ImageTeacher
from robustclip.objectives.losses import kl
from robustclip.types import Batch, Task, data_of


class FineTuning(RobustMethod):
    """Linear probing, end-to-end fine-tuning, LP-FT, L2-SP and LwF, by cross-entropy on clean images.

    Minimises the loss below over a classifier ``W`` and the image tower ``f``. ``W`` starts at ``s t``, the class
    features times the logit scale (Wortsman et al., CVPR 2022, https://arxiv.org/abs/2109.01903), and ``f`` at its
    pre-trained weights ``theta_0``::

        -log softmax(W f(x))_y + (l2_sp / 2) ||theta - theta_0||^2 + lwf KL(softmax(s t f_0(x)) || softmax(W f(x)))

    - end-to-end fine-tuning: both are trained from the start, ``probe_epochs: 0``;
    - linear probing: the classifier alone, ``probe_epochs: null``; it can use ``data.features``;
    - LP-FT (Kumar et al., ICLR 2022, https://arxiv.org/abs/2202.10054): the classifier alone at first, then both;
    - L2-SP (Li et al., ICML 2018, https://arxiv.org/abs/1802.01483): ``l2_sp`` above 0, the optimiser's weight decay 0;
    - LwF (Li and Hoiem, ECCV 2016, https://arxiv.org/abs/1606.09282): ``lwf`` above 0.

    The classifier is used for every task with the training classes; other tasks use zero-shot classifiers of the text
    tower, which is frozen. `robustclip interpolate` reads the original classifier, ``s t``, from the checkpoint, as
    WiSE-FT does.

    Departures: the classifier has no bias, unlike WiSE-FT's code; LP-FT is one run with one schedule; LwF preserves the
    zero-shot model's predictions for the training classes at temperature 1, since there is no older classifier.

    Args:
        probe_epochs: epochs in which the classifier alone is trained and the tower is in eval mode, without gradients
            or weight decay; several processes then need the strategy ``ddp_find_unused_parameters_true``. Null for all
            epochs.
        l2_sp: weight of the squared distance from the pre-trained tower.
        lwf: weight of the KL divergence from the zero-shot model's predictions.
        head_lr: learning rate of the classifier; null for the optimiser's.
        optimizer: default of WiSE-FT.
        warmup_steps: steps of linear warm-up before the cosine; default of WiSE-FT.
        kwargs: arguments of `RobustMethod`.

    Raises:
        ValueError: a number is negative, or a regulariser has no trained tower or no pre-trained weights.
    """

    training_arguments: tuple[str, ...] = ("probe_epochs", "l2_sp", "lwf", "head_lr")
    pretrained_prefixes = ("clip.net.", "classifier", "zero_shot_head")
    classifier: nn.Parameter | None
    zero_shot_head: Tensor | None

    def __init__(
        self,
        probe_epochs: CountOrZero | None = 0,
        l2_sp: NonNegative = 0.0,
        lwf: NonNegative = 0.0,
        head_lr: NonNegative | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-5, weight_decay=0.1),
        warmup_steps: CountOrZero = 500,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, warmup_steps=warmup_steps, **kwargs)
        if l2_sp and probe_epochs is None:
            raise ValueError(f"l2_sp must be 0 where probe_epochs is null, got {l2_sp}: the tower is not trained")
        if l2_sp and self.lora is not None:
            raise ValueError(f"l2_sp must be 0 where lora is set, got {l2_sp}: the weights themselves are not trained")
        self.probe_epochs, self.l2_sp, self.lwf, self.head_lr = probe_epochs, l2_sp, lwf, head_lr
        self.teacher = ImageTeacher(self.clip) if l2_sp or lwf else None
        self.takes_features = probe_epochs is None and not lwf
        self.class_names: tuple[str, ...] = ()
        self.register_parameter("classifier", None)  # until a fit or a checkpoint defines the classes
        self.register_buffer("zero_shot_head", None)
        self._is_empty = False

    @property
    def is_probing(self) -> bool:
        """Whether the classifier alone is trained in this epoch."""
        return self.probe_epochs is None or self.current_epoch < self.probe_epochs

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the image tower, unless it only extracts features, and the classifier."""
        groups = [] if self.probe_epochs is None else super().parameter_groups()
        if self.classifier is not None:
            groups.append({"params": [self.classifier]} | ({} if self.head_lr is None else {"lr": self.head_lr}))
        return groups

    def idle_parameters(self) -> list[nn.Parameter]:
        """Returns the image tower, while the classifier alone is trained."""
        return list(self.clip.net.visual.parameters()) if self.is_probing else []

    def image_features(self, images: Tensor) -> Tensor:
        """Encodes images ``(B, 3, H, W)`` in [0, 1], or embeddings ``(B, D)`` in linear probing, as unit features."""
        return F.normalize(images, dim=-1) if images.ndim == 2 else super().image_features(images)

    def grid_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images and their positions as unit features ``(B, D)`` and ``(B, P, D)``."""
        return self.clip.encode_grid(images)

    def class_features(self, task: Task) -> Tensor:
        """Returns ``W / s`` ``(C, D)``, not of unit length, for the training classes; unit text features for others."""
        if self.classifier is None or task.class_names != self.class_names:
            return super().class_features(task)
        return self.classifier / self.clip.logit_scale

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy of the classifier and the regularisers L2-SP and LwF."""
        logits = self.training_logits(batch.images)
        terms = {"clean_ce": F.cross_entropy(logits, batch.labels)}
        if self.teacher is not None and self.l2_sp and not self.is_probing:
            pairs = zip(self.clip.net.visual.parameters(), self.teacher.clip.net.visual.parameters(), strict=True)
            terms["l2_sp"] = self.l2_sp / 2 * torch.stack([(now - then).square().sum() for now, then in pairs]).sum()
        if self.teacher is not None and self.zero_shot_head is not None and self.lwf:
            predictions = head_logits(F.normalize(self.teacher(batch.images), dim=-1), self.zero_shot_head)
            terms["lwf"] = self.lwf * kl(logits, predictions).mean()
        return terms

    def training_logits(self, images: Tensor) -> Tensor:
        """Computes the classifier's logits ``(B, C)`` of images ``(B, 3, H, W)`` in [0, 1], in fp32.

        Raises:
            ValueError: there is no classifier yet.
        """
        if self.classifier is None:
            raise ValueError("FineTuning has no classifier before its first fit; load a checkpoint")
        with frozen(self.clip) if self.is_probing else nullcontext():
            features = self.image_features(images)
        return head_logits(features, self.classifier)

    def add_classifier(self, class_names: tuple[str, ...], zero_shot_head: Tensor) -> None:
        """Creates a classifier that starts as the zero-shot classifier.

        Args:
            class_names: names of the ``C`` classes.
            zero_shot_head: ``s t``, ``(C, D)``.
        """
        self.class_names = class_names
        self.classifier, self.zero_shot_head = nn.Parameter(zero_shot_head.clone()), zero_shot_head

    # Lightning

    def setup(self, stage: str) -> None:
        """Allocates a classifier for the training classes; `on_fit_start` fills it, when the text tower is in place."""
        if stage == "fit" and self.classifier is None:
            task = data_of(self.trainer).train_task
            with torch.no_grad(), frozen(self):
                feature = self.clip.encode_text(task.prompts[0])
            self.add_classifier(task.class_names, feature.new_zeros(len(task.class_names), feature.shape[1]))
            self._is_empty = True
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Sets a new classifier to the zero-shot classifier."""
        if self._is_empty and self.classifier is not None and self.zero_shot_head is not None:
            with torch.no_grad(), frozen(self):
                features = self.clip.encode_classes(data_of(self.trainer).train_task)
                self.classifier.copy_(self.clip.logit_scale * features)
                self.zero_shot_head.copy_(self.classifier)
            self._is_empty = False
        super().on_fit_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the names of the classifier's classes to the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["head_classes"] = list(self.class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Allocates the checkpoint's classifier, and restores its zero-shot classifier.

        Raises:
            ValueError: the checkpoint's classes differ from those of this run's training set.
        """
        classes = saved_classes(checkpoint, "head", None if self.classifier is None else self.class_names)
        if classes and self.classifier is None:
            self.add_classifier(classes, checkpoint["state_dict"]["zero_shot_head"].to(self.clip.mean.device))
        self._is_empty = False
        super().on_load_checkpoint(checkpoint)
