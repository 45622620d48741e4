"""Difference in curvature between two domains: the spectral norm of the difference of their Hessians."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Count, checked
from robustclip.evaluation.robust import finished_batches, method_of, stage_of
from robustclip.methods import RobustMethod
from robustclip.models.heads import head_logits
from robustclip.types import Batch, Task

SEED = 0x4E5  # of the first direction
EPS = 1e-30  # of a difference that is zero, which has no direction


@checked
class HessianDifference(Callback):
    """Compares the Hessians of the cross-entropy on the first images of every two tasks of the same classes.

    For risks ``R_1``, ``R_2`` of two domains and a step ``v`` of what learns, ``|R_1 - R_2|`` changes, up to the third
    order, by no more than ``|<grad R_1 - grad R_2, v>| + |v|^2 |H_1 - H_2| / 2``. CRoFT's paper
    (https://arxiv.org/abs/2405.16417) argues that its penalty makes Hessians alike; this measures it, as the spectral
    norm ``<stage>/<one>_<other>/hessian/difference``.

    The cross-entropy is that of image and class features; what a method adds to these in its logits is not seen. Each
    process takes images of its own share, and the mean over the processes is logged.

    Args:
        max_samples: images of a task, which are held in memory together with two passes' activations.
        iterations: of the power method.

    Raises:
        ValueError: a number below 1; when a stage is set up, no two tasks of the same classes.
    """

    def __init__(self, max_samples: Count = 256, iterations: Count = 20) -> None:
        self.max_samples, self.iterations = max_samples, iterations
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}  # images and labels by task

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that two tasks have the same classes."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not pairs(data.test_tasks if stage == "test" else data.val_tasks):
            where = "data.test" if stage == "test" else "data.val"
            raise ValueError(f"HessianDifference needs two tasks of the same classes in {where}; give their domains")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts with the images that an earlier start of the test has finished."""
        tasks = stage_of(trainer)[1]
        self._seen = {task.name: [] for task in tasks}
        for task in tasks if trainer.testing else ():
            for batch in finished_batches(trainer, task.name):
                self._keep(task, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the first images."""
        self._keep(stage_of(trainer)[1][dataloader_idx], batch)

    def _keep(self, task: Task, batch: Batch) -> None:
        seen = self._seen[task.name]
        missing = self.max_samples - sum(len(labels) for _, labels in seen)
        if missing > 0:
            seen.append((batch.images[:missing], batch.labels[:missing]))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and logs."""
        method, (stage, tasks) = method_of(pl_module), stage_of(trainer)
        learning = [parameter for parameter in method.parameters() if parameter.requires_grad]
        for one, other in pairs(tasks):
            if not (self._seen[one.name] and self._seen[other.name]):
                continue
            with torch.inference_mode(False), torch.enable_grad():
                difference = self._risk(method, one) - self._risk(method, other)
                value = spectral_norm(difference, learning, iterations=self.iterations)
            method.log(f"{stage}/{one.name}_{other.name}/hessian/difference", value, sync_dist=True)

    # Validation is the same on other tasks.
    on_validation_epoch_start = on_test_epoch_start
    on_validation_batch_end = on_test_batch_end
    on_validation_epoch_end = on_test_epoch_end

    def _risk(self, method: RobustMethod, task: Task) -> Tensor:
        # Clones, since what is made in inference mode cannot be part of a graph.
        images, labels = (torch.cat(parts).clone() for parts in zip(*self._seen[task.name], strict=True))
        with torch.autocast(method.device.type, enabled=False):
            logits = head_logits(method.image_features(images), method.class_features(task), method.clip.logit_scale)
            return F.cross_entropy(logits, labels)


def pairs(tasks: Sequence[Task]) -> list[tuple[Task, Task]]:
    """Every two tasks of the same classes."""
    return [(a, b) for a, b in combinations(tasks, 2) if (a.class_names, a.groups) == (b.class_names, b.groups)]


def spectral_norm(value: Tensor, parameters: Sequence[Tensor], *, iterations: int) -> Tensor:
    """Largest absolute eigenvalue of a scalar's Hessian, by the power method on products with vectors.

    Args:
        value: of the parameters; those that it does not depend on have no curvature.
        parameters: any number, of any shapes.
        iterations: products; the estimate rises with them and never exceeds the norm.
    """
    gradients = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([each.flatten() for each in gradients])
    direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(SEED)).to(gradient)
    norm: Tensor = direction.norm()
    for _ in range(iterations):
        direction = direction / norm.clamp(min=EPS)
        products = torch.autograd.grad(gradient, parameters, direction, retain_graph=True, materialize_grads=True)
        direction = torch.cat([each.flatten() for each in products])
        norm = direction.norm()
    return norm
