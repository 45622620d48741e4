"""Compares every member of the recipes with four other packages, at equal budget on equal images.

Packages that are not installed are left out, with a line that says so. The models are the embedded shapes model
undefended and, with `--checkpoint`, one that a method has trained. For each member and package, the result has the
samples that each misclassifies per seed, those that only one of them does, the CPU seconds of each, and a p-value.
This is Welch's t-test over the seeds, since the samples are fixed and the random numbers are not; with one seed it
is McNemar's test over the samples. `--cost` measures instead the CPU time of APGD-T per evaluation of a small
network, called directly and by the evaluation.
"""

import argparse
import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import HAS_L1, PACKAGES, PEERS, QUERIES, STEPS, TARGETS, Model, Peer, Problem
from scipy import stats
from torch import Tensor, nn

import robustclip
from robustclip.attacks import APGD, PGD, Attack, Recipe, Square, TorchAttack, pixels
from robustclip.data import CLIPDataModule
from robustclip.evaluation.engine import examine
from robustclip.intervals import mcnemar
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.results.provenance import commit


def ours(member: str, p: Problem) -> tuple[Attack, str]:
    """Returns the package's attack of a member, and the rule by which the other packages judge it."""
    norm: Any = p.norm
    if member.startswith("pgd_ce"):  # the others return the last image
        rule = "worst" if member.endswith("every image") else "last"
        return PGD(p.eps, p.eps / 4, p.steps, norm, random_start="no random start" not in member), rule
    attacks: dict[str, Callable[[], Attack]] = {
        "apgd_ce": lambda: APGD(p.eps, p.steps, norm, "ce"),
        "apgd_dlr": lambda: APGD(p.eps, p.steps, norm, "dlr"),
        "apgd_t": lambda: APGD(p.eps, p.steps, norm, "dlr", TARGETS),
        "fab_t": lambda: TorchAttack(
            "FAB",
            p.eps,
            {
                "norm": {"linf": "Linf", "l2": "L2"}[p.norm],
                "steps": p.steps,
                "multi_targeted": True,
                "n_classes": p.targets + 1,
            },
        ),
        "square": lambda: Square(p.eps, QUERIES, norm),
        "autoattack": lambda: Recipe("autoattack", p.eps, norm, p.steps / 100),
    }
    return attacks[member.split(",")[0]](), "worst"


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.process_time()
    broken = run()
    return broken, time.process_time() - started


def compare(p: Problem, member: str, seeds: int, packages: list[str]) -> dict[str, Any]:
    """Counts the samples, over all seeds, that one package misclassifies and the other does not."""
    attack, stop = ours(member, p)
    options: Any = {"index": p.index, "stop": stop}
    mine, seconds = [], 0.0
    for seed in range(seeds):

        def run(seed: int = seed) -> Tensor:
            members = attack.members(p.classes)
            return examine(p.images, p.labels, p.model, members, seed=seed, **options).by >= 0

        broken, spent = _timed(run)
        mine.append(broken)
        seconds += spent
    own = {"broken": _count(mine), "by_seed": _by_seed(mine), "seconds": round(seconds, 1)}
    rows: dict[str, Any] = {"n": len(p.images), "seeds": seeds, "robustclip": own}
    for package in [name for name in packages if name in PEERS[member]]:
        theirs, seconds = [], 0.0
        for seed in range(seeds):
            problem = Problem(**{**vars(p), "seed": seed})
            broken, spent = _timed(partial(_judged, PEERS[member][package], problem))
            theirs.append(broken)
            seconds += spent
        only_ours, only_theirs = (
            sum(int((a & ~b).sum()) for a, b in zip(one, other, strict=True))
            for one, other in ((mine, theirs), (theirs, mine))
        )
        p_value = _welch(_by_seed(mine), _by_seed(theirs)) if seeds > 1 else mcnemar(only_ours, only_theirs)
        rows[package] = {"broken": _count(theirs), "by_seed": _by_seed(theirs)}
        rows[package] |= {"only_ours": only_ours, "only_theirs": only_theirs}
        rows[package] |= {"p": round(p_value, 4), "seconds": round(seconds, 1)}
        print(member, package, rows["robustclip"], rows[package], flush=True)
    return rows


def _judged(peer: Peer, problem: Problem) -> Tensor:
    return problem.is_broken(peer(problem))


def _by_seed(broken: list[Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in broken]


def _count(broken: list[Tensor]) -> int:
    return sum(_by_seed(broken))


def _welch(ours: list[int], theirs: list[int]) -> float:
    """Computes the p-value of two means over seeds; 1 for equal counts without any spread, which have no t."""
    is_constant = len(set(ours)) == len(set(theirs)) == 1
    return float(ours[0] == theirs[0]) if is_constant else float(stats.ttest_ind(ours, theirs, equal_var=False).pvalue)


def problem_of(method: RobustMethod, options: argparse.Namespace, eps: str) -> Problem:
    """Collects the correctly classified images of the task."""
    method.eval().requires_grad_(False)
    data = CLIPDataModule(test=[options.task], image_size=method.image_size, batch_size=options.images)
    data.connect(limit=options.images)
    data.setup("test")
    method.prepare(data.test_tasks)
    (task,), batch = data.test_tasks, next(iter(data.test_dataloader()[0]))
    model = Model(partial(method.logits, task=task.name)).eval()
    with torch.no_grad():
        rows = (model(batch.images).argmax(1) == batch.labels).nonzero()[:, 0]
    radius = pixels(eps, name="radius", limit=None)
    images = batch.images[rows].clone()
    return Problem(
        model,
        images,
        batch.labels[rows],
        batch.index[rows],
        len(task.class_names),
        radius,
        options.norm,
        0,
        options.steps,
    )


def peers(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the members on both models."""
    available = [name for name in PACKAGES if importlib.util.find_spec(name)]
    for name in PACKAGES.keys() - set(available):
        print(f"{PACKAGES[name]} is not installed: left out")
    methods: dict[str, tuple[RobustMethod, str]] = {"undefended": (ZeroShot(pretrained="shapes"), options.radius)}
    if options.checkpoint:
        methods["trained"] = (robustclip.load(options.checkpoint), options.trained_radius)
    results: dict[str, Any] = {}
    for name, (method, eps) in methods.items():
        problem = problem_of(method, options, eps)
        results[name] = {"eps": eps}
        for member in options.members:
            packages = (
                available
                if options.norm != "l1"
                else [package for package in available if member.split(",")[0] in HAS_L1.get(package, ())]
            )
            p = problem
            if member == "autoattack":
                few = {key: getattr(problem, key)[: options.cascade] for key in ("images", "labels", "index")}
                p = Problem(**{**vars(problem), **few})
            seeds = 1 if member in ("autoattack", "pgd_ce, no random start") else options.seeds
            results[name][member] = compare(p, member, seeds, packages)
    return results


def cost(repeats: int) -> dict[str, Any]:
    """Measures milliseconds of CPU per evaluation of a small network by APGD-T, all ways in turn."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(8 * 14 * 14, 10)).requires_grad_(False).eval()
    results: dict[str, Any] = {}
    for batch in (1, 16, 64):
        images, model = torch.rand(batch, 3, 32, 32), Model(network).eval()
        labels = network(images).argmax(1)
        # At this radius hardly a sample is broken, so that all packages take all steps.
        problem = Problem(model, images, labels, torch.arange(batch), 10, 0.0005, "linf")
        attack = APGD(problem.eps, problem.steps, loss="dlr", targets=TARGETS)
        ways: dict[str, Callable[[], Any]] = {
            "robustclip, called": partial(attack, images, model, labels, index=problem.index),
            "robustclip, evaluation": partial(
                examine, images, labels, model, attack.members(10), index=problem.index
            ),
            **{name: partial(peer, problem) for name, peer in PEERS["apgd_t"].items()},
        }  # fmt: skip
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                model.evaluations, started = 0, time.process_time()
                way()
                spent[name].append(1000 * (time.process_time() - started) / model.evaluations)
        results[f"batch of {batch}"] = {name: round(statistics.median(times), 3) for name, times in spent.items()}
        print(batch, results[f"batch of {batch}"], flush=True)
    return results


def main() -> None:
    """Measures, prints, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--checkpoint", help="checkpoint of a robust model, as `robustclip fit --config demo` leaves it"
    )
    parser.add_argument("--task", default="shapes:colours")
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--cascade", type=int, default=40, help="number of these for the whole cascade")
    parser.add_argument("--norm", choices=["linf", "l2", "l1"], default="linf")
    parser.add_argument("--radius", default="2/255", help="radius for the undefended model")
    parser.add_argument("--trained-radius", default="8/255", help="radius for the model of the checkpoint")
    parser.add_argument("--members", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of every member")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cost", type=int, metavar="REPEATS", help="measure CPU time per evaluation instead")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "commit": commit()}
    report["results"] = cost(options.cost) if options.cost else peers(options)
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
