"""Any classifier of images, made a method, so that the engine, ledgers and audit of a test take it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustclip.methods import RobustMethod
from robustclip.models.clip import fingerprint
from robustclip.types import Batch, Task


class AnyModel(RobustMethod):
    """A classifier of images in [0, 1], for evaluation alone.

    Class texts play no part: the model's outputs are the logits of the test set's classes, in their order.

    Args:
        model: function from images ``(B, 3, H, W)`` in [0, 1] to logits ``(B, C)``, as a tensor, a NumPy array, or the
            attribute ``logits`` of the answer; it may change its images. Modules run in eval mode.
        image_size: side of the images that the model receives, in pixels.
        name: identifies a model without parameters, whose content cannot be compared.

    Raises:
        ValueError: the model has no parameters, and no name is given; or it is a class.
    """

    object_arguments = (*RobustMethod.object_arguments, "model")

    def __init__(self, model: Callable[[Tensor], Tensor], image_size: int, name: str | None = None) -> None:
        super().__init__(pretrained="shapes")
        if isinstance(model, type):
            raise ValueError(f"model must be an instance, got the class {model.__name__}; write {model.__name__}()")
        # Modules of TorchScript are wrapped too, since they take no hooks, which probes need.
        is_plain = isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)
        module: nn.Module = model if is_plain else _Function(model)  # type: ignore[assignment]
        if name is None and not module.state_dict():
            raise ValueError("name must be given for a model without parameters, since it identifies the test")
        self.clip = _Tower(module.eval(), image_size)  # type: ignore[assignment]  # all that a test reads of a model
        self.class_counts: dict[str, int] = {}

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        """Computes the logits ``(B, C)`` of images ``(B, 3, H, W)`` in [0, 1], in fp32 at least.

        Raises:
            ValueError: the model returns no logits, or another number than the task has classes.
        """
        try:
            answer = self.clip.net.visual(images.clone())  # a copy, which the model may change
        except Exception as error:
            given = f"{str(images.dtype).removeprefix('torch.')} images of shape {tuple(images.shape)}"
            error.add_note(f"The model received {given}; image_size sets their side, their number varies.")
            raise
        logits = _tensor(getattr(answer, "logits", answer))
        expected = (len(images), self.class_counts[task])
        if logits.shape != expected:
            raise ValueError(f"the model must return logits of shape {expected} on {task!r}, got {tuple(logits.shape)}")
        # A copy, since some models write every answer into the same memory.
        return logits.to(images.device, torch.promote_types(logits.dtype, torch.float32), copy=True)

    def prepare(self, tasks: Any) -> None:
        """Records the number of classes of each task."""
        self.class_counts |= {task.name: len(task.label_names) for task in tasks}

    def class_features(self, task: Task) -> Tensor:
        """Refuses, since the model has no text tower."""
        raise ValueError("a model without a text tower has no class features; leave out callbacks that use them")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns no parameters, so that everything is frozen."""
        return []

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns no terms, since nothing is trained."""
        return {}


def _tensor(answer: Any) -> Tensor:
    """Returns logits as a tensor.

    Raises:
        ValueError: the answer is neither a dense tensor nor a NumPy array of real numbers.
    """
    if not isinstance(answer, Tensor | np.ndarray):
        kind = type(answer).__name__
        raise ValueError(f"the model must return a tensor of logits, got {kind}; wrap it in a function that picks them")
    if isinstance(answer, Tensor):
        is_fit, layout = not answer.is_complex() and answer.layout == torch.strided, f" in layout {answer.layout}"
    else:
        is_fit, layout = answer.dtype.kind in "fiub", ""
    if not is_fit:
        kind = f"{answer.dtype}{layout}"
        raise ValueError(f"the model must return a dense tensor of real numbers as logits, got {kind}; convert it")
    return torch.as_tensor(answer)


class _Function(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


class _Tower(nn.Module):
    """The attributes of a `CLIPModel` that a test reads; pixels are not normalised before the model."""

    arch = pretrained = source = None

    def __init__(self, model: nn.Module, image_size: int) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.visual = model
        self.image_size = image_size
        self.register_buffer("mean", torch.zeros(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(3, 1, 1), persistent=False)
        self.settings = {"image_size": image_size, "model": type(model).__name__}
        self.fingerprint = fingerprint(self.net)
