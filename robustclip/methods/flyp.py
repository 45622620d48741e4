"""FLYP, fine-tuning with the contrastive loss of pre-training."""

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
from robustclip.methods._shared.distributed import all_gather_rows
from robustclip.methods.base import RobustMethod
from robustclip.models.heads import head_logits
from robustclip.objectives.losses import info_nce
from robustclip.types import Batch, Task

MAX_LOGIT_SCALE = 100.0  # CLIP, section 2.5


class FLYP(RobustMethod):
    """FLYP (Goyal et al., CVPR 2023, https://arxiv.org/abs/2212.00638).

    Minimises InfoNCE between the batch's images and their class prompts, each from one random template:

        L_ctr(Z, T) = (CE(s Z T^T, arange) + CE(s T Z^T, arange)) / 2

    with unit features ``Z`` of the images and ``T`` of the prompts. Both towers and the logit scale ``s`` are trained.
    Two images of one class are each other's negatives, as in the authors' code. The text tower in its present state
    computes the zero-shot classifiers.

    Over several processes, features are gathered with their gradients, so that a step equals that of one large batch:
    each process computes the whole loss, its features receive the gradients' sum over the processes, and
    DistributedDataParallel takes the mean.

    Departures from the authors' code: ``s`` is bounded, as in CLIP, and weight decay excludes it, norms and biases; an
    epoch is one pass over the images, each with a new template, where the code reads a table with a row per image and
    template.

    Args:
        decay_all: apply weight decay to every parameter, as the authors' code does.
        clamp: keep ``s`` at 100 or below.
        micro_batch: number of images, or texts, to encode at a time, for batches that do not fit into memory; gradients
            then take a second pass. Null for one pass.
        optimizer: default of the authors for ImageNet.
        warmup_steps: steps of linear warm-up before the cosine.
        kwargs: arguments of `RobustMethod`.

    Raises:
        ValueError: a micro-batch has no image, or BatchNorm that is not fixed.

    Examples:
        >>> import torch
        >>> from robustclip import Batch, FLYP, Task
        >>> model = FLYP(pretrained="shapes")
        >>> model.prepare_training(Task("colours", ("red", "blue"), ("a {} shape",)))
        >>> batch = Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2))
        >>> sorted(model.training_loss(batch))
        ['prompt_nce']
    """

    training_arguments: tuple[str, ...] = ("decay_all", "clamp", "micro_batch")

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
        """Returns both towers and the logit scale; norms and biases are a group without weight decay."""
        trained = [parameter for name, parameter in self.clip.net.named_parameters() if name != "logit_bias"]
        if self.decay_all:
            return [{"params": trained}]
        of_norms = [parameter for parameter in trained if parameter.ndim < 2]
        rest = [parameter for parameter in trained if parameter.ndim >= 2]
        return [{"params": rest}, {"params": of_norms, "weight_decay": 0.0}]

    def prepare_training(self, task: Task) -> None:
        """Stores the tokens ``(C, T, L)`` of the training prompts."""
        if task.descriptions is not None:
            raise ValueError(
                f"{type(self).__name__} draws a template for each image: descriptions of {task.name!r} must be null"
            )
        super().prepare_training(task)
        tokens = self.clip.tokenize([prompt for prompts in task.prompts for prompt in prompts])
        self.prompts = tokens.view(len(task.class_names), len(task.templates), -1).to(self.device)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns InfoNCE between images and class prompts."""
        features = self.encode_images(batch.images), self.encode_tokens(self.class_prompts(batch))
        images, prompts = self.gathered(*features)
        return {"prompt_nce": info_nce(images, prompts, self.clip.logit_scale)}

    def class_prompts(self, batch: Batch) -> Tensor:
        """Returns tokens ``(B, L)`` of each image's class in a template that is drawn by sample id and step."""
        draws = uniform(batch.index, (), seed=self.global_step)
        return self.prompts[batch.labels, (draws * self.prompts.shape[1]).long()]

    def encode_images(self, *images: Tensor) -> Tensor:
        """Encodes images ``(B_i, 3, H, W)`` in [0, 1] as unit features ``(sum B_i, D)``, in one pass."""
        return self._encode(self.image_features, torch.cat(images))

    def encode_tokens(self, *tokens: Tensor) -> Tensor:
        """Encodes tokens ``(N_i, L_i)`` as unit features ``(sum N_i, D)``, in one pass."""
        return self._encode(self.clip.encode_tokens, self.clip.join_tokens(*tokens))

    def gathered(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Gathers the rows of each ``(B, ...)`` from all processes, with gradients; only batch sizes may differ."""
        return all_gather_rows(self, torch.stack(parts, dim=1)).unbind(1)

    def _encode(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Computes unit features of all inputs at once, or in micro-batches with cached gradients.

        Gradient caching (Gao et al., https://arxiv.org/abs/2101.06983) computes features without a graph, then the
        gradient of the loss with respect to them, and passes this gradient through a second pass of each micro-batch.
        Activation checkpointing does just this: the first pass stores the inputs alone. The backward pass reaches its
        output when the gradient of all features is known, and then repeats the pass with the same random numbers.
        """
        if self.micro_batch is None:
            return encode(inputs)
        parts = torch.split(inputs, self.micro_batch)
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in parts])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps the optimiser and bounds the logit scale, before a checkpoint can be written."""
        super().optimizer_step(*args, **kwargs)
        if self.clamp:
            self.clip.net.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))


class FLYPCE(FLYP):
    """FLYP with cross-entropy over all classes instead of InfoNCE, the ablation in its paper.

    Minimises ``-log softmax(s f(x) t^T)_y`` with a prompt ``t_c`` for every class, whose template is drawn anew in each
    step. Both towers and ``s`` are trained. Every step encodes all class names.
    """

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy over one prompt of every class."""
        classes = torch.arange(len(self.prompts), device=self.device)
        prompts = self.class_prompts(Batch(batch.images, classes, classes))
        features, head = self.encode_images(batch.images), self.encode_tokens(prompts)
        logits = head_logits(features, head, self.clip.logit_scale)
        return {"prompt_ce": F.cross_entropy(logits, batch.labels)}
