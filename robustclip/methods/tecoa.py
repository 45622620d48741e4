"""TeCoA, text-guided contrastive adversarial training."""

from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Count, CountOrZero, NonNegative
from robustclip.methods._shared.tecoa_recipe import TeCoARecipe
from robustclip.methods.base import TRAIN
from robustclip.models.heads import head_logits
from robustclip.models.prompts import PromptKind, VisualPrompt
from robustclip.models.teacher import ImageTeacher
from robustclip.types import Batch, Task


class TeCoA(TeCoARecipe):
    """TeCoA (Mao et al., ICLR 2023, https://arxiv.org/abs/2212.07016).

    Minimises ``-log softmax(s cos(f(x'), t))_y`` over the class prompts ``t`` of the training set, where ``s`` is the
    frozen logit scale. ``x'`` maximises the same loss in the perturbation set (PGD, last iterate). The image tower
    ``f`` is trained, a visual prompt before it, or both; attacks pass through the prompt.

    Departures from the authors' code (the paper asks for none of these details): the attack leaves no gradient behind
    and maximises the summed loss, and the text tower runs once instead of at every step. The code trains in fp16 with
    loss scaling, ``--trainer.precision 16-mixed``, and has fp16 logits; here they are fp32. `RandomPatch` documents
    another departure.

    Args:
        last_blocks: train only the last N blocks of the image tower and its closing norm; null trains all of it.
        prompt: kind of `VisualPrompt` that is added to the normalised pixels; the paper's is ``padding``.
        prompt_size: width of the frame, or side of the square, in pixels of the tower's input.
        prompt_tokens: number of tokens that follow the patches; the authors' README uses 100 with the padding.
        prompt_lr: learning rate of prompt and tokens (the authors' for SGD); the image tower has the optimiser's.
        prompts_only: keep the image tower frozen if there is a prompt.
        pseudo_labels: train on the pre-trained model's predictions for the clean images instead of the labels.
        kwargs: arguments of `TeCoARecipe`.

    Raises:
        ValueError: ``last_blocks`` is not between 1 and the tower's number of blocks, or is set for a frozen tower; the
            tower cannot use the prompt; or pseudo-labels would come from random weights.

    Examples:
        >>> import torch
        >>> from robustclip import Batch, PGD, Task, TeCoA
        >>> model = TeCoA(attack=PGD("5/255", alpha="2/255", steps=2))
        >>> model.prepare_training(Task("colours", ("red", "blue"), ("a {} shape",)))
        >>> batch = Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2))
        >>> sorted(model.training_loss(batch))
        ['adversarial_ce']
    """

    training_arguments: tuple[str, ...] = ("last_blocks", "prompt_lr", "prompts_only", "pseudo_labels")

    def __init__(
        self,
        last_blocks: Count | None = None,
        prompt: PromptKind | None = None,
        prompt_size: Count = 30,
        prompt_tokens: CountOrZero = 0,
        prompt_lr: NonNegative = 40.0,
        prompts_only: bool = True,
        pseudo_labels: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if last_blocks is not None and last_blocks > len(self.clip.image_blocks()):
            available = len(self.clip.image_blocks())
            raise ValueError(f"last_blocks must be in [1, {available}], got {last_blocks}; null trains the whole tower")
        has_prompt = prompt is not None or prompt_tokens != 0
        self.is_tower_frozen = has_prompt and prompts_only
        if self.is_tower_frozen and last_blocks is not None:
            raise ValueError(f"last_blocks must be null where prompts_only is true, got {last_blocks}; set one of them")
        self.last_blocks, self.prompt_lr = last_blocks, prompt_lr
        self.prompt = VisualPrompt(self.clip, prompt, size=prompt_size, tokens=prompt_tokens) if has_prompt else None
        self.labeller = ImageTeacher(self.clip) if pseudo_labels else None
        self.train()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the image tower or its last blocks, unless frozen, and the prompts."""
        groups = [] if self.is_tower_frozen else self._tower_groups()
        if self.prompt is not None:
            groups.append({"params": list(self.prompt.parameters()), "lr": self.prompt_lr})
        return groups

    def _tower_groups(self) -> list[dict[str, Any]]:
        if self.last_blocks is None:
            return super().parameter_groups()
        blocks = self.clip.image_blocks()[-self.last_blocks :]
        return [{"params": [parameter for block in blocks for parameter in block.parameters()]}]

    def image_features(self, images: Tensor) -> Tensor:
        """Encodes images ``(B, 3, H, W)`` in [0, 1] as unit features ``(B, D)``, through the prompt."""
        if self.prompt is None:
            return super().image_features(images)
        with self.prompt.inserted(self.clip):
            return super().image_features(images)

    def grid_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images and their positions as unit features ``(B, D)`` and ``(B, P, D)``, through the prompt."""
        with nullcontext() if self.prompt is None else self.prompt.inserted(self.clip):
            return self.clip.encode_grid(images)

    def perturb(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs `RobustMethod.perturb`; every pass of the attack draws another position for a random patch."""
        if self.prompt is None:
            return super().perturb(*args, **kwargs)
        with self.prompt.moving():
            return super().perturb(*args, **kwargs)

    def prepare_training(self, task: Task) -> None:
        """Encodes the training classes.

        Raises:
            ValueError: there are pseudo-labels, but the head that predicts them learns.
        """
        super().prepare_training(task)
        if self.labeller is not None and self.train_task is not None:
            raise ValueError("pseudo_labels must be false where parameter_groups() has parameters of the text side")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Replaces the labels by pseudo-labels if these are on, and trains."""
        if self.labeller is not None:
            embeddings = self.labeller(batch.images)
            batch = batch._replace(labels=head_logits(embeddings, self.heads[TRAIN], self.clip.logit_scale).argmax(-1))
        return super().training_step(batch, batch_idx)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy over the class prompts, on adversarial images."""
        return {"adversarial_ce": F.cross_entropy(self.logits(self.perturb(batch)), batch.labels)}
