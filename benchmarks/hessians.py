"""Measures whether CRoFT's penalty makes the Hessians of two domains alike, in a toy problem in fp64.

usage: python benchmarks/hessians.py [--out FILE]

Adapters are trained on unit features of two domains, each with its own shift. The script then prints the spectral norm
of the difference of the Hessians, and the accuracy on a third domain, as means over seeds.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.evaluation.hessians import spectral_norm
from robustclip.objectives.energy import Branch, adapted, batch_penalty, sample_penalty
from robustclip.results.provenance import commit

WIDTH, CLASSES, IMAGES, UNSEEN, SCALE, RATIO = 12, 4, 40, 400, 10.0, 0.5
STEPS, SEEDS, WEIGHTS = 200, 5, (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)
PENALTIES: dict[str, Callable[[Branch, Branch], Tensor]] = {
    "batch": batch_penalty,
    "sample": sample_penalty,
    "sample at the logit scale": lambda images, texts: sample_penalty(images, texts, temperature=SCALE),
}
Domain = tuple[Tensor, Tensor]


class Toy:
    """Toy problem: two training domains, one unseen domain, and the adapters.

    Args:
        seed: seed of domains and adapters.
    """

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.means = F.normalize(self.draw(CLASSES, WIDTH), dim=-1)
        self.texts = F.normalize(self.means + 0.25 * self.draw(CLASSES, WIDTH), dim=-1)
        self.one, self.two, self.unseen = (self.domain(count) for count in (IMAGES, IMAGES, UNSEEN))
        self.adapters = [torch.eye(WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def draw(self, *shape: int) -> Tensor:
        """Draws from N(0, 1)."""
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def domain(self, count: int) -> Domain:
        """Draws unit features around the class means, all moved by one vector of length 0.5, and labels."""
        shift, labels = 0.5 * F.normalize(self.draw(WIDTH), dim=0), torch.arange(count) % CLASSES
        return F.normalize(self.means[labels] + shift + 0.2 * self.draw(count, WIDTH), dim=-1), labels

    def view(self, features: Tensor) -> tuple[Branch, Branch]:
        """Returns image and text features after their adapters."""
        return adapted(features, self.adapters[0], RATIO), adapted(self.texts, self.adapters[1], RATIO)

    def logits(self, features: Tensor) -> Tensor:
        """Computes the logits of unit features ``(N, D)``."""
        images, texts = self.view(features)
        return SCALE * images.unit @ texts.unit.T

    def risk(self, domain: Domain) -> Tensor:
        """Computes the cross-entropy on a domain."""
        return F.cross_entropy(self.logits(domain[0]), domain[1])

    def fit(self, penalty: str, weight: float) -> None:
        """Trains by full-batch gradient descent."""
        optimizer = torch.optim.SGD(self.adapters, lr=0.1, momentum=0.9)
        both = torch.cat([self.one[0], self.two[0]])
        for _ in range(STEPS):
            loss = (self.risk(self.one) + self.risk(self.two)) / 2 + weight * PENALTIES[penalty](*self.view(both))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    def measures(self) -> Tensor:
        """Returns ``|H1 - H2|`` and the accuracy on the unseen domain."""
        norm = spectral_norm(self.risk(self.one) - self.risk(self.two), self.adapters, iterations=100)
        is_right = self.logits(self.unseen[0]).argmax(1) == self.unseen[1]
        return torch.stack([norm, is_right.double().mean()]).detach()


def mean(penalty: str, weight: float) -> dict[str, float]:
    """Returns the means over the seeds."""
    values = []
    for seed in range(SEEDS):
        toy = Toy(seed)
        toy.fit(penalty, weight)
        values.append(toy.measures())
    difference, accuracy = torch.stack(values).mean(0).tolist()
    return {"lambda2": weight, "hessian_difference": round(difference, 4), "unseen_accuracy": round(accuracy, 4)}


def main() -> None:
    """Prints the figures, and writes them if a file is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    curves = {name: [mean(name, weight) for weight in WEIGHTS] for name in PENALTIES}
    text = json.dumps({"commit": commit(), **curves}, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
