"""Base of unsupervised methods that train a text context and the norms of the image tower."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from robustclip.arguments import Count, NonNegative
from robustclip.methods._shared.distributed import encode_training_images
from robustclip.methods.base import RobustMethod
from robustclip.models.context import LearnableContext
from robustclip.models.layers import NormFilter, frozen, norm_parameters
from robustclip.types import Task, data_of


class ContextAndNorms(RobustMethod):
    """Base of methods that train few parameters without labels, as UEO does (Liang et al., ICML 2024).

    The trained parameters (https://arxiv.org/abs/2308.12919) are a context in place of the words "a photo of a", for
    every task, and scale and shift of the image tower's norms, whose statistics are kept. All else is frozen, also the
    logit scale: 100 for OpenAI's models, the constant of the authors' code. Both towers are always in eval mode.

    Args:
        learns: parameters to train: ``both``, or the ``context`` or the ``norms`` alone.
        norm_filter: ``official`` selects the norms whose names have "bn" or "ln", which omits those of a ResNet's
            shortcuts; ``all`` selects every norm of the image tower.
        phrase: text whose embeddings the context starts from; it replaces the tasks' templates. Models that
            have not learnt these words lose accuracy by it before training begins; give them words of their captions.
        context_lr: learning rate of the context; the norms have the optimiser's.
        classes_per_pass: number of classes whose activations of the text tower are in memory at once; null for all.
        optimizer: default of UEO.
        kwargs: arguments of `RobustMethod`.

    Raises:
        ValueError: an option is unknown, or the tower has no such norms.
    """

    training_arguments: tuple[str, ...] = ("learns", "norm_filter", "context_lr", "classes_per_pass")
    pretrained_prefixes = ("clip.net.", "context.")
    takes_unknown = True
    is_tower_frozen = True

    def __init__(
        self,
        learns: Literal["both", "context", "norms"] = "both",
        norm_filter: NormFilter = "official",
        phrase: str = "a photo of a",
        context_lr: NonNegative = 1e-4,
        classes_per_pass: Count | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        self.learns, self.context_lr, self.classes_per_pass = learns, context_lr, classes_per_pass
        self.context = LearnableContext(self.clip, phrase)
        self.norms = [] if learns == "context" else norm_parameters(self.clip.net.visual, norm_filter)
        self.start = [parameter.detach().clone() for parameter in self.trained_parameters()]
        self.train()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the context, and scale and shift of the norms."""
        parts: dict[str, dict[str, Any]] = {
            "context": {"params": [self.context.vectors], "lr": self.context_lr},
            "norms": {"params": self.norms},
        }
        return [group for part, group in parts.items() if self.learns in ("both", part)]

    def trained_parameters(self) -> list[Tensor]:
        """Lists all parameters of `parameter_groups()`."""
        return [parameter for group in self.parameter_groups() for parameter in group["params"]]

    def class_features(self, task: Task) -> Tensor:
        """Encodes the task's class names behind the trained context as unit features ``(C, D)``."""
        tokens = self.context.tokenize(self.clip, task.class_names)
        return self.context.encode(self.clip, tokens, per_pass=self.classes_per_pass)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images ``(B, 3, H, W)`` and the training classes as unit features ``(B, D)`` and ``(C, D)``, in fp32.

        Both have gradients.
        """
        return self.image_features(images).float(), self.head().flatten(0, -2).float()

    def log_probabilities(self, images: Tensor) -> Tensor:
        """Computes ``log softmax(s cos(f(x), t))`` ``(B, C)`` of images ``(B, 3, H, W)``, with gradients, in fp32."""
        return self.logits(images).log_softmax(-1)

    def summarise_training_images(self, summary: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Applies a function to the pre-trained features of every training image, under the test transform, in fp32.

        Args:
            summary: function of unit features of images ``(B, D)`` and of classes ``(C, D)``, with ``B`` rows.

        Returns:
            One row per sample id, nan where no image has that id, the same on all processes.
        """
        with self.pretrained_values():
            with torch.no_grad(), frozen(self):
                classes = self.class_features(data_of(self.trainer).train_task)
            index, rows, _ = encode_training_images(self, lambda features: summary(features, classes))
        return rows.new_full((int(index.max()) + 1, *rows.shape[1:]), torch.nan).index_copy(0, index, rows)

    @contextmanager
    def pretrained_values(self) -> Iterator[None]:
        """Gives the trained parameters their pre-trained values inside the context."""
        trained = self.trained_parameters()
        present = [parameter.detach().clone() for parameter in trained]
        for parameter, value in zip(trained, self.start, strict=True):
            parameter.data.copy_(value)
        try:
            yield
        finally:
            for parameter, value in zip(trained, present, strict=True):
                parameter.data.copy_(value)
