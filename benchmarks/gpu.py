"""Measures verdicts, speed and memory on one GPU in at most eight minutes; `--miniature` runs all of it on a CPU.

* Verdicts: the shapes model under PGD-10, on the CPU in fp32 against the device in fp32, compiled, and with attacks in
  bfloat16 first. Every pair must agree on every sample.
* Training: images per second, share of the device's peak and largest memory of TeCoA and PMG-AFT with PGD-2, eager and
  compiled, in bfloat16.
* Loops: TeCoA's loop (`ways.Official`) and RobustVLM's, both in own words, in the same run and precision.
* Test: images per second under PGD-10 without early stopping, with attacks in bfloat16 and verdicts in fp32.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pmg_aft_ways
import torch
import ways
from open_clip.model import CLIP
from step import register_tiny
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule
from robustclip.evaluation.engine import examine
from robustclip.evaluation.precision_ladder import exact, ladder, rungs
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.models.compilation import compile_towers
from robustclip.results.provenance import commit, versions
from robustclip.types import Batch

TRAINING_STEPS, TEST_STEPS = 2, 10  # attack iterations
PEAK = 790e12  # multiplications and additions per second that an H200 sustains in large bfloat16 products


@dataclass(frozen=True)
class Problem(ways.Problem):
    """A problem whose images, and all models made for it, are on one device."""

    def model(self) -> CLIP:
        """Builds the random weights on the device of the images."""
        return super().model().to(self.images.device)

    def tokens(self) -> Tensor:
        """Tokenises one prompt per class on the device of the images."""
        return super().tokens().to(self.images.device)

    def normalise(self, images: Tensor) -> Tensor:
        """Standardises images in [0, 1]."""
        mean, std = (torch.tensor(row, device=images.device).view(3, 1, 1) for row in self.statistics)
        return (images - mean) / std

    @classmethod
    def on(cls, device: str, arch: str, batch_size: int, classes: int, steps: int) -> "Problem":
        """Makes random images and labels on a device."""
        problem = cls.random(arch, batch_size, classes, steps)
        return cls(**vars(replace(problem, images=problem.images.to(device), labels=problem.labels.to(device))))


class OnDevice:
    """Moves the method of `ways.Ours` to the device of the images before its classes are encoded."""

    problem: ways.Problem
    batch: Batch

    def build(self, **options: Any) -> RobustMethod:
        """Constructs the method on the device."""
        device = self.problem.images.device
        self.batch = self.batch._replace(index=self.batch.index.to(device))
        method: RobustMethod = super().build(**options)  # type: ignore[misc]
        return method.to(device)


class TeCoA(OnDevice, ways.Ours):
    """Builds the package's training step of TeCoA."""


class PMGAFT(OnDevice, pmg_aft_ways.Ours):
    """Builds the package's training step of PMG-AFT."""


class RobustVLM(ways.Bare):
    """RobustVLM's loop in own words: class features are cached, and every step also logs clean measurements.

    Source: https://github.com/chs20/RobustVLM. It attacks in eval mode, encodes the clean images by the original and by
    the trained tower, and reads five scalars back to the host in every step.
    """

    def __init__(self, problem: ways.Problem) -> None:
        super().__init__(problem)
        self.original = problem.model().visual.requires_grad_(False).eval()

    def update(self, attacked: Tensor) -> None:
        """Trains once, and logs as the original does."""
        clean = self.problem.normalise(self.problem.images)
        with torch.no_grad():
            target = self.original(clean)
        super().update(attacked)
        with torch.no_grad():
            own = self.visual(clean)
            logits = F.normalize(own, dim=-1) @ self.scaled_classes.T
        scalars = (
            self.loss(attacked).detach(),
            F.cosine_similarity(own, target).mean(),
            (own - target).square().sum(-1).mean(),
            (logits.argmax(-1) == self.problem.labels).float().mean(),
            logits.abs().amax(),
        )
        for scalar in scalars:
            scalar.item()


def synchronise(device: str) -> None:
    """Waits for all work of a device."""
    if device != "cpu":
        torch.cuda.synchronize()


def measured(
    step: Callable[[], object], images: int, device: str, seconds: float, *, is_mixed: bool = True
) -> dict[str, float]:
    """Measures the rate of a step after two warm-ups, its share of the peak, and its largest memory.

    Args:
        step: the step to repeat.
        images: number of images per step.
        device: device of the step.
        seconds: duration of the measurement; at least two steps are timed.
        is_mixed: run the whole step in bfloat16.
    """
    with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        synchronise(device)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        started, steps = time.perf_counter(), 0
        while steps < 2 or time.perf_counter() - started < seconds:
            step()
            steps += 1
            synchronise(device)
        duration = (time.perf_counter() - started) / steps
    memory = 0 if device == "cpu" else torch.cuda.max_memory_allocated()
    operations = counter.get_total_flops()  # multiplications and additions, each counted
    return {
        "images_per_second": images / duration,
        "operations_per_image": operations / images,
        "share_of_peak": operations / duration / PEAK,
        "gibibytes": memory / 2**30,
        "timed_steps": steps,
    }


def compiled(way: Any) -> Any:
    """Compiles the towers of a way's method in place."""
    compile_towers(way.method.clip)
    return way


def training(options: argparse.Namespace, arch: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Measures every training step on one architecture."""
    problem = Problem.on(options.device, arch, options.batch_size, options.classes, TRAINING_STEPS)
    builders: dict[str, Callable[[], Any]] = {
        "TeCoA": lambda: TeCoA(problem),
        "TeCoA compiled": lambda: compiled(TeCoA(problem)),
        "PMG-AFT": lambda: PMGAFT(problem),
        "PMG-AFT compiled": lambda: compiled(PMGAFT(problem)),
        "TeCoA's loop": lambda: ways.Official(problem),
        "RobustVLM's loop": lambda: RobustVLM(problem),
    }
    for name, build in builders.items():
        if name.endswith("compiled") and options.no_compile:
            continue
        yield name, measured(build().step, options.batch_size, options.device, options.seconds)


def testing(options: argparse.Namespace, arch: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Measures tests under PGD-10 that attack every sample to the end, on one architecture."""
    problem = Problem.on(options.device, arch, options.batch_size, options.classes, TEST_STEPS)
    members = PGD(eps="1/255", alpha="1/255", steps=TEST_STEPS).members(options.classes)
    index = torch.arange(options.batch_size, device=options.device)
    for name in ("PGD-10", *(() if options.no_compile else ("PGD-10 compiled",))):
        way = TeCoA(problem) if name == "PGD-10" else compiled(TeCoA(problem))
        method = way.method.eval().requires_grad_(False)
        cheaper = ladder(method.logits, rungs("bf16", options.device, "last"), options.device)
        step = partial(
            examine, problem.images, problem.labels, exact(method.logits), members, index=index, stop="last",
            cheaper=cheaper,
        )  # fmt: skip
        yield name, measured(step, options.batch_size, options.device, options.seconds, is_mixed=False)


def verdicts(method: RobustMethod, device: str, samples: int, *, is_cheap: bool = False) -> Tensor:
    """Attacks images of the shapes world by PGD-10; returns the number ``(N,)`` of the successful member."""
    data = CLIPDataModule(test="shapes:colours", image_size=32, batch_size=samples)
    data.connect(limit=samples)
    data.setup("test")
    method = method.to(device).eval().requires_grad_(False)
    method.prepare(data.test_tasks)
    batch = next(iter(data.test_dataloader()[0]))
    forward = exact(partial(method.logits, task="colours"))
    cheaper = ladder(forward, rungs("bf16" if is_cheap else "fp32", device), device)
    members = PGD(eps="2/255", alpha="0.5/255", steps=TEST_STEPS).members(len(data.test_tasks[0].label_names))
    images, labels, index = (tensor.to(device) for tensor in (batch.images, batch.labels, batch.index))
    return examine(images, labels, forward, members, index=index, cheaper=cheaper).by.cpu()


def equality(options: argparse.Namespace) -> dict[str, int]:
    """Counts the samples whose verdict differs from that of the CPU in fp32."""
    expected = verdicts(ZeroShot(), "cpu", options.samples)
    others = {
        "device": verdicts(ZeroShot(), options.device, options.samples),
        "bfloat16 first": verdicts(ZeroShot(), options.device, options.samples, is_cheap=True),
    }
    if not options.no_compile:
        others["compiled"] = verdicts(ZeroShot(compile=True), options.device, options.samples)
    return {"samples": len(expected), **{name: int((by != expected).sum()) for name, by in others.items()}}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measure verdicts, speed and memory on one GPU.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--archs", nargs="+", default=["ViT-B-32", "ViT-B-16"], help="by their names in open_clip")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=144, help="images of the comparison of verdicts")
    parser.add_argument("--seconds", type=float, default=8, help="duration of each measurement")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled variants")
    parser.add_argument("--miniature", action="store_true", help="run a two-layer model on a CPU for a few seconds")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    if options.miniature:
        options.device, options.archs, options.no_compile = "cpu", [register_tiny()], True
        options.batch_size, options.classes, options.samples, options.seconds = 4, 7, 24, 0.0
    return options


def main(argv: list[str] | None = None) -> None:
    """Measures, prints a table, writes the JSON; fails if a verdict differs."""
    options = parse_options(argv)
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": versions(),
        "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(),
        "equality": equality(options),
    }
    print("| | images/s | share of peak | GiB |\n|---|--:|--:|--:|")
    for arch in options.archs:
        rows = dict([*training(options, arch), *testing(options, arch)])
        report[arch] = rows
        for name, row in rows.items():
            cells = (f"{row['images_per_second']:.0f}", f"{row['share_of_peak']:.1%}", f"{row['gibibytes']:.1f}")
            print(f"| {arch} {name} | {' | '.join(cells)} |")
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    different = {name: count for name, count in report["equality"].items() if name != "samples" and count}
    if different:
        raise SystemExit(f"verdicts must equal those of the CPU in fp32, different samples: {different}")


if __name__ == "__main__":
    main()
