"""Times CRoFT's energy penalty in closed form against the double backward pass of its code, on one thread.

usage: python benchmarks/energy.py [--out FILE]; both ways are measured in turns, and compared in fp64 first.

``alone`` is the time for value and gradient of the penalty, without the towers. ``added`` is the time that it adds to a
step with cross-entropy; the closed form shares the features of that step. The authors' code computes its own features
with shifted adapters; ``shared`` is a double backward pass without that.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from robustclip.objectives.energy import Branch, adapted, batch_penalty
from robustclip.results.provenance import commit

BATCH, CLASSES, WIDTH = 32, 400, 512  # CRoFT's batch, its classes of ImageNet, CLIP's ViT-B/16
RATIO, RATIO_TEXT = 0.2, 0.5
TURNS = 41

Way = Callable[[], tuple[Tensor, ...]]


class Problem:
    """Features, adapters near the identity, and the ways to compute.

    Args:
        dtype: of all.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.x, self.t = (F.normalize(torch.randn(n, WIDTH, dtype=dtype), dim=-1) for n in (BATCH, CLASSES))
        self.gram = self.t @ self.t.T  # once per fit
        self.adapters = [
            (torch.eye(WIDTH, dtype=dtype) + 0.02 * torch.randn(WIDTH, WIDTH, dtype=dtype)).requires_grad_()
            for _ in range(2)
        ]
        self.labels = torch.randint(CLASSES, (BATCH,))

    def view(self) -> tuple[Branch, Branch]:
        """Returns image and text features after their adapters."""
        images, texts = self.adapters
        return adapted(self.x, images, RATIO), adapted(self.t, texts, RATIO_TEXT, self.gram)

    def twice(self) -> Tensor:
        """Computes the penalty by ``create_graph``."""
        shifts = [torch.zeros(WIDTH, WIDTH, dtype=self.x.dtype, requires_grad=True) for _ in range(2)]
        images, texts = (adapter + shift for adapter, shift in zip(self.adapters, shifts, strict=True))
        u = F.normalize(RATIO * self.x @ images.T + (1 - RATIO) * self.x, dim=-1)
        v = F.normalize(RATIO_TEXT * self.t @ texts.T + (1 - RATIO_TEXT) * self.t, dim=-1)
        gradients = torch.autograd.grad((u @ v.T).exp().mean(), shifts, create_graph=True)
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum()

    def twice_from(self, images: Branch, texts: Branch) -> Tensor:
        """Computes the penalty by ``create_graph`` from given features."""
        total = (images.unit @ texts.unit.T).exp().mean()
        gradients = torch.autograd.grad(total, self.adapters, create_graph=True)
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum()

    def cross_entropy(self, images: Branch, texts: Branch) -> Tensor:
        """Computes the cross-entropy of the step."""
        return F.cross_entropy(100 * images.unit @ texts.unit.T, self.labels)

    def step(self, penalty: Callable[[Branch, Branch], Tensor] | None) -> tuple[Tensor, ...]:
        """Computes the gradients of the adapters."""
        view = self.view()
        loss = self.cross_entropy(*view)
        return torch.autograd.grad(loss if penalty is None else loss + 5 * penalty(*view), self.adapters)

    def ways(self) -> dict[str, Way]:
        """Returns the functions that are timed, by name."""
        return {
            "alone: double backward": lambda: torch.autograd.grad(self.twice(), self.adapters),
            "alone: closed form": lambda: torch.autograd.grad(batch_penalty(*self.view()), self.adapters),
            "step: no penalty": lambda: self.step(None),
            "step: double backward": lambda: self.step(lambda *_: self.twice()),
            "step: shared double backward": lambda: self.step(self.twice_from),
            "step: closed form": lambda: self.step(batch_penalty),
        }


def compare() -> float:
    """Returns the largest difference of the gradients in fp64, relative to the largest entry."""
    ways = Problem(torch.float64).ways()
    pairs = zip(ways["step: closed form"](), ways["step: double backward"](), strict=True)
    return max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)


def measure() -> dict[str, list[float]]:
    """Measures CPU milliseconds of each way in each turn."""
    ways = Problem().ways()
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(TURNS):
        for name, way in ways.items():
            started = time.process_time()
            way()
            spent[name].append(1000 * (time.process_time() - started))
    return spent


def multiplications() -> dict[str, float]:
    """Counts the multiplications in the matrix products of each way, in millions."""
    counts = {}
    for name, way in Problem().ways().items():
        with FlopCounterMode(display=False) as counter:
            way()
        counts[name] = round(counter.get_total_flops() / 2e6, 1)  # a multiplication and an addition are two
    return counts


def main() -> None:
    """Prints the figures, and writes them if a file is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    difference = compare()
    median = {name: statistics.median(values) for name, values in measure().items()}
    names = ("double backward", "shared double backward")
    step = {name: median[f"step: {name}"] for name in (*names, "closed form")}
    added = {name: value - median["step: no penalty"] for name, value in step.items()}
    faster = {"alone": median["alone: double backward"] / median["alone: closed form"]}
    for name in names:
        faster[f"step, {name}"] = step[name] / step["closed form"]
        faster[f"added, {name}"] = added[name] / added["closed form"]
    result = {
        "commit": commit(),
        "size": {"batch": BATCH, "classes": CLASSES, "width": WIDTH, "turns": TURNS},
        "gradients_differ_by": difference,
        "median_cpu_milliseconds": {name: round(value, 2) for name, value in median.items()},
        "million_multiplications": multiplications(),
        "times_faster": {name: round(value, 2) for name, value in faster.items()},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
