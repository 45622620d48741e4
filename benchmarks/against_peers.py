"""Compares every member of the recipes with four other packages, at equal budget on equal images.

The packages are AutoAttack (`pyautoattack`), torchattacks, the Adversarial Robustness Toolbox (ART) and foolbox; those
that are not installed are left out, with a line that says so. The models are the embedded shapes model undefended and,
with `--checkpoint`, one that a method has trained. The table has, for each member and package, the samples that both
break, only the package here, and only the other, and the CPU seconds of each. `--cost` measures instead the CPU time of
APGD-T per evaluation of a small network, called directly and by the evaluation.
"""

import argparse
import importlib.util
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robustclip
from robustclip.attacks import APGD, PGD, Attack, Recipe, Square, TorchAttack, pixels
from robustclip.attacks.perturbation_set import distance
from robustclip.data import CLIPDataModule
from robustclip.evaluation.engine import examine
from robustclip.intervals import mcnemar
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.results.provenance import commit

STEPS, QUERIES, TARGETS = 20, 500, 9  # steps unless --steps is given
QUERIES_PER_STEP = 50  # of the cascade, as in AutoAttack: 100 steps and 5,000 queries
OUTSIDE = 1e-5  # images further out of the perturbation set do not count
PACKAGES = {"pyautoattack": "pyautoattack", "torchattacks": "torchattacks", "art": "ART", "foolbox": "foolbox"}


class Model(nn.Module):
    """A classifier of images, counting its evaluations; the method is hidden from packages that change modes."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.evaluations = forward, 0
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)  # torchattacks reads its device

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) to logits (B, C)."""
        self.evaluations += 1
        return self.function(images)


@dataclass
class Problem:
    """Correctly classified images of one model, a radius, and a seed."""

    model: Model
    images: Tensor
    labels: Tensor
    index: Tensor
    classes: int
    eps: float
    norm: str
    seed: int = 0
    steps: int = STEPS

    @property
    def targets(self) -> int:
        """Number of targets of targeted members."""
        return min(TARGETS, self.classes - 1)

    def is_broken(self, attacked: Tensor) -> Tensor:
        """Marks samples (B,) whose image is misclassified, in the perturbation set and in the valid pixel range."""
        attacked = attacked.detach().float()
        with torch.no_grad():
            is_wrong = self.model(attacked).argmax(1) != self.labels
        is_inside = distance(attacked, self.images, self.norm) <= self.eps + OUTSIDE
        in_range = (attacked.flatten(1).amin(1) >= -OUTSIDE) & (attacked.flatten(1).amax(1) <= 1 + OUTSIDE)
        is_broken: Tensor = is_wrong & is_inside & in_range
        return is_broken


Peer = Callable[[Problem], Tensor]
"""Returns attacked images."""


def _autoattack(p: Problem, name: str) -> Tensor:
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    shared: dict[str, Any] = {"norm": {"linf": "Linf"}.get(p.norm, p.norm.upper()), "eps": p.eps, "seed": p.seed}
    shared |= {"device": "cpu"}
    attack: Any
    if name in ("apgd_ce", "apgd_dlr"):
        attack = APGDAttack(p.model, n_iter=p.steps, loss=name[5:], use_largereps=p.norm == "l1", **shared)
    elif name == "apgd_t":
        more = {"n_target_classes": p.targets, "use_largereps": p.norm == "l1"}
        attack = APGDAttack_targeted(p.model, n_iter=p.steps, **more, **shared)
    elif name == "fab_t":
        attack = FABAttack_PT(p.model, n_iter=p.steps, targeted=True, n_target_classes=p.targets, **shared)
    else:
        attack = SquareAttack(p.model, n_queries=QUERIES, **shared)
    attacked: Tensor = attack.perturb(p.images.clone(), p.labels.clone())
    return attacked


def _standard_autoattack(p: Problem) -> Tensor:
    """Runs the standard four in AutoAttack's own loop, with the steps of the problem and 50 queries per step."""
    from pyautoattack import AutoAttack
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    shared: dict[str, Any] = {"norm": {"linf": "Linf", "l2": "L2"}[p.norm], "eps": p.eps, "seed": p.seed}
    names = ["apgd-ce", "apgd-t", "fab-t", "square"]
    attack = AutoAttack(p.model, attacks=names, version="custom", device="cpu", **shared)
    shared |= {"device": "cpu"}
    attack.apgd = APGDAttack(p.model, n_iter=p.steps, **shared)
    attack.apgd_targeted = APGDAttack_targeted(p.model, n_iter=p.steps, n_target_classes=p.targets, **shared)
    attack.fab = FABAttack_PT(p.model, n_iter=p.steps, targeted=True, n_target_classes=p.targets, **shared)
    attack.square = SquareAttack(p.model, n_queries=QUERIES_PER_STEP * p.steps, resc_schedule=True, **shared)
    attacked = attack.run_standard_evaluation(p.images.clone(), p.labels.clone(), batch_size=len(p.images))
    result: Tensor = attacked[0] if isinstance(attacked, tuple) else attacked
    return result


def _multi_attack(p: Problem) -> Tensor:
    """Runs the standard four as torchattacks' AutoAttack does, with the same budget."""
    import torchattacks

    torch.manual_seed(p.seed)
    shared: dict[str, Any] = {"norm": {"linf": "Linf", "l2": "L2"}[p.norm], "eps": p.eps, "seed": p.seed}
    attacks = [
        torchattacks.APGD(p.model, steps=p.steps, **shared),
        torchattacks.APGDT(p.model, steps=p.steps, n_classes=p.targets + 1, **shared),
        torchattacks.FAB(p.model, steps=p.steps, multi_targeted=True, n_classes=p.targets + 1, **shared),
        torchattacks.Square(p.model, n_queries=QUERIES_PER_STEP * p.steps, **shared),
    ]
    attacked: Tensor = torchattacks.MultiAttack(attacks)(p.images.clone(), p.labels.clone())
    return attacked


def _torchattacks(p: Problem, name: str, **settings: Any) -> Tensor:
    """Runs an attack of torchattacks itself, without the package's wrapper."""
    import torchattacks

    torch.manual_seed(p.seed)
    if p.norm == "l2" and name == "PGD":
        name = "PGDL2"
    if not name.startswith("PGD"):
        settings |= {"norm": {"linf": "Linf"}.get(p.norm, p.norm.upper()), "seed": p.seed}
    attacked: Tensor = getattr(torchattacks, name)(p.model, eps=p.eps, **settings)(p.images.clone(), p.labels.clone())
    return attacked


def _foolbox(p: Problem, is_random: bool) -> Tensor:
    import foolbox

    torch.manual_seed(p.seed)
    attack = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD, "l1": foolbox.attacks.L1PGD}[p.norm]
    search = attack(abs_stepsize=p.eps / 4, steps=p.steps, random_start=is_random)
    attacked: Tensor = search.run(foolbox.PyTorchModel(p.model, bounds=(0, 1)), p.images, p.labels, epsilon=p.eps)
    return attacked


def _art(p: Problem, name: str, is_random: bool = False) -> Tensor:
    import numpy as np
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    np.random.seed(p.seed)  # ART draws from numpy's global generator
    shape = tuple(p.images.shape[1:])
    options = {"clip_values": (0.0, 1.0), "device_type": "cpu"}
    more: dict[str, Any]
    estimator: Any = PyTorchClassifier(p.model, nn.CrossEntropyLoss(), shape, p.classes, **options)
    norm = {"linf": np.inf, "l2": 2, "l1": 1}[p.norm]
    shared: dict[str, Any] = {"norm": norm, "eps": p.eps, "batch_size": len(p.images), "verbose": False}
    if name == "pgd":
        more = {"eps_step": p.eps / 4, "max_iter": p.steps, "num_random_init": int(is_random)}
        attack: Any = evasion.ProjectedGradientDescentPyTorch(estimator, **more, **shared)
    elif name == "square":
        attack = evasion.SquareAttack(estimator, max_iter=QUERIES, **shared)
    else:
        loss = {"apgd_ce": "cross_entropy", "apgd_dlr": "difference_logits_ratio"}[name]
        more = {"eps_step": 2 * p.eps, "max_iter": p.steps, "nb_random_init": 1, "loss_type": loss}
        attack = evasion.AutoProjectedGradientDescent(estimator, **more, **shared)
    return torch.from_numpy(attack.generate(p.images.numpy().copy(), p.labels.numpy()))


PEERS: dict[str, dict[str, Peer]] = {
    "pgd_ce, no random start": {
        "torchattacks": lambda p: _torchattacks(
            p, "PGD", alpha=p.eps / 4, steps=p.steps, random_start=False
        ),
        "art": lambda p: _art(p, "pgd"),
        "foolbox": lambda p: _foolbox(p, is_random=False),
    },
    "pgd_ce": {
        "torchattacks": lambda p: _torchattacks(p, "PGD", alpha=p.eps / 4, steps=p.steps),
        "art": lambda p: _art(p, "pgd", is_random=True),
        "foolbox": lambda p: _foolbox(p, is_random=True),
    },
    "apgd_ce": {
        "pyautoattack": partial(_autoattack, name="apgd_ce"),
        "torchattacks": lambda p: _torchattacks(p, "APGD", steps=p.steps),
        "art": partial(_art, name="apgd_ce"),
    },
    "apgd_dlr": {
        "pyautoattack": partial(_autoattack, name="apgd_dlr"),
        "torchattacks": lambda p: _torchattacks(p, "APGD", steps=p.steps, loss="dlr"),
        "art": partial(_art, name="apgd_dlr"),
    },
    "apgd_t": {
        "pyautoattack": partial(_autoattack, name="apgd_t"),
        "torchattacks": lambda p: _torchattacks(p, "APGDT", steps=p.steps, n_classes=p.targets + 1),
    },
    "fab_t": {
        "pyautoattack": partial(_autoattack, name="fab_t"),
        "torchattacks": lambda p: _torchattacks(
            p, "FAB", steps=p.steps, multi_targeted=True, n_classes=p.targets + 1
        ),
    },
    "square": {
        "pyautoattack": partial(_autoattack, name="square"),
        "torchattacks": partial(_torchattacks, name="Square", n_queries=QUERIES),
        "art": partial(_art, name="square"),
    },
    "autoattack": {
        "pyautoattack": _standard_autoattack,
        "torchattacks": _multi_attack,
    },
}  # fmt: skip
PEERS["pgd_ce, every image"] = PEERS["pgd_ce"]  # as the evaluation judges by default
HAS_L1 = {"pyautoattack": ("apgd_ce", "apgd_dlr", "apgd_t"), "art": ("pgd_ce", "apgd_ce"), "foolbox": ("pgd_ce",)}


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
    return attacks[member](), "worst"


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.process_time()
    broken = run()
    return broken, time.process_time() - started


def compare(p: Problem, member: str, seeds: int, packages: list[str]) -> dict[str, Any]:
    """Counts the samples, over all seeds, that one package breaks and the other does not."""
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
    rows: dict[str, Any] = {"n": len(p.images), "seeds": seeds, "robustclip": {"broken": _count(mine)}}
    rows["robustclip"]["seconds"] = round(seconds, 1)
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
        rows[package] = {"broken": _count(theirs), "only_ours": only_ours, "only_theirs": only_theirs}
        rows[package] |= {"p": round(mcnemar(only_ours, only_theirs), 4), "seconds": round(seconds, 1)}
        print(member, package, rows["robustclip"], rows[package], flush=True)
    return rows


def _judged(peer: Peer, problem: Problem) -> Tensor:
    return problem.is_broken(peer(problem))


def _count(broken: list[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in broken)


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
