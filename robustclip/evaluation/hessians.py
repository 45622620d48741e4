"""Compares the curvature of the loss between domains, by the spectral norm of the difference of their Hessians."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustclip.arguments import Count, checked
from robustclip.evaluation.task_callback import TaskCallback, finished_batches, method_of, stage_of
from robustclip.evaluation.writer import share_of
from robustclip.methods import RobustMethod
from robustclip.types import Batch, Task, data_of

SEED = 0x4E5  # of the first direction
EPS = 1e-30  # of a difference that is zero, which has no direction


@checked
class HessianDifference(TaskCallback):
    """Compares the Hessians of the cross-entropy on the first images of every two tasks of the same classes.

    For risks ``R_1``, ``R_2`` of two domains and a step ``v`` of the learning parameters, ``|R_1 - R_2|`` changes, up
    to the third order, by no more than ``|<grad R_1 - grad R_2, v>| + |v|^2 |H_1 - H_2| / 2``. CRoFT's paper
    (https://arxiv.org/abs/2405.16417) argues that its penalty makes Hessians alike; this measures it, as the spectral
    norm ``<stage>/<one>_<other>/hessian/difference``.

    The parameters are those of the method's `parameter_groups`, and the cross-entropy is that of its logits, through
    image and class features. Each process uses images of its own share, and the mean over the processes is logged.

    Args:
        max_samples: images of a task, which are held in memory together with two passes' activations.
        iterations: of the power method.

    Raises:
        ValueError: a number below 1; when a stage is set up, no two tasks of the same classes; when it starts, a method
            without learning parameters.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from robustclip import CLIPDataModule, DataSource, HessianDifference, TeCoA
        >>> callbacks = [HessianDifference(max_samples=4, iterations=2)]
        >>> trainer = Trainer(accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False)
        >>> domains = [DataSource("shapes:colours", name=name) for name in ("one", "other")]  # the same images twice
        >>> _ = trainer.test(TeCoA(), CLIPDataModule(test=domains, image_size=32), verbose=False)
        >>> float(trainer.callback_metrics["test/one_other/hessian/difference"])
        0.0
    """

    def __init__(self, max_samples: Count = 256, iterations: Count = 20) -> None:
        self.max_samples, self.iterations = max_samples, iterations
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}  # images and labels by task

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses data without two tasks of the same classes, and a part of the samples."""
        data = data_of(trainer)
        if stage == "test" and share_of(trainer) is not None:
            raise ValueError("HessianDifference compares images of whole sets; leave it out, or set shards to 1")
        if not pairs(data.test_tasks if stage == "test" else data.val_tasks):
            where = "data.test" if stage == "test" else "data.val"
            raise ValueError(f"HessianDifference needs two tasks of the same classes in {where}; give their domains")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a method without learning parameters; some have theirs only after a checkpoint was loaded."""
        if not method_of(pl_module).trained_names:
            name = type(pl_module).__name__
            raise ValueError(f"HessianDifference needs a method with learning parameters, but {name} has none")

    on_validation_start = on_test_start

    def begin(self, trainer: Trainer, method: RobustMethod) -> None:
        """Starts with the images that an earlier start of the test has finished."""
        tasks = stage_of(trainer)[1]
        self._seen = {task.name: [] for task in tasks}
        for task in tasks if trainer.testing else ():
            for batch in finished_batches(trainer, task.name):
                self._keep(task, batch)

    def see(self, trainer: Trainer, method: RobustMethod, task: Task, batch: Batch, logits: Any) -> None:
        """Keeps the first images of each task."""
        self._keep(task, batch)

    def _keep(self, task: Task, batch: Batch) -> None:
        seen = self._seen[task.name]
        missing = self.max_samples - sum(len(labels) for _, labels in seen)
        if missing > 0:
            seen.append((batch.images[:missing], batch.labels[:missing]))

    def end(self, trainer: Trainer, method: RobustMethod) -> None:
        """Computes the norms, and logs them."""
        stage, tasks = stage_of(trainer)
        names = method.trained_names
        learning = [parameter for name, parameter in method.named_parameters() if name in names]
        for one, other in pairs(tasks):
            if not (self._seen[one.name] and self._seen[other.name]):
                continue
            # The fused attention kernels have no second derivative.
            with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                difference = self._risk(method, one) - self._risk(method, other)
                value = spectral_norm(difference, learning, iterations=self.iterations)
            method.log(f"{stage}/{one.name}_{other.name}/hessian/difference", value, sync_dist=True)

    def _risk(self, method: RobustMethod, task: Task) -> Tensor:
        # Clones, since tensors made in inference mode cannot be part of a graph.
        images, labels = (torch.cat(parts).clone() for parts in zip(*self._seen[task.name], strict=True))
        head = method.heads[task.name]
        with torch.autocast(method.device.type, enabled=False):
            try:
                method.heads[task.name] = method.class_features(task)  # with a graph, which the head for tests has not
                return F.cross_entropy(method.logits(images, task.name), labels)
            finally:
                method.heads[task.name] = head


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
    if not value.requires_grad:
        return torch.zeros_like(value)
    gradients = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([part.flatten() for part in gradients])
    if not gradient.requires_grad:  # the value is linear
        return torch.zeros_like(value)
    direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(SEED)).to(gradient)
    norm: Tensor = direction.norm()
    for _ in range(iterations):
        direction = direction / norm.clamp(min=EPS)
        products = torch.autograd.grad(gradient, parameters, direction, retain_graph=True, materialize_grads=True)
        direction = torch.cat([part.flatten() for part in products])
        norm = direction.norm()
    return norm
