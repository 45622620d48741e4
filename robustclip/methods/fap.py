"""FAP, few-shot adversarial prompting: prompts in both towers are trained on clean and attacked images."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Count, NonNegative
from robustclip.attacks import PGD, Attack
from robustclip.methods.coop import CoOp
from robustclip.models.deep_prompts import DeepPrompts
from robustclip.models.heads import head_logits
from robustclip.objectives.losses import kl
from robustclip.types import Batch, Task


class FAP(CoOp):
    """FAP (Zhou et al., NeurIPS 2024, https://arxiv.org/abs/2403.14774): deep prompts before both frozen towers.

    With logits ``z`` and unit features ``f`` of the prompted towers, softmax ``p``, the clean image ``x`` and the
    adversarial image ``x'``, the method minimises:

        CE(z(x), y) + weight KL(p(x) || p(x')) (cos(f(x), f(x')) + 1)

    averaged over the batch, with gradients in all parts. The attack maximises the divergence. Thus predictions agree
    while features are driven apart, which the authors call differentiated features. `DeepPrompts` describes the trained
    parameters.

    Departures from the authors' code: its passes are fp16, here they have the trainer's precision; and the attack ends
    in the valid pixel range after every step.

    Args:
        weight: weight of the second term, the authors' scripts' 1.5; at 0 there is no attack.
        depth: number of blocks with prompts in both towers.
        phrase: words before the class name whose embeddings the context starts from; null for a random start.
        between: words between the context and the class name, which are not trained.
        tokens: length of a random context.
        attack: training attack.
        optimizer: the authors' SGD, with CoOp's momentum and weight decay.
        kwargs: arguments of `CoOp`.

    Raises:
        ValueError: a tower is no transformer of open_clip or has fewer blocks, or the weight is negative.
    """

    training_arguments: tuple[str, ...] = ("weight",)
    takes_features = False

    def __init__(
        self,
        weight: NonNegative = 1.5,
        depth: Count = 9,
        phrase: str | None = "a photo",
        between: str = "of a",
        tokens: Count = 2,
        attack: Attack = PGD(eps="1/255", alpha="1/255", steps=2),
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(
            params, lr=3.5e-3, momentum=0.9, weight_decay=5e-4
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(attack=attack, optimizer=optimizer, phrase=phrase, tokens=tokens, **kwargs)
        self.weight, self.between = weight, between
        self.context: DeepPrompts = DeepPrompts(self.clip, phrase, tokens=tokens, depth=depth)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the context, the rows and the maps."""
        return [{"params": list(self.context.parameters())}]

    def image_features(self, images: Tensor) -> Tensor:
        """Encodes images ``(B, 3, H, W)`` in [0, 1] as unit features ``(B, D)``, through the prompts."""
        with self.context.inserted_in_images(self.clip):
            return self.clip.encode_image(images)

    def grid_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images and their positions as unit features ``(B, D)`` and ``(B, P, D)``, through the prompts."""
        with self.context.inserted_in_images(self.clip):
            return self.clip.encode_grid(images)

    def class_features(self, task: Task, vectors: Tensor | None = None) -> Tensor:
        """Encodes the task's class names behind the context as unit features ``(C, D)``, through the prompts.

        Args:
            task: task of the classes.
            vectors: context in place of the trained one, ``(n, width)``.
        """
        names = tuple(f"{self.between} {name}".strip() for name in task.class_names)
        return super().class_features(replace(task, class_names=names), vectors)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Runs the step on the images, which the prompts and the attack need."""
        return self.step(batch, batch_idx)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy on clean images, and the weighted divergence of the adversarial ones."""
        head, scale = self.head(), self.clip.logit_scale
        features = self.image_features(batch.images)
        logits = head_logits(features, head, scale)
        terms = {"clean_ce": F.cross_entropy(logits, batch.labels)}
        if self.weight > 0:
            attacked = self.image_features(self.perturb(batch, loss=kl, targets=logits.detach()))
            divergence = kl(head_logits(attacked, head, scale), logits)
            alike = F.cosine_similarity(features, attacked, dim=-1) + 1
            terms["adversarial_kl"] = self.weight * (divergence * alike).mean()
        return terms
