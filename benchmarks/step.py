"""Times the training step of a method in several ways, and checks that they agree.

The ways (see `ways.py`, `pmg_aft_ways.py`, `arf_ways.py` and `ueo_ways.py`) take turns, so that a drift of the
machine's speed cancels in the ratios. Weights are random. If the method attacks, the equality test starts the
authors' and the bare way from one perturbation, and the package's and the bare way from equal sample ids. Updates are
compared on equal attacked images, so that one flipped sign cannot affect them.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import arf_ways
import open_clip
import pmg_aft_ways
import torch
import ueo_ways
import ways
from plain_zero_shot import uniform
from torch import Tensor
from ways import EPS, Bare, Official, Ours, Problem

from robustclip.results.provenance import commit

Ways = Mapping[str, type[Any]]
# The ways of each method, the slowest first; the others must equal the last one.
METHODS: dict[str, Ways] = {
    "tecoa": {"official": ways.Official, "ours": ways.Ours, "bare": ways.Bare},
    "pmg_aft": {"official": pmg_aft_ways.Official, "ours": pmg_aft_ways.Ours, "bare": pmg_aft_ways.Bare},
    "arf": {"separate": arf_ways.Separate, "ours": arf_ways.Ours, "bare": arf_ways.Bare},
    "arf_text": {"whole": arf_ways.WholeText, "ours": arf_ways.CutText},
    "ueo": {"official": ueo_ways.Official, "ours": ueo_ways.Ours, "bare": ueo_ways.Bare},
}
ATTACKED = ("tecoa", "pmg_aft")
# Relative tolerances. One update at a small rate hardly changes weights, so gradients are compared too. Encoding the
# classes without a graph takes another attention kernel in torch: its rounding, 1e-7, times the logit scale, 100.
TOLERANCES = {"parameters": 1e-6, "gradients": 1e-5}
# Below this size the sign of a pixel's gradient is rounding noise.
SIGN_NOISE = 1e-9
TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def time_ways(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Measures milliseconds of each step after one warm-up; the ways take turns.

    One thread is timed by its CPU seconds, which other programs disturb less than wall-clock time.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    durations: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, step in ways.items():
            started = clock()
            step()
            if repeat > 0:
                durations[name].append(1000 * (clock() - started))
    return durations


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(durations: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Computes ratios within each turn, for every two timed ways."""
    return {
        f"{slow}/{fast}": summary([a / b for a, b in zip(durations[slow], durations[fast], strict=True)])
        for slow, fast in combinations(durations, 2)
    }


def gap(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Computes the distance of two lists of tensors, relative to the norm of the second."""
    first, second = (torch.cat([tensor.detach().flatten().double() for tensor in row]) for row in (one, other))
    return float((first - second).norm() / second.norm())


def update_gaps(one: Official | Ours, bare: Bare) -> dict[str, float]:
    """Compares weights and, sharper since the learning rate does not shrink it, the gradient of the first update."""
    gradients = [[parameter.grad for parameter in way.parameters if parameter.grad is not None] for way in (one, bare)]
    return {"parameters": gap(one.parameters, bare.parameters), "gradients": gap(*gradients)}


def attack_gaps(one: Tensor, other: Tensor, is_noise: Tensor) -> dict[str, float]:
    """Counts pixels that differ; a flipped sign changes a pixel by 8e-3, another order of summation by 1e-7."""
    flipped = (one - other).abs() > 1e-6
    return {
        "pixels": flipped.numel(),
        "flipped": int(flipped.sum()),
        "flipped_above_noise": int((flipped & ~is_noise).sum()),
    }


def official_equals_bare(problem: Problem, method: Ways) -> dict[str, float]:
    """Checks, from one start, that perturbations are equal up to rounding noise, and updates on them too."""
    torch.manual_seed(1)
    images, official, bare, contaminated = (
        problem.images, method["official"](problem), method["bare"](problem), method["official"](problem)
    )  # fmt: skip
    start = official.random_start()
    delta = official.step(start, is_zeroed_after_attack=True)
    is_noise = torch.stack(official.gradients).abs().amin(dim=0) < SIGN_NOISE
    attack = attack_gaps(bare.attack(images + start) - images, delta, is_noise)
    bare.update(images + delta)
    contaminated.step(start)
    leftover = update_gaps(contaminated, bare)["gradients"]
    return {**attack, **update_gaps(official, bare), "gradients_without_zeroing": leftover}


def ours_equals_bare(problem: Problem, method: Ways) -> dict[str, float]:
    """Checks, from equal sample ids, that attacked images agree in every sign, and updates on them too."""
    images, ours, bare = problem.images, method["ours"](problem), method["bare"](problem)
    start = images + EPS * (2 * uniform(list(range(len(images))), images.shape[1:]) - 1)
    expected = bare.attack(start.clamp(0, 1))
    attack = attack_gaps(ours.attack(), expected, torch.zeros_like(images, dtype=torch.bool))
    ours.step()
    bare.update(expected)
    return {**attack, **update_gaps(ours, bare)}


def equal_updates(problem: Problem, method: Ways) -> dict[str, dict[str, float]]:
    """Compares one step of each way with that of the last one, for methods without attack."""
    *others, (_, last) = [(name, way(problem)) for name, way in method.items()]
    last.step()
    for _, way in others:
        way.step()
    return {name: update_gaps(way, last) for name, way in others}


def register_tiny() -> str:
    """Registers a two-layer architecture with open_clip, so that every way can build it by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "two-layer-clip.json"
        path.write_text(json.dumps(TINY_CLIP))
        open_clip.add_model_config(path)
    return path.stem


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Time a training step in several ways and compare them.")
    parser.add_argument("--method", choices=list(METHODS), default="tecoa")
    parser.add_argument("--ways", nargs="+", help="some of the method's ways; all if not given")
    parser.add_argument("--arch", default="ViT-B-32", help="architecture to time, by its name in open_clip")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--classes", type=int, default=31)
    parser.add_argument("--steps", type=int, default=2, help="attack iterations")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each way; 0 skips the timing")
    parser.add_argument("--equality-arch", help="architecture of the equality test; a two-layer CLIP if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def chosen_ways(options: argparse.Namespace) -> Ways:
    """Returns the chosen ways, the slowest first."""
    return {name: way for name, way in METHODS[options.method].items() if not options.ways or name in options.ways}


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Times the chosen ways and prints the figures as a Markdown table."""
    problem = Problem.random(options.arch, options.batch_size, options.classes, options.steps)
    steps = {name: way(problem).step for name, way in chosen_ways(options).items()}
    durations = time_ways(steps, options.repeats)
    times = {name: summary(row) for name, row in durations.items()}
    report = {"milliseconds": times, "ratios": ratios(durations)}
    print("| | median | min | max |\n|---|---|---|---|")
    for section, unit in (("milliseconds", " ms"), ("ratios", "x")):
        for name, row in report[section].items():
            print(f"| {name} | " + " | ".join(f"{value:.2f}{unit}" for value in row.values()) + " |")
    return report


def check_equality(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Compares every chosen way with the bare one."""
    problem = Problem.random(
        options.equality_arch or register_tiny(), options.batch_size, options.classes, options.steps
    )
    method, chosen = METHODS[options.method], chosen_ways(options)
    if options.method not in ATTACKED:
        return equal_updates(problem, chosen)
    checks = {"official": official_equals_bare, "ours": ours_equals_bare}
    return {name: check(problem, method) for name, check in checks.items() if name in chosen}


def main() -> None:
    """Times, compares and writes the JSON; fails if the ways disagree."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    report: dict[str, object] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if options.repeats > 0:
        report |= measure(options)
    equality = check_equality(options)
    options.out.write_text(json.dumps(report | {"equality": equality}, indent=2) + "\n")
    print(json.dumps(equality, indent=2))
    for name, row in equality.items():
        if row.get("flipped_above_noise", 0) > 0 or any(row[key] > bound for key, bound in TOLERANCES.items()):
            raise SystemExit(f"{name} must equal the last way's step up to {TOLERANCES}, no sign flipped, got {row}")


if __name__ == "__main__":
    main()
