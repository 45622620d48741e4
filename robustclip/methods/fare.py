"""FARE, unsupervised adversarial fine-tuning of the image embeddings."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from robustclip.arguments import CountOrZero
from robustclip.attacks import PGD, Attack
from robustclip.methods.base import RobustMethod
from robustclip.models.teacher import ImageTeacher
from robustclip.types import Batch


class FARE(RobustMethod):
    """FARE (Schlarmann et al., ICML 2024, https://arxiv.org/abs/2402.12336).

    Minimises ``||phi(x') - phi_0(x)||_2^2``, where ``phi`` is the embedding before normalisation and ``phi_0`` that of
    the pre-trained tower. ``x'`` maximises the same distance in the perturbation set (PGD, last iterate). The square is
    summed over the embedding and averaged over the batch. Labels are not used.

    The defaults are FARE-4 of the authors' README; ``--model.attack.eps 2/255`` makes FARE-2. Departures from their
    code: the attack maximises the summed loss and has no momentum. Their momentum has no effect, since their
    velocity is a sign: 0.9 times the old sign plus the new sign has the new sign, except where a gradient is exactly 0.

    Args:
        attack: training attack.
        optimizer: the paper's is AdamW.
        warmup_steps: steps of linear warm-up before the cosine.
        kwargs: arguments of `RobustMethod`.

    Raises:
        ValueError: the initial weights are random, ``pretrained: null``.

    Examples:
        >>> import torch
        >>> from robustclip import Batch, FARE, PGD, Task
        >>> model = FARE(attack=PGD("5/255", alpha="2/255", steps=2))
        >>> model.prepare_training(Task("colours", ("red", "blue"), ("a {} shape",)))
        >>> batch = Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2))
        >>> sorted(model.training_loss(batch))
        ['squared_distance']
    """

    def __init__(
        self,
        attack: Attack = PGD(eps="4/255", alpha="1/255", steps=10),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=1e-4),
        warmup_steps: CountOrZero = 1400,
        **kwargs: Any,
    ) -> None:
        super().__init__(attack=attack, optimizer=optimizer, warmup_steps=warmup_steps, **kwargs)
        self.teacher = ImageTeacher(self.clip)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the squared distance of adversarial embeddings from the clean images' pre-trained embeddings."""
        original = self.teacher(batch.images)
        attacked = self.perturb(batch, forward=self.clip.embed_image, targets=original, loss=squared_distance)
        return {"squared_distance": squared_distance(self.clip.embed_image(attacked), original).mean()}


def squared_distance(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Computes ``||a - b||_2^2`` per sample ``(B,)``, in fp32.

    Args:
        embeddings, targets: ``(B, D)``.
    """
    return (embeddings.float() - targets.float()).square().sum(-1)
