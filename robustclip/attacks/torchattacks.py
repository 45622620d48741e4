"""Attacks of the torchattacks library, isolated from the model."""

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustclip.arguments import Count, argument
from robustclip.attacks import perturbation_set
from robustclip.attacks.attack import Attack, Cost, Forward, Loss, cross_entropy, scaled_count
from robustclip.attacks.pixel_units import Radius, pixels, scaled_radius

SpelledNorm = Literal["Linf", "L2", "L1"]  # the library's spelling; some of its attacks treat anything else as L2
COUNTS = ("steps", "n_queries")  # the library's names for the length of an attack
RADII = {"eps", "max_epsilon"}  # and for its radius; no attack has both
ROUNDING = 1e-6  # rounding in fp32 of the radii that the library's attacks reach


class TorchAttack(Attack):
    """An attack of torchattacks by its class name, such as ``APGD``, ``CW`` or ``AutoAttack``.

    The library modifies the model (train and eval flags, parameter gradients) and checks no range, so it receives only
    a temporary module around a closure. Its random numbers come from torch's generators, which are seeded from ``seed``
    and restored afterwards; unlike PGD's they depend on the batch. An image outside the perturbation set, as from
    minimum-norm attacks that fail (FAB), is replaced by the clean image.

    Args:
        name: class in torchattacks.
        eps: radius in [0, 1] pixel units for attacks that have one; null for their own default, which is recorded.
        kwargs: further arguments of that class; ``alpha`` may be a fraction. ``n_classes`` is added.

    Raises:
        ValueError: torchattacks is not installed or has no such attack, the attack has no such argument or needs
            another one, the norm is L1, or the loss is not cross-entropy.

    Examples:
        >>> import torch
        >>> from robustclip import TorchAttack
        >>> images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
        >>> attack = TorchAttack("PGD", "4/255", {"alpha": "1/255", "steps": 5})
        >>> attacked = attack(images, lambda x: x.mean((2, 3)), labels)  # the mean colour as logits
        >>> bool((attacked - images).abs().max() <= 4 / 255 + 1e-6)
        True
    """

    def __init__(self, name: str, eps: Radius | None = None, kwargs: dict[str, Any] | None = None) -> None:
        try:
            import torchattacks  # imported here, since it is slow and most runs do not need it
        except ModuleNotFoundError as error:
            raise ValueError(f"{name} is an attack of torchattacks: pip install 'robustclip[autoattack]'") from error

        available = torchattacks.attack.Attack.__subclasses__()
        classes = {attack.__name__: attack for attack in available if hasattr(torchattacks, attack.__name__)}
        if name not in classes:
            raise ValueError(f"name: torchattacks has no attack {name!r}; it has {', '.join(sorted(classes))}")
        self.name, self._attack, self.kwargs = name, classes[name], dict(kwargs or {})
        (first, *_), takes = inspect.signature(self._attack).parameters, self._takes()
        if eps is not None and "eps" in self.kwargs:
            raise ValueError(f"eps must be given once, got {eps!r} and {self.kwargs['eps']!r} in kwargs")
        if eps is not None:
            self.kwargs["eps"] = eps
        if unknown := self.kwargs.keys() - takes.keys():
            raise ValueError(f"kwargs: {name} of torchattacks takes no {sorted(unknown)}; it takes {sorted(takes)}")
        missing = [key for key, value in takes.items() if value is inspect.Parameter.empty and key not in self.kwargs]
        if missing or first != "model":
            raise ValueError(f"name: {name} of torchattacks needs {', '.join(missing) or first}; take another attack")
        for key, value in self.kwargs.items():
            self.kwargs[key] = argument(value, _hint(key, takes[key]), f"TorchAttack: kwargs.{key}")
        self.norm = "l2" if "L2" in name else str(self.kwargs.get("norm", "Linf")).lower()
        self.kwargs |= {key: takes[key] for key in RADII & takes.keys() - self.kwargs.keys()}
        for radius in {*RADII, "alpha"} & self.kwargs.keys():
            limit = 1.0 if self.norm == "linf" else None
            self.kwargs[radius] = pixels(self.kwargs[radius], name=radius, limit=limit)
        self.eps = next((self.kwargs[key] for key in RADII & self.kwargs.keys()), None)
        if self.norm == "l1":
            raise ValueError(f"kwargs.norm: {name} of torchattacks fails in L1; take APGD or Square with norm l1")
        self._needs_class_count = "n_classes" in takes and "n_classes" not in self.kwargs

    def _takes(self) -> dict[str, Any]:
        """Returns the defaults of the arguments of the library's class behind its first one, the model."""
        _, *parameters = inspect.signature(self._attack).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD}

    def cost(self, classes: int) -> Cost | None:
        """Passes per image by the number of steps, given or by default; None for attacks without steps."""
        steps = self.kwargs.get("steps", self._takes().get("steps"))
        return None if steps is None else Cost(int(steps) * int(self.kwargs.get("n_restarts", 1)), 0)

    def scaled(self, *, radius: float = 1.0, steps: float = 1.0) -> "TorchAttack | None":
        """Returns a copy with the given radius, step size and steps multiplied; None if they were not given."""
        counts = self.kwargs.keys() & set(COUNTS)
        if (radius != 1 and self.eps is None) or (steps != 1 and not counts) or (self.eps is None and not counts):
            return None
        radii = self.kwargs.keys() & {*RADII, "alpha"}
        changed = {name: scaled_radius(self.kwargs[name], radius, self.norm) for name in radii}
        kwargs = {**self.kwargs, **changed, **{name: scaled_count(self.kwargs[name], steps) for name in counts}}
        return self._changed(kwargs=kwargs, eps=next((kwargs[key] for key in RADII & kwargs.keys()), None))

    def perturb(
        self, images: Tensor, forward: Forward, targets: Tensor, loss: Loss, *, index: Tensor | None, seed: int
    ) -> Tensor:
        """Runs the library's attack on a temporary module."""
        if loss is not cross_entropy:
            raise ValueError(f"{self.name} of torchattacks defines its own loss; use PGD for a custom one")
        extra = {}
        if self._needs_class_count:
            with torch.no_grad():
                extra["n_classes"] = forward(images[:1]).shape[-1]
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            attacked: Tensor = self._attack(_Victim(forward, images.device), **self.kwargs, **extra)(images, targets)
        return self._inside(attacked.clamp(0, 1), images)

    def _inside(self, attacked: Tensor, images: Tensor) -> Tensor:
        """Replaces images that are outside the perturbation set or not finite by the clean images."""
        if self.eps is None or self.norm not in perturbation_set.ORDERS:
            return torch.where(attacked.isnan(), images, attacked)
        is_inside = perturbation_set.distance(attacked, images, self.norm) <= self.eps * (1 + ROUNDING) + ROUNDING
        attacked = torch.where(is_inside.view(-1, 1, 1, 1), attacked, images)
        return perturbation_set.project(attacked, images, self.eps, self.norm)


def _hint(key: str, default: Any) -> Any:
    """Returns the type of an argument of the library by its name and its default."""
    hints = {"norm": SpelledNorm} | dict.fromkeys(COUNTS, Count) | dict.fromkeys({*RADII, "alpha"}, Radius)
    kinds: dict[type, Any] = {bool: bool, str: str, int: int | float, float: float}
    return hints.get(key, kinds.get(type(default), Any))


class _Victim(nn.Module):
    """Model that torchattacks receives, whose modes and parameters are separate from ours."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0, device=device), requires_grad=False)  # torchattacks reads its device
        self._forward = (forward,)  # a tuple, since a module would be registered as a child and switched with this one
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self._forward[0](images)
