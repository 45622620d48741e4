"""What an audit looks at: probes that run beside the attacks, and the ledgers as columns of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustclip.attacks import Attack, Member, noise
from robustclip.attacks.base import Forward
from robustclip.attacks.verdict import ROBUST, examine
from robustclip.clip import CLIPModel
from robustclip.runs import Run

PROBED_SHARE = 1 / 64  # keeps the probes' cost below a twentieth of the attack's
PROBE_SEED = 0x5EED
WIDER, LONGER = 4.0, 2.0  # factors of radius and of steps that a probe uses
ANYTHING = 0.5  # a radius at which every image can be made grey, so that no model can be right (arXiv:1802.00420)

Columns = Mapping[str, NDArray[Any]]
Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Evidence:
    """What the checks look at.

    Attributes:
        samples: task to the ledger's columns of its samples.
        attacked: task and attack to the ledger's columns of the attack, for the samples that needed one.
        members: task and attack to the members of the attack.
        class_counts: task to number of classes.
        protocols: of this run, by task and attack.
        is_undefended: the model is the pre-trained one.
        baseline: test of the undefended model, if there is one.
    """

    samples: Mapping[str, Columns]
    attacked: Mapping[tuple[str, str], Columns]
    members: Mapping[tuple[str, str], Sequence[Member]]
    class_counts: Mapping[str, int]
    protocols: Mapping[str, Mapping[str, Any]]
    is_undefended: bool
    baseline: Run | None = None

    def total(self, column: str) -> NDArray[Any]:
        """A column of all tasks and attacks."""
        parts = [columns[column] for columns in self.attacked.values()]
        return np.concatenate(parts) if parts else np.zeros(0)

    def share_robust(self, task: str, attack: str) -> float:
        """Of all samples of a task."""
        return float((self.attacked[task, attack]["by"] == "").sum() / max(1, len(self.samples[task]["id"])))


def is_probed(index: Tensor) -> Tensor:
    """Which samples ``(B,)`` are probed: a fixed function of their ids."""
    chosen: Tensor = noise.uniform(index, (1,), seed=PROBE_SEED)[:, 0] < PROBED_SHARE
    return chosen


def repeat(images: Tensor, forward: Forward, logits: Tensor, *, clip: CLIPModel) -> dict[str, Tensor]:
    """What comes when images ``(B, 3, H, W)`` run again, beside their mirror images instead of the other images.

    Args:
        images: in [0, 1].
        forward: images to logits.
        logits: that they had, ``(B, C)``.
        clip: whose tower should see them normalised once.

    Returns:
        ``repeat``, the largest change ``(B,)`` of a logit; ``outside``, see the ledger's columns.
    """
    seen: list[Tensor] = []
    hook = clip.net.visual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.inference_mode(False), torch.no_grad():
            images = images.clone()
            again = forward(torch.cat([images, images.flip(-1)]))[: len(images)]
    finally:
        hook.remove()
    found: dict[str, Tensor] = {"repeat": (again - logits).abs().amax(-1)}
    if len(seen) == 1 and len(seen[0]) == 2 * len(images):
        unit = seen[0][: len(images)].float() * clip.std + clip.mean
        found["outside"] = torch.maximum(-unit, unit - 1).flatten(1).amax(1).clamp(min=0)
    return found


def stronger(attack: Attack, by: Tensor, images: Tensor) -> list[tuple[str, Tensor, Attack | None]]:
    """Probes by column of the ledger: whom they concern ``(B,)``, and what must break them.

    Args:
        attack: first member.
        by: ``(B,)`` verdict on the samples that are probed.
        images: any of the task, for their size.
    """
    is_broken, probes = by == 0, []
    if attack.eps:
        probes = [("wider", is_broken, attack.scaled(radius=WIDER))]
        half = ANYTHING * (math.sqrt(images[0].numel()) if attack.norm == "l2" else 1)
        if attack.eps < half:
            probes.append(("wider", by == ROBUST, attack.scaled(radius=half / attack.eps)))
    return [*probes, ("longer", is_broken, attack.scaled(steps=LONGER))]


def breaks(
    images: Tensor, labels: Tensor, forward: Forward, attack: Attack | None, *, index: Tensor, seed: int
) -> list[int | str]:
    """For each sample 1 if an attack breaks it anywhere on its way, else 0; empty where there is no attack."""
    if attack is None:
        return [""] * len(images)
    verdict = examine(images, labels, forward, [Member("probe", attack)], index=index, seed=seed)
    return [int(number != ROBUST) for number in verdict.by.tolist()]


def sample_columns(rows: Rows) -> Columns:
    """Columns of the samples themselves."""
    whole = {name: _integers(rows, name) for name in ("id", "label", "clean")}
    return whole | {name: _floats(rows, name) for name in ("clean_loss", "largest_logit", "outside", "repeat")}


def attack_columns(rows: Rows, attack: str) -> Columns:
    """Columns of one attack, of the samples that were right without it."""
    attacked = [row for row in rows if row[f"{attack}.by"] != "clean"]
    names = ("loss", "steps", "dead", "distance", "excess", "nans", "wider", "longer")
    numbers = {name: _floats(attacked, f"{attack}.{name}") for name in names}
    by = np.array([row[f"{attack}.by"] for row in attacked], dtype=object)
    return numbers | {"by": by, "clean_loss": _floats(attacked, "clean_loss")}


def _integers(rows: Rows, name: str) -> NDArray[Any]:
    return np.array([int(row[name]) for row in rows], dtype=np.int64)


def _floats(rows: Rows, name: str) -> NDArray[Any]:
    return np.array([float(row[name] or "nan") for row in rows])
