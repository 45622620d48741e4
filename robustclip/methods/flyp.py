"""FLYP: fine-tuning with the loss of pre-training."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from robustclip.arguments import Count, CountOrZero
from robustclip.attacks.noise import uniform
from robustclip.methods._shared.distributed import of_all
from robustclip.methods.base import RobustMethod
from robustclip.models.heads import head_logits
from robustclip.objectives.losses import info_nce
from robustclip.types import Batch, Task

MAX_LOGIT_SCALE = 100.0  # CLIP, section 2.5


class FLYP(RobustMethod):
    """FLYP (Goyal et al., CVPR 2023, https://arxiv.org/abs/2212.00638).

    Minimises InfoNCE between the batch's images and their class prompts, each of one random template::

        L_ctr(Z, T) = (CE(s Z T^T, arange) + CE(s T Z^T, arange)) / 2

    with unit features ``Z`` of the images and ``T`` of the prompts. Both towers and the logit scale ``s`` learn. Two
    images of one class are each other's negatives, as in the authors' code. The zero-shot heads come from the text
    tower as it stands.

    Over several processes, features are gathered with their gradients, so that a step is that of one large batch: each
    process has the whole loss, and what comes back to its features is the sum over the processes, of which
    DistributedDataParallel takes the mean.

    Departures from the authors' code: ``s`` is bounded, as in CLIP, and neither it nor norms and biases decay; an epoch
    is one pass over the images, each with a new template, where the code reads as many rows of a table that lists
    every image once per template.

    Args:
        decay_all: let weight decay reach every parameter, as the authors' code does.
        clamp: keep ``s`` at 100 or below.
        micro_batch: encode this many images, or texts, at a time, in a second pass again for their gradients; for
            batches that do not fit into memory. Null for one pass.
        optimizer: the authors' for ImageNet.
        warmup_steps: steps of linear warm-up before the cosine.
        kwargs: arguments of `RobustMethod`.

    Raises:
        ValueError: a micro-batch of no image, or of BatchNorm that is not fixed.
    """

    of_training: tuple[str, ...] = ("decay_all", "clamp", "micro_batch")

    def __init__(
        self,
        decay_all: bool = False,
        clamp: bool = True,
        micro_batch: Count | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.1),
        warmup_steps: CountOrZero = 500,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, warmup_steps=warmup_steps, **kwargs)
        if micro_batch is not None and not kwargs.get("has_fixed_batch_norm", True):
            raise ValueError(f"micro_batch must be null where has_fixed_batch_norm is false, got {micro_batch}")
        self.decay_all, self.clamp, self.micro_batch = decay_all, clamp, micro_batch
        self.prompts = torch.empty(0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Both towers and the logit scale; apart, what does not decay."""
        learning = [each for name, each in self.clip.net.named_parameters() if name != "logit_bias"]
        if self.decay_all:
            return [{"params": learning}]
        of_norms = [parameter for parameter in learning if parameter.ndim < 2]
        rest = [parameter for parameter in learning if parameter.ndim >= 2]
        return [{"params": rest}, {"params": of_norms, "weight_decay": 0.0}]

    def prepare_training(self, task: Task) -> None:
        """Keeps the tokens ``(C, T, L)`` of the training prompts in place of a head, which every step would move."""
        tokens = self.clip.tokenize([prompt for prompts in task.prompts for prompt in prompts])
        self.prompts = tokens.view(len(task.class_names), len(task.templates), -1).to(self.device)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """InfoNCE between images and class prompts."""
        features = self.encode_images(batch.images), self.encode_tokens(self.class_prompts(batch))
        images, prompts = self.gathered(*features)
        return {"prompt_nce": info_nce(images, prompts, self.clip.logit_scale)}

    def class_prompts(self, batch: Batch) -> Tensor:
        """Tokens ``(B, L)`` of each image's class in one of the templates, drawn by sample and step."""
        draws = uniform(batch.index, (), seed=self.global_step)
        return self.prompts[batch.labels, (draws * self.prompts.shape[1]).long()]

    def encode_images(self, *images: Tensor) -> Tensor:
        """``(B_i, 3, H, W)`` in [0, 1] to unit features ``(sum B_i, D)``, in one pass."""
        return self._encode(self.image_features, torch.cat(images))

    def encode_tokens(self, *tokens: Tensor) -> Tensor:
        """Tokens ``(N_i, L_i)`` to unit features ``(sum N_i, D)``, in one pass."""
        return self._encode(self.clip.encode_tokens, self.clip.join_tokens(*tokens))

    def gathered(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Of each ``(B, ...)``, the rows of all processes, with gradients; only batches' sizes may differ."""
        return of_all(self, torch.stack(parts, dim=1)).unbind(1)

    def _encode(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Unit features, of all inputs at once or with their gradients cached.

        Gradient caching (Gao et al., https://arxiv.org/abs/2101.06983) takes features without a graph, then the
        gradient of the loss in them, and then, micro-batch by micro-batch, a second pass through which that gradient
        flows. A checkpoint does just this: its first pass keeps inputs alone, backward reaches its output when the
        gradient of all features is known, and then it repeats the pass, with the same random numbers.
        """
        if self.micro_batch is None:
            return encode(inputs)
        parts = torch.split(inputs, self.micro_batch)
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in parts])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Bounds the logit scale, before a checkpoint could be written."""
        super().optimizer_step(*args, **kwargs)
        if self.clamp:
            self.clip.net.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))


class FLYPCE(FLYP):
    """The ablation of FLYP in its paper: cross-entropy over all classes in the place of InfoNCE.

    Minimises ``-log softmax(s f(x) t^T)_y`` with a prompt ``t_c`` of every class, whose template is drawn anew in each
    step. Both towers and ``s`` learn. Every step reads all class names.
    """

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the prompts' answers."""
        classes = torch.arange(len(self.prompts), device=self.device)
        prompts = self.class_prompts(Batch(batch.images, classes, classes))
        features, head = self.encode_images(batch.images), self.encode_tokens(prompts)
        with torch.autocast(features.device.type, enabled=False):
            logits = head_logits(features.float(), head.float(), self.clip.logit_scale)
        return {"prompt_ce": F.cross_entropy(logits, batch.labels)}
