"""Probes: measurements of the model on some samples of a test, for the audit to grade; see the ledger's columns."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustclip.attacks import APGD, PGD, Attack, Member, noise
from robustclip.attacks.attack import Forward
from robustclip.attacks.perturbation_set import Norm
from robustclip.attacks.sample_losses import cross_entropy
from robustclip.evaluation.engine import ROBUST, examine, outputs
from robustclip.evaluation.gradient_probes import APPROACH, LENGTHS, NODES, margin_gradient
from robustclip.models.clip import CLIPModel

QUOTA = 256  # samples of a task that are probed: 59 survivors, who bound a masked share by 5 %, if 23 % are robust
FINE = 4  # a quarter as many have their gradients examined, which costs as much as an attack
STREAM_SHARE = 1 / 64  # share of the probed samples of a task whose number of samples is not known
PROBE_SEED = 0x5EED
WIDER, LONGER = 4.0, 2.0  # factors of the radius and of the steps of a probe
ANYTHING = 0.5  # at this radius every image can be made grey, so that no model is correct (arXiv:1802.00420)
STEPS = 20  # of the other attack and of the transferred one

REPEATS = 5  # further passes of a sample whose gradients are examined
NEAR = 4 / 255  # distance of images that a model with a memory still takes for a seen one
DOUBLINGS = 4  # of the radius until `ANYTHING`
LARGE = 2**20  # numbers in a tensor from which on its content is not read to notice a change


def draws(index: Tensor) -> Tensor:
    """Draws a number ``(B,)`` in [0, 1) from each sample id; the samples with the smallest ones are probed."""
    return noise.uniform(index, (1,), seed=PROBE_SEED)[:, 0]


def share_of(quota: int, size: int | None) -> float:
    """Computes the share of a task's samples that are probed.

    Args:
        quota: number of samples to probe.
        size: number of samples of the task; None if it is not known.
    """
    return min(1.0, quota / size) if size else STREAM_SHARE * min(1, quota)


def passes_of_probes(gradients: Sequence[int]) -> float:
    """Computes the gradient passes per probed sample, as if no attack stopped early, without borrowed gradients.

    Args:
        gradients: gradient passes of each attack of the test.
    """
    of_attacks = sum((1 + LONGER) * count + 2 * STEPS for count in gradients)
    return of_attacks + (APPROACH + (len(LENGTHS) + 1) * NODES + REPEATS) / FINE


def repeat(images: Tensor, forward: Forward, logits: Tensor, *, clip: CLIPModel) -> dict[str, Tensor]:
    """Runs images again, this time in one batch with their mirror images.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        forward: function from images to logits.
        logits: ``(B, C)`` of the first run.
        clip: model whose image tower must receive the images normalised once.

    Returns:
        ``repeat``, the largest change ``(B,)`` of a logit, and ``outside``, the largest distance ``(B,)`` of a pixel
        from [0, 1]; see the ledger's columns.
    """
    seen: list[Tensor] = []
    hook = clip.net.visual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.inference_mode(False), torch.no_grad():
            images = images.clone()
            again = forward(torch.cat([images, images.flip(-1)]))[: len(images)]
    finally:
        hook.remove()
    columns: dict[str, Tensor] = {"repeat": (again - logits).abs().amax(-1)}
    if len(seen) == 1 and len(seen[0]) == 2 * len(images):
        unit = seen[0][: len(images)].float() * clip.std + clip.mean
        columns["outside"] = torch.maximum(-unit, unit - 1).flatten(1).amax(1).clamp(min=0)
    return columns


def losses(images: Tensor, labels: Tensor, forward: Forward) -> Tensor:
    """Computes the cross-entropy ``(B,)`` of images, without gradients.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: function from images to logits.
    """
    with torch.inference_mode(False), torch.no_grad():
        return cross_entropy(forward(images.clone()), labels.clone())


def bound(forward: Forward, index: Tensor) -> Forward:
    """Passes the sample ids of images, or of several copies of them, to a model that needs them.

    Args:
        forward: function from images to logits, or an `Indexed` model.
        index: ``(B,)`` ids of the samples.
    """
    return lambda images: outputs(forward, images, index.repeat(len(images) // len(index)))


def advances_generators(images: Tensor, labels: Tensor, forward: Forward) -> bool:
    """Returns whether a forward and a backward pass draw from a global random generator.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: function from images to logits.
    """
    before = _generators(images.device)
    with torch.inference_mode(False), torch.enable_grad():
        margin_gradient(images, labels.clone(), forward)
    return any(old != new for old, new in zip(before, _generators(images.device), strict=True))


def _generators(device: torch.device) -> list[Any]:
    """Lists the states of the generators of torch, numpy and Python."""
    states: list[Any] = [torch.random.get_rng_state().numpy().tobytes()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device).numpy().tobytes())
    numpy_state = np.random.get_state()  # the global generator is what is examined
    return [*states, [part.tobytes() if hasattr(part, "tobytes") else part for part in numpy_state], random.getstate()]


AUTOGRAD = (
    (torch.autograd, "grad"),
    (torch.autograd, "backward"),
    (torch.Tensor, "backward"),
    (torch, "enable_grad"),
    (torch, "set_grad_enabled"),
)


def autograd_calls(images: Tensor, forward: Forward, module: nn.Module) -> int:
    """Counts the calls that compute gradients during one answer, and the inputs of the module with gradients on.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        forward: function from images to logits.
        module: image tower of the model.
    """
    count = [0]

    def seen(*_: Any) -> None:
        count[0] += torch.is_grad_enabled()

    hook = module.register_forward_pre_hook(seen)
    try:
        with torch.inference_mode(False), torch.no_grad():
            images = images.clone()
            with _counted(count):
                forward(images)
    finally:
        hook.remove()
    return count[0]


@contextmanager
def _counted(count: list[int]) -> Iterator[None]:
    """Counts the calls of `AUTOGRAD` inside the context; ``set_grad_enabled(False)`` does not count."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in AUTOGRAD]

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            count[0] += name != "set_grad_enabled" or args != (False,)
            return function(*args, **kwargs)

        return counted

    try:
        for owner, name, function in originals:
            setattr(owner, name, counting(name, function))
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def state_change(
    images: Tensor, forward: Forward, module: nn.Module, step: Callable[[Tensor], object] = lambda _: None
) -> Tensor:
    """Measures whether other images change the answers to the first ones and to images near them, or change tensors.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        forward: function from images to logits.
        module: model with its parameters, buffers and other tensors.
        step: test step of the model on images.

    Returns:
        Largest change ``(B,)`` of a logit; infinity where a tensor changed; nan where repeated answers differ as well.
    """
    with torch.inference_mode(False), torch.no_grad():
        images, only = images.clone(), torch.zeros(1, dtype=torch.long, device=images.device)
        draws_of_pixels = noise.uniform(only, images.shape[1:], seed=PROBE_SEED)
        near = (images + NEAR * (draws_of_pixels - 0.5).sign()).clamp(0, 1)

        def answers() -> Tensor:
            return torch.cat([forward(images), forward(near)], 1)

        step(images)
        first, second = answers(), answers()
        before, others = _tensors(module), 1 - images.flip(-1)
        forward(others)
        third = answers()
        if _differ(before, _tensors(module)):
            return torch.full_like(first[:, 0], torch.inf)
        step(others)
        fourth = answers()
        step(images)
        return torch.fmax(_beyond_noise(third, first, second), _beyond_noise(fourth, first, second))


def _tensors(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Returns shape and sums of all tensors of a module, those in its lists and mappings too.

    Of large ones, whose sums take time, it returns place in memory and number of changes.
    """
    tensors: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        for key, value in {**vars(part), **part._parameters, **part._buffers}.items():
            entries = value.items() if isinstance(value, dict) else enumerate(value) if _is_listing(value) else ()
            pairs = [(key, value), *((f"{key}.{number}", entry) for number, entry in entries)]
            tensors |= {f"{name}.{place}": entry for place, entry in pairs if isinstance(entry, Tensor)}
    return {place: _marks(tensor) for place, tensor in tensors.items()}


def _marks(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.numel() > LARGE and not tensor.is_inference():
        return (tensor.shape, tensor.data_ptr(), tensor._version), 0.0, 0.0
    return tensor.shape, float(tensor.double().sum()), float(tensor.double().square().sum())


def _is_listing(value: Any) -> bool:
    return isinstance(value, list | tuple) or type(value).__name__ == "deque"


def _differ(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> bool:
    """Returns whether a tensor was added, or changed by more than a thousandth."""
    if any(place not in before or before[place][0] != after[place][0] for place in after):
        return True
    return any(
        abs(old - new) > 1e-3 * max(abs(old), abs(new), 1e-12)
        for place in after
        for old, new in zip(before[place][1:], after[place][1:], strict=True)
    )


def label_leak(step: Callable[[Tensor], Tensor], labels: Tensor, classes: int) -> Tensor:
    """Measures whether the answers of a test step depend on the labels.

    Args:
        step: function from labels ``(B,)`` to the logits of the test step ``(B, C)``, for fixed images.
        labels: ``(B,)``, which are passed last, so that the model keeps no false ones.
        classes: number of classes.

    Returns:
        Largest change ``(B,)`` of a logit with other labels; nan where repeated answers differ as well.
    """
    others = [step((labels + shift) % classes).clone() for shift in (1, classes // 2)]
    first, second = step(labels).clone(), step(labels)
    return torch.stack([_beyond_noise(other, first, second) for other in others]).amax(0)


def _beyond_noise(others: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Computes the largest difference ``(B,)`` of logits, nan where it is no larger than that of two equal calls."""
    change, noise_level = (others - second).abs().amax(-1), (second - first).abs().amax(-1)
    return torch.where((noise_level == 0) | (change > 10 * noise_level), change, torch.nan)


def stronger(attack: Attack, by: Tensor, images: Tensor) -> list[tuple[str, Tensor, Sequence[Attack | None]]]:
    """Lists the probes by an attack that is stronger than the first member.

    Args:
        attack: first member.
        by: ``(B,)`` verdict on the probed samples.
        images: any images of the task, for their size.

    Returns:
        Column of the ledger, mask ``(B,)`` of the samples, and stronger attacks, one of which must succeed on each;
        None stands for an attack that cannot be scaled.
    """
    is_misclassified = by == 0
    probes: list[tuple[str, Tensor, Sequence[Attack | None]]] = []
    if attack.eps:
        probes = [("wider", is_misclassified, [attack.scaled(radius=WIDER)])]
        half = ANYTHING * (math.sqrt(images[0].numel()) if attack.norm == "l2" else 1)
        if attack.eps < half and attack.norm != "l1":  # sparse steps would not reach every pixel
            # By doubled radii: far away a sound model sees no detail, and its gradient may lead nowhere.
            factors = [half / attack.eps / 2**halvings for halvings in range(DOUBLINGS, -1, -1)]
            probes.append(("wider", by == ROBUST, [attack.scaled(radius=factor) for factor in factors if factor > 1]))
    return [*probes, ("longer", is_misclassified, [attack.scaled(steps=LONGER)])]


def other_attack(members: Sequence[Member]) -> Attack | None:
    """Returns an attack with another loss and another search than those of the test, at its largest radius.

    This is APGD with the margin; where the test has that already, PGD with the margin. None without a radius.

    Args:
        members: attacks of the test.
    """
    first = largest([member.attack for member in members])
    if first is None or not first.eps:
        return None
    norm = norm_of(first)
    if any(isinstance(member.attack, APGD) and member.attack.loss != "ce" for member in members):
        return PGD(first.eps, first.eps / 4, STEPS, norm, loss="margin")
    return APGD(first.eps, STEPS, norm, "margin")


def norm_of(attack: Attack) -> Norm:
    """Returns the norm of an attack; that of other attacks than the package's may have another name."""
    names: dict[str, Norm] = {"l2": "l2", "l1": "l1"}
    return names.get(attack.norm, "linf")


def largest(attacks: Sequence[Attack]) -> Attack | None:
    """Returns the first attack of the largest radius, or None if none has a radius."""
    return max((attack for attack in attacks if attack.eps), key=lambda attack: attack.eps or 0, default=None)


def probe_outcomes(
    images: Tensor,
    labels: Tensor,
    forward: Forward,
    attacks: Sequence[Attack | None],
    *,
    index: Tensor,
    seed: int,
    logits: Tensor | None = None,
) -> list[int | str]:
    """Returns 1 for each sample that one of some attacks misclassifies on any image that it tries, else 0.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: function from images to logits.
        attacks: attacks of the probe without those that are None; if none remains, all cells are empty.
        index: ``(B,)`` ids of the samples.
        seed: seed of the attack.
        logits: ``(B, C)`` of the images if they are known.
    """
    members = [Member("probe", attack) for attack in attacks if attack is not None]
    if not members:
        return [""] * len(images)
    verdict = examine(images, labels, forward, members, index=index, seed=seed, clean_logits=logits)
    return [int(number != ROBUST) for number in verdict.by.tolist()]
