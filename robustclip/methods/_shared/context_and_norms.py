"""What unsupervised methods for image-text models train: a text context and the norms of the image tower."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from robustclip.arguments import Count, NonNegative
from robustclip.methods._shared.distributed import of_training_images
from robustclip.methods.base import RobustMethod
from robustclip.models.context import LearnableContext
from robustclip.models.heads import head_logits
from robustclip.models.layers import NormFilter, frozen, norm_parameters
from robustclip.types import Task, data_of


class ContextAndNorms(RobustMethod):
    """Few parameters, which UEO (Liang et al., ICML 2024, https://arxiv.org/abs/2308.12919) trains without labels.

    A context in place of the words "a photo of a", for every task, and scale and shift of the image tower's norms,
    whose statistics stay. All else is frozen, the logit scale too: 100 for OpenAI's models, the constant of the
    authors' code. Both towers are in eval mode throughout.

    Args:
        learns: ``both``, or the ``context`` or the ``norms`` alone.
        norm_filter: ``official`` takes the norms whose names have "bn" or "ln", which leaves out those of a ResNet's
            shortcuts; ``all`` takes every norm of the image tower.
        phrase: that the context starts at; replaces the tasks' templates.
        context_lr: learning rate of the context; the norms' is the optimiser's.
        classes_per_pass: keep the text tower's activations of this many classes alone; null for all.
        optimizer: UEO's.
        kwargs: arguments of `RobustMethod`.

    Raises:
        ValueError: an option of another name, or a tower without such norms.
    """

    of_training: tuple[str, ...] = ("learns", "norm_filter", "context_lr", "classes_per_pass")
    of_original = ("clip.net.", "context.")
    takes_unknown = True

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
        self.start = [parameter.detach().clone() for parameter in self.learning()]
        self.prompts = torch.empty(0)
        self.train()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The context, and scale and shift of the norms."""
        parts: dict[str, dict[str, Any]] = {
            "context": {"params": [self.context.vectors], "lr": self.context_lr},
            "norms": {"params": self.norms},
        }
        return [group for part, group in parts.items() if self.learns in ("both", part)]

    def learning(self) -> list[Tensor]:
        """All of `parameter_groups()`."""
        return [parameter for group in self.parameter_groups() for parameter in group["params"]]

    def class_features(self, task: Task) -> Tensor:
        """Unit features ``(C, D)`` of the classes behind the learnt context."""
        tokens = self.context.tokenize(self.clip, task.class_names)
        return self.context.encode(self.clip, tokens, per_pass=self.classes_per_pass)

    def prepare_training(self, task: Task) -> None:
        """Keeps the tokens of the training prompts, too."""
        super().prepare_training(task)
        self.prompts = self.context.tokenize(self.clip, task.class_names)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features ``(B, D)`` of images ``(B, 3, H, W)``, ``(C, D)`` of the classes, with gradients, in fp32."""
        features = self.image_features(images)
        classes = self.context.encode(self.clip, self.prompts, per_pass=self.classes_per_pass)
        return features.float(), classes.float()

    def log_probabilities(self, images: Tensor) -> Tensor:
        """``log softmax(s cos(f(x), t))`` of images ``(B, 3, H, W)``, with gradients, in fp32, ``(B, C)``."""
        features, classes = self.features(images)
        with torch.autocast(images.device.type, enabled=False):  # at scale 100, half precision cannot tell logits apart
            return head_logits(features, classes, self.clip.logit_scale.float()).log_softmax(-1)

    def of_every_image(self, summary: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What the pre-trained model says of every training image, seen with the test transform, in fp32.

        Args:
            summary: of unit features of images ``(B, D)`` and classes ``(C, D)``, ``(B, ...)``.

        Returns:
            One row per sample id, nan where there is no such image, the same on all processes.
        """
        with self.as_at_the_start():
            with torch.no_grad(), frozen(self):
                classes = self.class_features(data_of(self.trainer).train_task)
            index, found, _ = of_training_images(self, lambda features: summary(features, classes))
        return found.new_full((int(index.max()) + 1, *found.shape[1:]), torch.nan).index_copy(0, index, found)

    @contextmanager
    def as_at_the_start(self) -> Iterator[None]:
        """What learns has its values of the pre-trained model inside."""
        learning = self.learning()
        learnt = [parameter.detach().clone() for parameter in learning]
        for parameter, value in zip(learning, self.start, strict=True):
            parameter.data.copy_(value)
        try:
            yield
        finally:
            for parameter, value in zip(learning, learnt, strict=True):
                parameter.data.copy_(value)

    def train(self, mode: bool = True) -> Self:
        """Sets training mode, except for the towers."""
        super().train(mode)
        self.clip.eval()
        return self
