"""The base class of test-time defences: procedures between an image and its logits that compose with any method."""

import json
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from robustclip.arguments import Checked
from robustclip.attacks import noise
from robustclip.attacks.perturbation_set import stream
from robustclip.models.clip import CLIPModel
from robustclip.models.heads import head_logits
from robustclip.models.tensor_files import digest
from robustclip.overrides import check_shape
from robustclip.types import Task

PLACE = "model.defence"
OWN_SEED = 0xDEF  # keeps the random numbers of defences apart from those of attacks


class Model(Protocol):
    """The members of a method that a defence may use."""

    clip: CLIPModel
    heads: dict[str, Tensor]
    tasks: dict[str, Task]

    def logits(self, images: Tensor, task: str = "train") -> Tensor:
        """Computes the logits ``(B, C)`` of the method without a defence.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            task: name of the task.
        """
        ...

    def image_features(self, images: Tensor) -> Tensor:
        """Encodes images as unit features ``(B, D)``."""
        ...


class Defence(Checked, nn.Module):
    """Base class of every test-time defence; a subclass overrides `purify`, or `forward` where more than pixels change.

    A defence declares its properties, so that a test can attack it in full:

    - ``is_random``: the logits depend on ``draw``. Random numbers come from `uniform` and `normal` alone.
    - ``needs_gradients``: the defence computes gradients itself, which are then enabled inside it.
    - ``backward``: ``own`` if autograd through the defence is meant to be right; ``none`` if its gradient is cut.

    A defence whose gradient is cut or misleading may override `surrogate` by a differentiable stand-in. A defence
    changes neither the weights of the method nor its own state, and treats every sample by itself. It is no part of
    checkpoints.
    """

    is_random: bool = False
    needs_gradients: bool = False
    backward: Literal["own", "none"] = "own"

    def purify(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Changes the images ``(B, 3, H, W)`` before the method classifies them; by default not at all.

        Args:
            method: method that classifies the images.
            images: ``(B, 3, H, W)`` in [0, 1].
            task: name of the task.
            index: ``(B,)`` sample ids that determine random numbers; None for defences without any.
            draw: number of the draw, from 0; another number gives other random numbers.
        """
        return images

    def forward(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the defended logits ``(B, C)``, by default those of the purified images; arguments as `purify`."""
        return method.logits(self._changed(method, images, task, index, draw), task)

    def surrogate(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns logits ``(B, C)`` whose gradient stands in for the defence's own, by default the defence's logits.

        Attacks call it only where a defence overrides it.

        Args:
            method, images, task, index, draw: see `purify`; the images have gradients.
        """
        return self.forward(method, images, task, index=index, draw=draw)

    # Members that a defence may use

    def uniform(self, index: Tensor | None, shape: tuple[int, ...], *, draw: int, part: int = 0) -> Tensor:
        """Draws ``(B, *shape)`` from [0, 1) by sample id.

        Args:
            index: ``(B,)`` sample ids.
            shape: shape of one sample.
            draw: number of the draw.
            part: number of the place in the defence; another number gives independent numbers.
        """
        return noise.uniform(_given(index), shape, seed=self._seed(draw, part))

    def normal(self, index: Tensor | None, shape: tuple[int, ...], *, draw: int, part: int = 0) -> Tensor:
        """Draws standard normal numbers ``(B, *shape)`` by sample id.

        Args:
            index, shape, draw, part: see `uniform`.
        """
        return noise.normal(_given(index), shape, seed=self._seed(draw, part))

    def classify(self, method: Model, features: Tensor, task: str, *, head: Tensor | None = None) -> Tensor:
        """Returns the logits ``(B, C)`` of unit features ``(B, D)``.

        Args:
            method: method with the classifier.
            features: ``(B, D)``.
            task: name of the task.
            head: classifier weights in place of the method's.

        Raises:
            ValueError: the logits of the method depend on more than the similarity of features.
        """
        owner = next(cls for cls in type(method).__mro__ if "logits" in vars(cls))
        if owner.__name__ != "RobustMethod":
            raise ValueError(
                f"{PLACE}: {type(self).__name__} changes features, but {owner.__name__} computes logits of its own from"
                " images; choose a defence that changes pixels"
            )
        return head_logits(features, method.heads[task] if head is None else head, method.clip.logit_scale)

    # Members that an evaluation uses

    def answer(self, method: Model, images: Tensor, task: str, *, index: Tensor | None = None, draw: int = 0) -> Tensor:
        """Returns the defended logits ``(B, C)``, with gradients only if the caller has enabled them.

        Args:
            method, images, task, index, draw: see `purify`.

        Raises:
            ValueError: the batch holds embeddings, a random defence gets no sample ids, or a function of the subclass
                returns another shape.
        """
        self._check(images, index)
        is_recorded = torch.is_grad_enabled()
        # Inference mode is left, since its tensors could not take part in gradients; a defence may change its copy.
        with torch.inference_mode(False), torch.set_grad_enabled(is_recorded or self.needs_gradients):
            logits: Tensor = self(method, images.clone(), task, index=_usable(index), draw=draw)
        check_shape(self, "forward", logits, (len(images), len(method.heads[task])), "(B, C)")
        return logits if is_recorded else logits.detach()

    def purified(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the images of `purify` without gradient; raises the errors of `answer`.

        Args:
            method, images, task, index, draw: see `purify`.
        """
        self._check(images, index)
        with torch.inference_mode(False), torch.set_grad_enabled(self.needs_gradients):
            changed = self._changed(method, images.detach().clone(), task, _usable(index), draw)
        return changed.detach()

    @property
    def overrides(self) -> set[str]:
        """Names among `purify`, `forward` and `surrogate` that the subclass defines."""
        names = ("purify", "forward", "surrogate")
        return {name for name in names if getattr(type(self), name) is not getattr(Defence, name)}

    @property
    def description(self) -> dict[str, Any]:
        """Class, declared properties, public attributes and a digest of the tensors, in JSON's types."""
        declared = {name: getattr(self, name) for name in ("is_random", "needs_gradients", "backward")}
        public = {name: value for name, value in vars(self).items() if name[0] != "_" and name != "training"}
        tensors = {name: part.detach() for name, part in (*self.named_parameters(), *self.named_buffers())}
        weights = {"weights": digest(tensors)[:16]} if tensors else {}
        return {"class": type(self).__name__, **declared, **_plain(public), **weights}

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Returns no tensors, so that checkpoints and fingerprints of a method do not depend on its defence."""
        return {} if destination is None else destination

    def _check(self, images: Tensor, index: Tensor | None) -> None:
        if images.ndim != 4:
            raise ValueError(f"{PLACE} needs images, data.features gives embeddings; set one of them to null")
        if self.is_random and index is None:
            raise ValueError(
                f"{PLACE}: {type(self).__name__} is random and needs the sample ids, which an attack that chooses"
                " samples itself does not pass on; choose another attack"
            )

    def _changed(self, method: Model, images: Tensor, task: str, index: Tensor | None, draw: int) -> Tensor:
        changed = self.purify(method, images, task, index=index, draw=draw)
        check_shape(self, "purify", changed, tuple(images.shape), "(B, 3, H, W) of its images")
        return changed

    def _seed(self, draw: int, part: int) -> int:
        return stream(stream(OWN_SEED, draw + 1), 0x10000 * (part + 1))


def _given(index: Tensor | None) -> Tensor:
    if index is None:
        raise ValueError(f"{PLACE}: random numbers need the sample ids; declare the defence as is_random")
    return index


def _usable(tensor: Any) -> Any:
    """Copies a tensor of inference mode, which could not take part in gradients."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values to JSON's types; other values become their type's name."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=lambda value: type(value).__name__))
    return plain
