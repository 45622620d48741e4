"""APT, adversarial prompt tuning: vectors before the class name are trained on attacked images."""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import NonNegative
from robustclip.attacks import PGD, Attack
from robustclip.attacks.attack import Forward
from robustclip.methods._shared.distributed import all_gather_rows
from robustclip.methods.coop import CoOp
from robustclip.models.heads import encode_head, encode_heads, head_logits
from robustclip.models.layers import frozen
from robustclip.types import Batch, Task

HAND = "hand prompt"  # name of the classifier of the strategy `constant`; no task can have it


class APT(CoOp):
    """APT (Li et al., CVPR 2024, https://arxiv.org/abs/2403.01849): CoOp on images that are attacked through it.

    Minimises ``CE(s cos(f(x'), t(V)), y)`` over the context vectors ``V``; both towers are frozen, and the image tower
    should be robust already, such as TeCoA's. ``x'`` maximises the loss in the perturbation set (PGD, last iterate);
    its classifier weights follow one of the authors' strategies:

    - ``onfly``: the present context;
    - ``constant``: the hand prompt, whatever the context;
    - ``perturbed``: a copy ``V'`` of the context that takes a step ``V' + prompt_alpha grad CE`` of its own after every
      step of the images.

    Departures from the authors' code: the first step of an attack starts inside the valid pixel range, every step ends
    in it, and the attack leaves no gradient in ``V``. All classes share one context, whose place is before the name;
    the authors also have contexts per class and other places.

    Args:
        strategy: classifier weights of the attack.
        prompt_alpha: step size of the copy, for ``perturbed``; this project's choice.
        hand_prompt: template of ``constant``.
        attack: training attack.
        optimizer: CoOp's, as in the authors' code.
        kwargs: arguments of `CoOp`.

    Raises:
        ValueError: the step size is negative.
    """

    training_arguments: tuple[str, ...] = ("strategy", "prompt_alpha", "hand_prompt")
    takes_features = False

    def __init__(
        self,
        strategy: Literal["onfly", "constant", "perturbed"] = "onfly",
        prompt_alpha: NonNegative = 1e-2,
        hand_prompt: str = "a photo of a {}",
        attack: Attack = PGD(eps="4/255", alpha="2.67/255", steps=3),
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=2e-3, momentum=0.9, weight_decay=5e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(attack=attack, optimizer=optimizer, **kwargs)
        self.strategy, self.prompt_alpha, self.hand_prompt = strategy, prompt_alpha, hand_prompt

    def prepare_training(self, task: Task) -> None:
        """Encodes the training classes, also with the hand prompt if the attack needs it."""
        super().prepare_training(task)
        if self.strategy == "constant":
            with torch.no_grad(), frozen(self):
                hand = replace(task, templates=(self.hand_prompt,))
                self.heads[HAND] = encode_heads(self.clip.encode_classes, [hand])[task.name]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Runs the step on the images, which the attack needs."""
        return self.step(batch, batch_idx)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy over the trained prompts, on adversarial images."""
        forward: Forward | None = None
        if self.strategy == "constant":
            forward = partial(self.logits, task=HAND)
        elif self.strategy == "perturbed":
            forward = self._ascending(batch.labels)
        attacked = self.perturb(batch, forward=forward)
        return {"adversarial_ce": F.cross_entropy(self.logits(attacked), batch.labels)}

    def _ascending(self, labels: Tensor) -> Forward:
        """Builds logits of a copy of the context that each call moves up the loss of the batch of all processes."""
        copy, task = self.context.vectors.detach().clone(), self.train_task
        assert task is not None  # the head learns
        all_labels = all_gather_rows(self, labels)

        def forward(images: Tensor) -> Tensor:
            copy.requires_grad_()
            head = encode_head(partial(self.class_features, vectors=copy), task)
            logits = head_logits(features := self.image_features(images), head.detach(), self.clip.logit_scale)
            rows = all_gather_rows(self, features.detach())
            loss = F.cross_entropy(head_logits(rows, head, self.clip.logit_scale), all_labels)
            (ascent,) = torch.autograd.grad(loss, copy)
            copy.requires_grad_(False).add_(ascent, alpha=self.prompt_alpha)
            return logits

        return forward
