"""What the tests of the methods share: a tiny problem, its towers in fp64, and attacks written out."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import quick_trainer
from lightning.pytorch import Trainer
from torch import Tensor

from robustclip.attacks import PGD, Attack
from robustclip.data import CLIPDataModule
from robustclip.methods import DANCE, UEO, UPL, AdversarialTraining, FineTuning, RobustMethod, TipAdapter
from robustclip.types import Batch, Task

TASK = Task("train", ("a red circle", "a blue square", "a green star"), ("This is a photo of a {}",))


class Recorded:
    """An attack that keeps the images that it has made."""

    def __init__(self, attack: Attack) -> None:
        self.attack, self.images = attack, torch.empty(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.images = self.attack(*args, **kwargs)
        return self.images


def make(cls: type[RobustMethod], model: Path, **kwargs: Any) -> Any:
    """A method that is ready for its first step on `batch`, with its attack recorded.

    Its image tower has moved away from the pre-trained one, so that the two cannot be taken for each other.
    """
    torch.manual_seed(0)
    method = cls(pretrained=str(model), **kwargs)
    with torch.no_grad():
        for parameter in method.clip.net.visual.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    if isinstance(method, AdversarialTraining):
        method.add_classifier(len(TASK.class_names))
    if isinstance(method, FineTuning):
        head = torch.randn(len(TASK.class_names), 16, generator=torch.Generator().manual_seed(5))
        method.add_classifier(TASK.class_names, head)
    if isinstance(method, UEO):
        method.sample_weights = torch.rand(100, generator=torch.Generator().manual_seed(6)) * 0.6 + 0.4
    if isinstance(method, TipAdapter):
        keys = unit(torch.randn(6, 16, generator=torch.Generator().manual_seed(7)))
        method.add_cache(TASK.class_names, keys, torch.arange(6) % 3)
    if isinstance(method, DANCE):
        method.bank = unit(torch.randn(100, 16, generator=torch.Generator().manual_seed(8)))
        method.bank[3] = 0  # no image has this id
    if isinstance(method, UPL):
        method.pseudo_labels = torch.arange(100) % 4 - 1  # every fourth image has none
    method.freeze_untrained()
    method.prepare_training(TASK)
    if method.attack is not None:
        method.attack = Recorded(method.attack)
    return method


def batch(size: int = 4) -> Batch:
    images = torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return Batch(images, torch.arange(size) % 3, torch.arange(size) + 10)


def in_fp64(method: RobustMethod) -> Any:
    return copy.deepcopy(method).double()


def embed(method: RobustMethod, images: Tensor) -> Tensor:
    """Raw open_clip embeddings, not normalised."""
    return method.clip.net.visual((images - method.clip.mean) / method.clip.std)


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt()


def logits(method: RobustMethod, images: Tensor) -> Tensor:
    """``s cos(f(x), t)`` from the raw open_clip towers."""
    prompts = method.clip.tokenizer([f"This is a photo of a {name}" for name in TASK.class_names])
    text = unit(method.clip.net.encode_text(prompts))
    return method.clip.net.logit_scale.exp() * unit(embed(method, images)) @ text.detach().T


def cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(z)_y`` per sample."""
    return z.exp().sum(1).log() - z[range(len(z)), labels]


def assert_the_loss_is(method: RobustMethod, data: Batch, expected: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    """Compares value and gradient of a training loss with a formula.

    Args:
        method: in fp32.
        data: its batch.
        expected: of the method in fp64, clean and attacked images.
    """
    twin = in_fp64(method)
    loss = torch.stack(list(method.training_loss(data).values())).sum()
    loss.backward()
    attacked = data.images if method.attack is None else method.attack.images
    reference = expected(twin, data.images.double(), attacked.double())
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)
    names = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(reference, [twin.get_parameter(name) for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        found = method.get_parameter(name).grad
        # fp32 against fp64: relative to the largest entry, since single entries may cancel to nothing.
        assert found is not None, name
        assert (found - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name


def assert_the_attack_maximises(
    method: RobustMethod, data: Batch, objective: Callable[[Any, Tensor, Tensor], Tensor]
) -> None:
    """Compares the images of a training step with projected gradient ascent in fp64.

    Args:
        method: in fp32, with an L-infinity `PGD`.
        data: its batch.
        objective: of the method in fp64, clean and attacked images: what the attack should maximise, summed.
    """
    twin, x = in_fp64(method), data.images.double()
    method.training_loss(data)
    attack = method.attack.attack
    start = PGD(eps=attack.eps, steps=0)
    delta = start(data.images, lambda images: images, data.labels, index=data.index, seed=0).double() - x
    assert attack.steps > 0
    for _ in range(attack.steps):
        delta = delta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(twin, x, x + delta), delta)
        delta = (delta + attack.alpha * gradient.sign()).clamp(-attack.eps, attack.eps)
        delta = torch.minimum(torch.maximum(delta, -x), 1 - x)
    # A gradient that is zero up to rounding may change its sign; no more than one pixel in a hundred may differ.
    differs = ((x + delta) - method.attack.images).abs() > 1e-6
    assert differs.float().mean() < 1e-2


def fit(method: RobustMethod, *, steps: int, ckpt_path: Path | None = None, shots: int | None = None) -> Trainer:
    trainer = quick_trainer(max_steps=steps, limit_val_batches=0)
    data = CLIPDataModule(train="shapes:source", batch_size=4, image_size=32, shots=shots)
    trainer.fit(method, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def test(method: RobustMethod, ckpt_path: Path) -> dict[str, float]:
    trainer = quick_trainer(limit_test_batches=1)
    data = CLIPDataModule(test=["shapes:colours"], batch_size=4, image_size=32)
    trainer.test(method, datamodule=data, ckpt_path=str(ckpt_path), weights_only=True, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


test.__test__ = False  # a helper, which pytest would otherwise collect where it is imported


def assert_the_attack_does_not_depend_on_the_batch(method: RobustMethod, data: Batch) -> None:
    """Compares the attacked images of a batch with those of its first half."""
    method.training_loss(data)
    whole, half = method.attack.images, len(data.labels) // 2
    method.training_loss(Batch(*(part[:half] for part in data[:3])))
    assert len(method.attack.images) == half
    assert ((method.attack.images - whole[:half]).abs() > 1e-6).float().mean() < 1e-2  # signs of rounding errors


def linear(
    cls: type[RobustMethod], model: Path, *, student: Any, images: Any, texts: Any, labels: Any, **options: Any
) -> tuple[Any, Batch]:
    """A method in fp64 on images of two pixels, whose tower is the matrix ``weight`` and whose teacher is the identity.

    Args:
        cls: class of the method.
        model: model that is replaced.
        student: the matrix of the tower.
        images: pixels of the images.
        texts: class features.
        labels: labels of the images.
        options: arguments of the method.
    """

    def flat(pixels: Tensor) -> Tensor:
        return pixels.flatten(1)

    method: Any = cls(pretrained=str(model), **options)
    method.weight = torch.nn.Parameter(torch.tensor(student, dtype=torch.float64))
    method.image_features = lambda pixels: unit(flat(pixels) @ method.weight.T)
    method.teacher.encode_image = lambda pixels: unit(flat(pixels))
    method.heads["train"] = torch.tensor(texts, dtype=torch.float64)
    method.attack = Recorded(method.attack)
    pixels = torch.tensor(images, dtype=torch.float64).view(-1, 1, 1, 2)
    return method, Batch(pixels, torch.tensor(labels), torch.arange(len(labels)))
