"""CoOp, prompt learning: vectors before the class name are trained."""

from typing import Any

from torch import Tensor

from robustclip.arguments import Count
from robustclip.methods._shared.frozen_towers import FrozenFeatures
from robustclip.models.context import LearnableContext
from robustclip.types import Batch, Task


class CoOp(FrozenFeatures):
    """CoOp (Zhou et al., IJCV 2022, https://arxiv.org/abs/2109.01134), with one context for all classes.

    Minimises the cross-entropy of ``s cos(x, t)``, where the text of a class is ``[V]_1 ... [V]_n NAME.`` and the
    vectors ``[V]`` are trained. They replace the templates of every task. The defaults are those of CRoFT's comparison
    with a weight decay of 0.1; CoOp's own is 5e-4, over 200 epochs with 16 images per class.

    Args:
        tokens: ``n``, number of vectors, which start from N(0, 0.02).
        phrase: text whose word embeddings are the start instead, such as "a photo of a"; null for a random start.
        classes_per_pass: number of classes whose activations of the text tower are in memory at once; null for all.
        kwargs: arguments of `FrozenFeatures`.
    """

    training_arguments: tuple[str, ...] = ("classes_per_pass",)

    def __init__(
        self, tokens: Count = 16, phrase: str | None = None, classes_per_pass: Count | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.classes_per_pass = classes_per_pass
        self.context = LearnableContext(self.clip, phrase, tokens=tokens)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the vectors of the context."""
        return [{"params": [self.context.vectors]}]

    def class_features(self, task: Task, vectors: Tensor | None = None) -> Tensor:
        """Encodes the task's class names behind the context as unit features ``(C, D)``.

        Args:
            task: task of the classes.
            vectors: context in place of the trained one, ``(n, width)``.
        """
        tokens = self.context.tokenize(self.clip, task.class_names)
        return self.context.encode(self.clip, tokens, per_pass=self.classes_per_pass, vectors=vectors)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Runs the whole step in the trainer's precision, since the text tower dominates its cost."""
        return self.step(self.embedded(batch), batch_idx)
