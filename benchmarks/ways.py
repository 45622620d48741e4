"""Implements one TeCoA training step in three ways, for `step.py`; `pmg_aft_ways.py` builds on them.

* `Official`: the authors' way, in own words: every attack step runs both towers and back-propagates into all weights;
* `Ours`: the package;
* `Bare`: only the needed passes, without a framework.

All three have equal weights, images and labels; fp32, SGD with momentum.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from robustclip.methods import RobustMethod

RADIUS = "1/255"
EPS = ALPHA = float(Fraction(RADIUS))
TEMPLATE = "This is a photo of a {}"
LEARNING_RATE, MOMENTUM = 1e-5, 0.9
# CLIP's trained temperature, which the authors' loop also clamps to.
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class Problem:
    """Inputs that all ways share.

    Args:
        arch: architecture, by its name in open_clip.
        class_names: C names.
        images: (B, 3, H, W) in [0, 1], at the architecture's own size.
        labels: (B,) numbers of the classes.
        steps: number of attack iterations.
        statistics: mean and deviation of the pixels, by which the towers' inputs are standardised.
    """

    arch: str
    class_names: tuple[str, ...]
    images: Tensor
    labels: Tensor
    steps: int
    statistics: tuple[Sequence[float], Sequence[float]] = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)

    @classmethod
    def random(cls, arch: str, batch_size: int, classes: int, steps: int) -> "Problem":
        """Random images and labels under real class names."""
        size = open_clip.get_model_config(arch)["vision_cfg"]["image_size"]
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(batch_size, 3, size, size, generator=generator)
        labels = torch.randint(classes, (batch_size,), generator=generator)
        return cls(arch, tuple(IMAGENET_CLASSNAMES[:classes]), images, labels, steps)

    def model(self) -> CLIP:
        """Builds the same random weights at every call, with CLIP's trained temperature."""
        torch.manual_seed(0)
        model = open_clip.create_model(self.arch, pretrained=None, precision="fp32")
        model.logit_scale.data.fill_(MAX_LOGIT_SCALE)
        return model

    def tokens(self) -> Tensor:
        """Tokenises one prompt a class: (C, L)."""
        tokens: Tensor = open_clip.get_tokenizer(self.arch)([TEMPLATE.format(name) for name in self.class_names])
        return tokens

    def normalise(self, images: Tensor) -> Tensor:
        """Standardises images in [0, 1]."""
        mean, std = (torch.tensor(row).view(3, 1, 1) for row in self.statistics)
        return (images - mean) / std


def sgd(parameters: Sequence[Tensor]) -> torch.optim.SGD:
    """Optimiser of the paper's fine-tuning."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)


class Official:
    """The authors' loop, in own words: nothing is cached, nothing is frozen, the perturbation is never detached."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.model = problem, problem.model().train()
        self.parameters = list(self.model.visual.parameters())
        self.optimizer = sgd(self.parameters)
        self.gradients: list[Tensor] = []

    def random_start(self) -> Tensor:
        """Draws a perturbation within the radius that keeps the images in [0, 1]."""
        images = self.problem.images
        return torch.max(torch.min(torch.empty_like(images).uniform_(-EPS, EPS), 1 - images), -images)

    def logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Runs both towers; the resize changes nothing at the model's own size, as in the original."""
        resized = F.interpolate(images, size=images.shape[-2:], mode="bicubic", align_corners=False)
        image_features, text_features, scale = self.model(self.problem.normalise(resized), tokens)
        logits: Tensor = image_features @ (scale * text_features).T
        return logits

    def attack(self, delta: Tensor, tokens: Tensor) -> Tensor:
        """Updates `delta`; the weight gradients of all steps accumulate, as in the original."""
        images, self.gradients = self.problem.images, []
        delta = delta.clone().requires_grad_()
        for _ in range(self.problem.steps):
            torch.autograd.backward(F.cross_entropy(self.logits(images + delta, tokens), self.problem.labels))
            if delta.grad is None:
                raise RuntimeError("the attack's loss must depend on the perturbation, but it has no gradient")
            self.gradients.append(delta.grad.clone())
            moved = torch.clamp(delta.data + ALPHA * delta.grad.sign(), -EPS, EPS)
            delta.data = torch.max(torch.min(moved, 1 - images), -images)
            delta.grad.zero_()
        return delta

    def loss(self, logits: Tensor, attacked: Tensor, tokens: Tensor) -> Tensor:
        """Computes the loss of the update from the logits of the attacked images."""
        return F.cross_entropy(logits, self.problem.labels)

    def step(self, delta: Tensor | None = None, is_zeroed_after_attack: bool = False) -> Tensor:
        """Trains once, from a random start unless one is given; returns the perturbation."""
        images, labels = self.problem.images, self.problem.labels
        tokens = self.problem.tokens()
        self.optimizer.zero_grad()
        delta = self.attack(self.random_start() if delta is None else delta, tokens)
        if is_zeroed_after_attack:
            self.optimizer.zero_grad()
        logits = self.logits(images + delta, tokens)
        loss = self.loss(logits, images + delta, tokens)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)
        # The authors log both at every step: two host synchronisations on an accelerator.
        loss.item()
        (logits.argmax(dim=-1) == labels).float().mean().item()
        return delta.detach()


class Bare:
    """Only the needed passes: cached class features, input gradients in the attack, one full backward."""

    def __init__(self, problem: Problem) -> None:
        self.problem, model = problem, problem.model().requires_grad_(False).eval()
        with torch.no_grad():
            self.scaled_classes = model.logit_scale.exp() * model.encode_text(problem.tokens(), normalize=True)
        self.visual = model.visual
        self.parameters = list(self.visual.parameters())
        self.optimizer = sgd(self.parameters)

    def logits(self, images: Tensor) -> Tensor:
        """Runs the image tower only."""
        logits: Tensor = F.normalize(self.visual(self.problem.normalise(images)), dim=-1) @ self.scaled_classes.T
        return logits

    def attack(self, attacked: Tensor) -> Tensor:
        """Updates `attacked`, which starts within the radius; the weights need no gradient."""
        images = self.problem.images
        lower, upper = (images - EPS).clamp(min=0), (images + EPS).clamp(max=1)
        self.visual.requires_grad_(False)
        for _ in range(self.problem.steps):
            attacked = attacked.detach().requires_grad_()
            loss = F.cross_entropy(self.logits(attacked), self.problem.labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, attacked)
            attacked = torch.clamp(attacked.detach() + ALPHA * gradient.sign(), lower, upper)
        return attacked

    def loss(self, attacked: Tensor) -> Tensor:
        """Computes the loss of the update."""
        return F.cross_entropy(self.logits(attacked), self.problem.labels)

    def update(self, attacked: Tensor) -> None:
        """Trains once on images that are attacked already."""
        self.visual.requires_grad_(True)
        self.optimizer.zero_grad()
        torch.autograd.backward(self.loss(attacked))
        self.optimizer.step()

    def step(self) -> None:
        """Trains once, from a random start."""
        start = self.problem.images + EPS * (2 * torch.rand_like(self.problem.images) - 1)
        self.update(self.attack(start.clamp(0, 1)))


class Ours:
    """The step through the package."""

    def __init__(self, problem: Problem) -> None:
        from robustclip.attacks import PGD
        from robustclip.types import Batch, Task

        self.problem = problem
        self.batch = Batch(problem.images, problem.labels, torch.arange(len(problem.labels)))
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.pt"
            torch.save(problem.model().state_dict(), weights)
            attack = PGD(eps=RADIUS, alpha=RADIUS, steps=problem.steps)
            self.method = self.build(arch=problem.arch, pretrained=str(weights), attack=attack)
        self.method.freeze_untrained()
        self.method.prepare(tasks=[Task(name="train", class_names=problem.class_names, templates=(TEMPLATE,))])
        self.parameters = list(self.method.clip.net.visual.parameters())
        self.optimizer = sgd([parameter for parameter in self.method.parameters() if parameter.requires_grad])

    def build(self, **options: Any) -> "RobustMethod":
        """Constructs the method."""
        from robustclip.methods import TeCoA

        return TeCoA(**options)

    def attack(self) -> Tensor:
        """Returns the attacked images, from the start that the sample ids give."""
        attacked: Tensor = self.method.perturb(self.batch)
        return attacked

    def step(self) -> None:
        """Takes one training step."""
        terms: dict[str, Tensor] = self.method.training_loss(self.batch)
        self.optimizer.zero_grad()
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        self.optimizer.step()
