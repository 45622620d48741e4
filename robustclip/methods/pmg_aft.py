"""PMG-AFT, adversarial fine-tuning guided by the pre-trained model."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from open_clip.constants import IMAGENET_MEAN, IMAGENET_STD
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.arguments import NonNegative, Positive
from robustclip.methods.tecoa import TeCoA
from robustclip.models.clip import CLIPModel
from robustclip.models.heads import head_logits
from robustclip.models.teacher import ImageTeacher
from robustclip.objectives.losses import cosine, kl, l1, l2, reverse_kl
from robustclip.types import Batch

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum}


class PMGAFT(TeCoA):
    """PMG-AFT (Wang et al., CVPR 2024, https://arxiv.org/abs/2401.04350): TeCoA, guided by a frozen teacher.

    Let ``z = s cos(f(.), t)`` be logits and ``P = softmax(z)``: ``z_a`` and ``z_c`` are the student's on adversarial
    and on clean images, ``z_o`` are the pre-trained teacher's on the same adversarial images. The method minimises:

        CE(z_a, y) + alpha KL(P_o || P_a) + beta KL(P_c || P_a)

    averaged over the batch. The attack is TeCoA's, or any other; it does not involve the teacher.

    The defaults follow the formulas. The released code computes something else: it normalises twice, which cancels
    ``s``; it sums the KL over the batch, which multiplies alpha and beta by the batch size; and it standardises pixels
    with ImageNet's statistics. ``logit_scale: 1``, ``reduction: sum`` and ``normalisation: imagenet`` reproduce it
    (``configs/pmg_aft_code.yaml``); robustness measured at that scale is overestimated.

    Departures from the authors' code beside TeCoA's: the teacher is an image tower without gradients and shares the
    student's class features. A term of weight 0 is not computed.

    Args:
        alpha: weight of the guidance by the teacher.
        beta: weight of the term that pulls adversarial towards clean predictions.
        distance: distance between student and teacher; ``l1`` and ``l2`` are means over the K entries, ``cosine`` is
            1 - cos, and ``kl`` applies a softmax to any layer.
        layer: outputs that the distance compares: ``logits``, unit ``features``, or the class token (mean over the
            pixels of a convolutional tower) after a block, by its number; -1 is the last.
        kl_direction: order of both KL terms: ``forward`` is ``KL(reference || adversarial)``, the last release of the
            code; ``reverse`` is the other order, its first release.
        reduction: reduction of both terms over the batch.
        detach_clean: compute the clean predictions without gradient, which saves a backward pass.
        logit_scale: ``s`` in training and evaluation; null for the model's own.
        normalisation: pixel statistics of student and teacher, the ``model``'s own or ``imagenet``'s.
        optimizer: the paper's for Tiny-ImageNet; with ``s = 100`` on ImageNet, other papers use 1e-5.
        kwargs: arguments of `TeCoA`.

    Raises:
        ValueError: a weight is negative, the scale is not positive, the tower has no such block, or the block is
            compiled.

    Examples:
        >>> import torch
        >>> from robustclip import Batch, PGD, PMGAFT, Task
        >>> model = PMGAFT(attack=PGD("5/255", alpha="2/255", steps=2), beta=0.5)
        >>> model.prepare_training(Task("colours", ("red", "blue"), ("a {} shape",)))
        >>> batch = Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2))
        >>> sorted(model.training_loss(batch))
        ['adversarial_ce', 'clean_pull', 'guidance']
    """

    training_arguments: tuple[str, ...] = (
        "alpha",
        "beta",
        "distance",
        "layer",
        "kl_direction",
        "reduction",
        "detach_clean",
    )

    def __init__(
        self,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 1.0,
        distance: Literal["kl", "l1", "l2", "cosine"] = "kl",
        layer: int | Literal["features", "logits"] = "logits",
        kl_direction: Literal["forward", "reverse"] = "forward",
        reduction: Literal["mean", "sum"] = "mean",
        detach_clean: bool = False,
        logit_scale: Positive | None = None,
        normalisation: Literal["model", "imagenet"] = "model",
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=5e-5, momentum=0.9),
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **kwargs)
        if isinstance(layer, int) and not -(blocks := len(self.clip.image_blocks())) <= layer < blocks:
            raise ValueError(f"layer must be a block in [{-blocks}, {blocks - 1}], got {layer}; -1 is the last")
        if isinstance(layer, int) and self.clip.compiled_by is not None:  # a block that is observed compiles every pass
            raise ValueError(f"layer must be logits or features where compile is true, got {layer}; unset one of them")
        self.alpha, self.beta, self.layer, self.detach_clean = alpha, beta, layer, detach_clean
        self.kl = {"forward": kl, "reverse": reverse_kl}[kl_direction]
        self.distance = {"kl": self.kl, "l1": l1, "l2": l2, "cosine": cosine}[distance]
        self.reduce = REDUCTIONS[reduction]
        if logit_scale is not None:
            self.clip.net.logit_scale.data.fill_(math.log(logit_scale))
        if normalisation == "imagenet":
            self.clip.mean.copy_(torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
            self.clip.std.copy_(torch.tensor(IMAGENET_STD).view(3, 1, 1))
        self.teacher = ImageTeacher(self.clip)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns TeCoA's term, the guidance by the teacher, and the pull towards clean predictions."""
        attacked, head = self.perturb(batch), self.head()
        logits, outputs = self._forward(self.clip, attacked, head)
        terms = {"adversarial_ce": F.cross_entropy(logits, batch.labels)}
        if self.alpha > 0:
            with torch.no_grad():
                _, reference = self._forward(self.teacher.clip, attacked, head)
            terms["guidance"] = self.alpha * self.reduce(self.distance(outputs, reference))
        if self.beta > 0:
            # The clean pass comes after the pass with gradients: autocast caches its cast weights and their graph.
            with torch.set_grad_enabled(not self.detach_clean):
                clean = head_logits(self.image_features(batch.images), head, self.clip.logit_scale)
            terms["clean_pull"] = self.beta * self.reduce(self.kl(logits, clean))
        return terms

    def _forward(self, clip: CLIPModel, images: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits ``(B, C)`` of student or teacher, and the outputs ``(B, K)`` that the guidance compares."""
        with _recorded(clip, self.layer) as outputs:
            features = self.image_features(images) if clip is self.clip else clip.encode_image(images)
        logits = head_logits(features, head, self.clip.logit_scale)
        if self.layer == "logits":
            return logits, logits
        if self.layer == "features":
            return logits, features
        if not outputs:  # timm's EfficientNet recomputes parts of a block without calling the block
            raise ValueError(f"layer {self.layer} has no output with has_activation_checkpointing; unset it, or layer")
        return logits, outputs[0]


@contextmanager
def _recorded(clip: CLIPModel, layer: int | str) -> Iterator[list[Tensor]]:
    """Collects the outputs ``(B, K)`` of a numbered block, one per pass; collects nothing for other layers."""
    outputs: list[Tensor] = []
    if not isinstance(layer, int):
        yield outputs
        return
    block = clip.image_blocks()[layer]
    block = block[0] if isinstance(block, nn.ModuleList) else block  # the last block is listed with the closing norm
    handle = block.register_forward_hook(lambda *call: outputs.append(_per_image(call[-1])))
    try:
        yield outputs
    finally:
        handle.remove()


def _per_image(output: Tensor) -> Tensor:
    """Reduces tokens ``(B, L, K)`` to the first, and feature maps ``(B, K, H, W)`` to their mean over the pixels."""
    return output[:, 0] if output.ndim == 3 else output.mean((2, 3))
