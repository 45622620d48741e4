"""CRoFT: linear adapters whose energy hardly depends on them, also on features under a generated shift."""

from typing import Any, Literal, NamedTuple, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from robustclip.arguments import CountOrZero, NonNegative, Share
from robustclip.methods._shared.frozen_towers import FrozenFeatures
from robustclip.objectives.energy import Branch, Reduction, adapted, batch_penalty, sample_penalty
from robustclip.types import Batch, Task

Mode = Literal["clean", "official", "official_vlcs"]


class View(NamedTuple):
    """A batch behind the adapters."""

    images: Branch
    texts: Branch


class CRoFT(FrozenFeatures):
    """CRoFT (Zhu et al., ICML 2024, https://arxiv.org/abs/2405.16417; https://github.com/LinLLLL/CRoFT).

    Both towers are followed by linear adapters that start at the identity, ``u = r x A^T + (1 - r) x`` and
    ``v = r_t t B^T + (1 - r_t) t``. A generator ``G`` makes features under a covariate shift, ``z = (u^ G^T + u^)^``,
    where ``^`` is unit length. With ``CE`` of ``s cos``, adapters and generator take turns to minimise::

        A, B:  CE(u) + lambda1 CE(z') + lambda2 (L_e(x) + L_e(z)),   z' = r z A^T + (1 - r) z
        G:     CE(z) + lambda1 D(z, u),   D = sum_{y_i = y_j} <z_i, u^_j> / N^2

    where ``L_e`` is the squared gradient of the energy in the adapters, see `energy`. Predictions do not use ``G``.

    ``mode`` ``clean`` is the above; ``official`` is what the authors' code computes: every step moves all three,
    gradients pass through ``z``, and the model of the first step of a batch answers in all of its steps; ``L_e`` has
    ``A`` and ``B`` for their transposes, one shift for both, and images and generated features in one sum; the terms
    of ``z`` are ``CE(r z + (1 - r) z A) - lambda1 D(z, x)``. ``official_vlcs``, like 0 generator steps, has ``CE(z)``
    for these and no ``z`` in ``L_e``. In all modes, features have unit length before the adapters, which changes
    nothing but the weight of the code's 1e-6 beside norms, and the energy's gradient is taken where the adapters
    are, not 1e-4 beside.

    The weight decay of 0.1 shrinks the adapters; as scale does not matter, this is a pull to the zero-shot model.
    Losses are not means over samples, so a piece of a batch does not teach what the whole teaches. Several processes
    need the strategy ``ddp_find_unused_parameters_true``. ``max_steps`` counts the steps of both optimisers.

    Args:
        mode: see above.
        ratio: ``r``.
        ratio_text: ``r_t``.
        generator_steps: per batch; 0 in official modes alone.
        lambda1: weight of what is generated.
        lambda2: weight of the energy's gradient.
        penalty: ``batch`` takes the gradient of one sum, as the code does, ``sample`` that of each image's energy.
        reduction: of ``batch``; ``sum`` is the code's for its ImageNet split, where ``lambda2`` means
            ``(N C / D)^2`` times as much.
        kwargs: arguments of `FrozenFeatures`; the optimiser is made twice, for adapters and generator.

    Raises:
        ValueError: an option of another name, a ratio outside [0, 1], a negative number, or the penalty of samples
            in an official mode.
    """

    of_training: tuple[str, ...] = ("mode", "generator_steps", "lambda1", "lambda2", "penalty", "reduction")

    def __init__(
        self,
        mode: Mode = "clean",
        ratio: Share = 0.2,
        ratio_text: Share = 0.5,
        generator_steps: CountOrZero = 1,
        lambda1: NonNegative = 1.0,
        lambda2: NonNegative = 5.0,
        penalty: Literal["batch", "sample"] = "batch",
        reduction: Reduction = "mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.mode, self.ratio, self.ratio_text = mode, ratio, ratio_text
        self.generator_steps, self.lambda1, self.lambda2 = generator_steps, lambda1, lambda2
        self.penalty, self.reduction = penalty, reduction
        self._check()
        self.image_adapter, self.text_adapter, self.generator = (nn.Parameter(torch.eye(self.width)) for _ in range(3))
        self.texts = self.text_gram = torch.empty(0)

    def _check(self) -> None:
        if self.mode == "clean" and self.generator_steps < 1:
            raise ValueError(f"generator_steps must be at least 1 in mode 'clean', got {self.generator_steps}")
        if self.mode != "clean" and self.penalty == "sample":
            raise ValueError(f"penalty must be 'batch' in mode {self.mode!r}, got 'sample'; the code has no other")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The adapters, and the generator."""
        return [{"params": [self.image_adapter, self.text_adapter]}, {"params": [self.generator]}]

    def image_features(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1], or their embeddings ``(B, D)``, to unit features ``(B, D)``."""
        return adapted(super().image_features(images), self.image_adapter, self.ratio).unit

    def class_features(self, task: Task) -> Tensor:
        """Adapted unit features ``(C, D)``."""
        return adapted(super().class_features(task), self.text_adapter, self.ratio_text).unit

    def prepare_training(self, task: Task) -> None:
        """Keeps the text tower's own features of the training classes, too."""
        super().prepare_training(task)
        self.texts = super().class_features(task)
        self.text_gram = self.texts @ self.texts.T

    # Losses

    def view(self, batch: Batch) -> View:
        """A batch of images, or of embeddings ``(B, D)``, behind the adapters as they are now."""
        images = adapted(super().image_features(batch.images), self.image_adapter, self.ratio)
        return View(images, adapted(self.texts, self.text_adapter, self.ratio_text, self.text_gram))

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """What the adapters minimise."""
        return self.adapter_loss(self.view(batch), batch.labels)

    def adapter_loss(self, view: View, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, the terms of what is generated, and the gradient of the energy."""
        terms = self._clean_terms if self.mode == "clean" else self._official_terms
        return {"clean_ce": self.cross_entropy(view.images.unit, view, labels), **terms(view, labels)}

    def generator_loss(self, view: View, labels: Tensor) -> Tensor:
        """Features that are still recognised, but unlike those of their class."""
        generated = self.generate(view.images.unit)
        away = same_class_similarity(generated, view.images.unit, labels)
        return self.cross_entropy(generated, view, labels) + self.lambda1 * away

    def generate(self, features: Tensor) -> Tensor:
        """Unit features ``(B, D)`` to others under a covariate shift."""
        return F.normalize(features @ self.generator.T + features, dim=-1)

    def cross_entropy(self, features: Tensor, view: View, labels: Tensor) -> Tensor:
        """Of features ``(B, D)`` against the view's texts."""
        return F.cross_entropy(self.clip.logit_scale * features @ view.texts.unit.T, labels)

    def _clean_terms(self, view: View, labels: Tensor) -> dict[str, Tensor]:
        generated = adapted(self.generate(view.images.unit).detach(), self.image_adapter, self.ratio)
        return {
            "generated": self.lambda1 * self.cross_entropy(generated.unit, view, labels),
            "energy": self.lambda2 * (self._penalty(view.images, view.texts) + self._penalty(generated, view.texts)),
        }

    def _penalty(self, images: Branch, texts: Branch) -> Tensor:
        if self.penalty == "sample":
            return sample_penalty(images, texts)
        return batch_penalty(images, texts, reduction=self.reduction)

    def _official_terms(self, view: View, labels: Tensor) -> dict[str, Tensor]:
        inputs, generated = view.images.inputs, self.generate(view.images.unit)
        if self.generator_steps == 0 or self.mode == "official_vlcs":
            terms = {"generated": self.cross_entropy(generated, view, labels)}
        else:
            mixed = self.ratio * generated + (1 - self.ratio) * generated @ self.image_adapter
            away = same_class_similarity(generated, inputs, labels)
            terms = {"generated": self.cross_entropy(mixed, view, labels), "away": -self.lambda1 * away}
            inputs = torch.cat([inputs, generated])
        images = adapted(inputs, self.image_adapter.T, self.ratio)
        texts = adapted(self.texts, self.text_adapter.T, self.ratio_text, self.text_gram)
        penalty = batch_penalty(images, texts, reduction=self.reduction, is_shared=True)
        return terms | {"energy": self.lambda2 * penalty}

    # Optimisation

    def configure_optimizers(self) -> Any:
        """One optimiser for the adapters and one for the generator, with a schedule per epoch each."""
        optimizers = [self.optimizer([group]) for group in self.parameter_groups()]
        return optimizers, [self.schedule_of(optimizer) for optimizer in optimizers]

    def step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Steps of the generator, then one of the adapters."""
        adapters, generator = cast(list[LightningOptimizer], self.optimizers())
        view, is_clean = self.view(batch), self.mode == "clean"
        fixed = View(*(branch._replace(unit=branch.unit.detach()) for branch in view))
        for _ in range(self.generator_steps):
            loss = self.generator_loss(fixed if is_clean else view, batch.labels)
            self._minimise(loss, [generator] if is_clean else [adapters, generator])
        terms = self.adapter_loss(view, batch.labels)
        loss = self.total(terms, batch)
        self._minimise(loss, [adapters] if is_clean else [adapters, generator])
        if self.trainer.is_last_batch:
            for scheduler in cast(list[LRScheduler], self.lr_schedulers()):
                scheduler.step()
        return loss.detach()

    def _minimise(self, loss: Tensor, optimizers: list[LightningOptimizer]) -> None:
        """One step; the graph stays, since that of the batch's view serves several."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        for optimizer in optimizers:
            optimizer.step()


def same_class_similarity(generated: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """``D``, between two sets of ``N`` features ``(N, D)`` with the same labels ``(N,)``."""
    is_same = labels[:, None] == labels
    return ((generated @ features.T) * is_same).sum() / len(labels) ** 2
