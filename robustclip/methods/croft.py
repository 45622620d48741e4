"""CRoFT, linear adapters trained for a small energy gradient, also on features under a generated shift."""

from typing import Any, Literal, NamedTuple, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from robustclip.arguments import CountOrZero, NonNegative, Positive, Share
from robustclip.methods._shared.distributed import all_gather_rows
from robustclip.methods._shared.frozen_towers import FrozenFeatures
from robustclip.objectives.energy import Branch, Reduction, adapted, batch_penalty, sample_penalty
from robustclip.types import Batch, Task

Mode = Literal["clean", "official", "official_vlcs"]


class View(NamedTuple):
    """Image and text features of a batch, before and after the adapters.

    Attributes:
        images: features of the ``B`` images.
        texts: features of the ``C`` classes.
    """

    images: Branch
    texts: Branch


class CRoFT(FrozenFeatures):
    """CRoFT (Zhu et al., ICML 2024, https://arxiv.org/abs/2405.16417; https://github.com/LinLLLL/CRoFT).

    Linear adapters that start at the identity follow both towers, ``u = r x A^T + (1 - r) x`` and
    ``v = r_t t B^T + (1 - r_t) t``. A generator ``G`` makes features under a covariate shift, ``z = (u^ G^T + u^)^``,
    where ``^`` scales to unit length. With ``CE`` of ``s cos``, adapters and generator are trained in turn:

        A, B:  CE(u) + lambda1 CE(z') + lambda2 (L_e(x) + L_e(z)),   z' = r z A^T + (1 - r) z
        G:     CE(z) + lambda1 D(z, u),   D = sum_{y_i = y_j} <z_i, u^_j> / N^2

    ``L_e`` is the squared gradient of the energy with respect to the adapters, see `energy`. Predictions do not use
    ``G``.

    The ``mode`` ``clean`` is the above; ``official`` is the computation of the authors' code. There every step updates
    all three matrices, gradients pass through ``z``, and all steps of a batch use the outputs of its first step.
    ``L_e`` has ``A`` and ``B`` in place of their transposes, one shift for both, and one sum over images and generated
    features; the terms of ``z`` are ``CE(r z + (1 - r) z A) - lambda1 D(z, x)``. The mode ``official_vlcs``, or 0
    generator steps, replaces these terms by ``CE(z)`` and leaves ``z`` out of ``L_e``. In all modes, features have unit
    length before the adapters. This only changes the weight of the code's 1e-6 that is added to norms. The energy's
    gradient is taken at the adapters, not 1e-4 away from them.

    The weight decay of 0.1 shrinks the adapters; since scale does not matter, it pulls them to the zero-shot model.
    Losses are not means over samples, so all processes compute those of the whole batch. Several processes need the
    strategy ``ddp_find_unused_parameters_true``. ``max_steps`` counts the steps of both optimisers.

    Args:
        mode: ``clean``, ``official`` or ``official_vlcs``, as above.
        ratio: ``r``, weight of the image adapter.
        ratio_text: ``r_t``, weight of the text adapter.
        generator_steps: steps of the generator per batch; 0 in official modes alone.
        lambda1: weight of the terms of generated features.
        lambda2: weight of the energy's gradient.
        penalty: ``batch`` takes the gradient of the energies' sum, as the code does, ``sample`` that of each image's
            energy.
        reduction: reduction of ``batch``; ``sum`` is the code's for its ImageNet split, where the same ``lambda2``
            weighs ``(N C / D)^2`` times as much.
        energy_scale: scale of the cosines in the energy of ``sample``; null for the model's, with which scores and
            predictions are computed.
        kwargs: arguments of `FrozenFeatures`; adapters and generator have an optimiser each.

    Raises:
        ValueError: an option is unknown, a ratio is outside [0, 1], a number is negative, the penalty is ``sample`` in
            an official mode, or ``batch``, whose sum has no scale, has one.

    Examples:
        >>> import torch
        >>> from robustclip import Batch, CRoFT, Task
        >>> model = CRoFT(lambda1=1.0, lambda2=5.0)
        >>> model.prepare_training(Task("colours", ("red", "blue"), ("a {} shape",)))
        >>> batch = Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), torch.arange(2))
        >>> sorted(model.training_loss(batch))
        ['clean_ce', 'energy', 'generated']
    """

    training_arguments: tuple[str, ...] = (
        "mode",
        "generator_steps",
        "lambda1",
        "lambda2",
        "penalty",
        "reduction",
        "energy_scale",
    )

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
        energy_scale: Positive | None = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.mode, self.ratio, self.ratio_text = mode, ratio, ratio_text
        self.generator_steps, self.lambda1, self.lambda2 = generator_steps, lambda1, lambda2
        self.penalty, self.reduction, self.energy_scale = penalty, reduction, energy_scale
        self._check()
        self.image_adapter, self.text_adapter, self.generator = (nn.Parameter(torch.eye(self.width)) for _ in range(3))
        self.texts = self.text_gram = torch.empty(0)

    def _check(self) -> None:
        if self.mode == "clean" and self.generator_steps < 1:
            raise ValueError(f"generator_steps must be at least 1 in mode 'clean', got {self.generator_steps}")
        if self.mode != "clean" and self.penalty == "sample":
            raise ValueError(f"penalty must be 'batch' in mode {self.mode!r}, got 'sample'; the code has no other")
        if self.penalty == "batch" and self.energy_scale != 1:
            raise ValueError(f"energy_scale must be 1 where penalty is 'batch', got {self.energy_scale}; set 'sample'")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns two groups, the adapters and the generator."""
        return [{"params": [self.image_adapter, self.text_adapter]}, {"params": [self.generator]}]

    def image_features(self, images: Tensor) -> Tensor:
        """Encodes images ``(B, 3, H, W)`` in [0, 1], or embeddings ``(B, D)``, as adapted unit features ``(B, D)``."""
        return adapted(super().image_features(images), self.image_adapter, self.ratio).unit

    def class_features(self, task: Task) -> Tensor:
        """Encodes the task's classes as adapted unit features ``(C, D)``."""
        return adapted(super().class_features(task), self.text_adapter, self.ratio_text).unit

    def prepare_training(self, task: Task) -> None:
        """Encodes the training classes and stores their features before the adapter."""
        super().prepare_training(task)
        self.texts = super().class_features(task)
        self.text_gram = self.texts @ self.texts.T

    # Losses

    def view(self, batch: Batch) -> View:
        """Applies the present adapters to a batch of images, or of embeddings ``(B, D)``, and to the class texts."""
        images = adapted(super().image_features(batch.images), self.image_adapter, self.ratio)
        return View(images, adapted(self.texts, self.text_adapter, self.ratio_text, self.text_gram))

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the terms of the loss that trains the adapters."""
        return self.adapter_loss(self.view(batch), batch.labels)

    def adapter_loss(self, view: View, labels: Tensor) -> dict[str, Tensor]:
        """Returns the adapters' loss: cross-entropy, the terms of generated features, and the energy's gradient.

        Args:
            view: features of the batch.
            labels: ``(B,)``.
        """
        terms = self._clean_terms if self.mode == "clean" else self._official_terms
        return {"clean_ce": self.cross_entropy(view.images.unit, view, labels), **terms(view, labels)}

    def generator_loss(self, view: View, labels: Tensor) -> Tensor:
        """Returns the generator's loss, low for features that are classified correctly but unlike their class.

        Args:
            view: features of the batch.
            labels: ``(B,)``.
        """
        generated = self.generate(view.images.unit)
        similarity = _same_class_similarity(generated, view.images.unit, labels)
        return self.cross_entropy(generated, view, labels) + self.lambda1 * similarity

    def generate(self, features: Tensor) -> Tensor:
        """Generates unit features ``(B, D)`` under a covariate shift from unit features ``(B, D)``."""
        return F.normalize(features @ self.generator.T + features, dim=-1)

    def cross_entropy(self, features: Tensor, view: View, labels: Tensor) -> Tensor:
        """Computes the cross-entropy of features over the view's texts.

        Args:
            features: ``(B, D)``.
            view: features of the class texts.
            labels: ``(B,)``.
        """
        return F.cross_entropy(self.clip.logit_scale * features @ view.texts.unit.T, labels)

    def _clean_terms(self, view: View, labels: Tensor) -> dict[str, Tensor]:
        generated = adapted(self.generate(view.images.unit).detach(), self.image_adapter, self.ratio)
        return {
            "generated": self.lambda1 * self.cross_entropy(generated.unit, view, labels),
            "energy": self.lambda2 * (self._penalty(view.images, view.texts) + self._penalty(generated, view.texts)),
        }

    def _penalty(self, images: Branch, texts: Branch) -> Tensor:
        if self.penalty == "sample":
            scale = self.clip.logit_scale if self.energy_scale is None else self.energy_scale
            return sample_penalty(images, texts, temperature=scale)
        return batch_penalty(images, texts, reduction=self.reduction)

    def _official_terms(self, view: View, labels: Tensor) -> dict[str, Tensor]:
        inputs, generated = view.images.inputs, self.generate(view.images.unit)
        if self.generator_steps == 0 or self.mode == "official_vlcs":
            terms = {"generated": self.cross_entropy(generated, view, labels)}
        else:
            mixed = self.ratio * generated + (1 - self.ratio) * generated @ self.image_adapter
            similarity = _same_class_similarity(generated, inputs, labels)
            terms = {"generated": self.cross_entropy(mixed, view, labels), "away": -self.lambda1 * similarity}
            inputs = torch.cat([inputs, generated])
        images = adapted(inputs, self.image_adapter.T, self.ratio)
        texts = adapted(self.texts, self.text_adapter.T, self.ratio_text, self.text_gram)
        penalty = batch_penalty(images, texts, reduction=self.reduction, is_shared=True)
        return terms | {"energy": self.lambda2 * penalty}

    # Optimisation

    def configure_optimizers(self) -> Any:
        """Builds an optimiser for the adapters and one for the generator, each with a schedule per epoch."""
        optimizers = [self.optimizer([group]) for group in self.parameter_groups()]
        return optimizers, [self.schedule_of(optimizer) for optimizer in optimizers]

    def step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Updates the generator one or more times, then the adapters once."""
        adapters, generator = cast(list[LightningOptimizer], self.optimizers())
        batch = self._gathered_batch(batch)
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

    def _gathered_batch(self, batch: Batch) -> Batch:
        """Returns the batch of all processes, as embeddings: its losses are no means over samples."""
        parts = self.embeddings(batch.images), batch.labels, batch.index
        images, labels, index = (all_gather_rows(self, rows) for rows in parts)
        return batch._replace(images=images, labels=labels, index=index)

    def _minimise(self, loss: Tensor, optimizers: list[LightningOptimizer]) -> None:
        """Takes one optimiser step; the graph is kept, since several steps share the features of the batch."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        for optimizer in optimizers:
            optimizer.step()


def _same_class_similarity(generated: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Computes ``D``, the mean similarity of features ``(N, D)`` with the same label ``(N,)``."""
    is_same = labels[:, None] == labels
    return ((generated @ features.T) * is_same).sum() / len(labels) ** 2
