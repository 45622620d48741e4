"""Attacks of four other packages at equal budget, by the names of the members of the recipes.

The packages are AutoAttack (`pyautoattack`), torchattacks, the Adversarial Robustness Toolbox (ART) and foolbox. Each
is imported where its attack runs, so that those that are not installed can be left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustclip.attacks import perturbation_set
from robustclip.attacks.perturbation_set import distance
from robustclip.attacks.sample_losses import predicted

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
            is_wrong = predicted(self.model(attacked), self.labels) != self.labels
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


def _from_equal_start(p: Problem, loss: str) -> Tensor:
    """Runs Auto-PGD of `pyautoattack` from the start that this package draws for the same seed."""
    from pyautoattack.autopgd_base import APGDAttack

    norm = {"linf": "Linf", "l2": "L2"}[p.norm]
    attack = APGDAttack(p.model, n_iter=p.steps, loss=loss, norm=norm, eps=p.eps, seed=p.seed, device="cpu")
    attack.init_hyperparam(p.images)
    draw = perturbation_set.stream(p.seed, 0)
    start = perturbation_set.surface_start(p.images, p.eps, p.norm, p.index, draw)
    best, correct, _, misclassified = attack.attack_single_run(p.images, p.labels, start)
    attacked: Tensor = torch.where(correct.bool().view(-1, 1, 1, 1), best, misclassified)
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
    "apgd_ce, equal start": {"pyautoattack": partial(_from_equal_start, loss="ce")},
    "apgd_dlr, equal start": {"pyautoattack": partial(_from_equal_start, loss="dlr")},
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
