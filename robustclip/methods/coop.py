"""CoOp: learnable words before the class name."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Count
from robustclip.methods._shared.frozen_towers import FrozenFeatures
from robustclip.models.context import LearnableContext
from robustclip.models.heads import head_logits
from robustclip.types import Batch, Task


class CoOp(FrozenFeatures):
    """CoOp (Zhou et al., IJCV 2022, https://arxiv.org/abs/2109.01134), with one context for all classes.

    Minimises cross-entropy of ``s cos(x, t)``, where the text of a class is ``[V]_1 ... [V]_n NAME.`` and the vectors
    ``[V]`` learn. They replace every task's templates. The defaults are those of CRoFT's comparison, whose weight decay
    is 0.1; CoOp's own is 5e-4, over 200 epochs for 16 images of each class.

    Args:
        tokens: ``n``; they start from N(0, 0.02).
        phrase: whose word embeddings are the start instead, such as "a photo of a"; null for a random one.
        classes_per_pass: keep the text tower's activations of this many classes alone; null for all.
        kwargs: arguments of `FrozenFeatures`.
    """

    of_training: tuple[str, ...] = ("classes_per_pass",)

    def __init__(
        self, tokens: Count = 16, phrase: str | None = None, classes_per_pass: Count | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.classes_per_pass = classes_per_pass
        self.context = LearnableContext(self.clip, phrase, tokens=tokens)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The context."""
        return [{"params": [self.context.vectors]}]

    def class_features(self, task: Task) -> Tensor:
        """Unit features ``(C, D)`` of the classes behind the learnt context."""
        return self.encode(self.context.tokenize(self.clip, task.class_names))

    def encode(self, prompts: Tensor) -> Tensor:
        """Tokens ``(C, L)`` to unit features ``(C, D)``."""
        return self.context.encode(self.clip, prompts, per_pass=self.classes_per_pass)

    def prepare_training(self, task: Task) -> None:
        """Keeps the tokens of the training prompts, too."""
        super().prepare_training(task)
        self.prompts = self.context.tokenize(self.clip, task.class_names)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy on clean images."""
        logits = head_logits(self.image_features(batch.images), self.encode(self.prompts), self.clip.logit_scale)
        return {"clean_ce": F.cross_entropy(logits.float(), batch.labels)}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """In the trainer's precision throughout, since the text tower is the larger part."""
        return self.step(self.embedded(batch), batch_idx)
