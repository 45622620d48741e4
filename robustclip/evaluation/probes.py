"""Probes measure during a test for the audit; `Evidence` holds their values and the ledgers as columns of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustclip.attacks import Attack, Member, noise
from robustclip.attacks.attack import Forward
from robustclip.attacks.sample_losses import cross_entropy
from robustclip.evaluation.engine import ROBUST, examine
from robustclip.models.clip import CLIPModel
from robustclip.results.protocol import differences, is_checked, with_counts
from robustclip.results.run import Run

PROBED_SHARE = 1 / 64  # share of the samples that run again
ATTACKED_SHARE = 1 / 4  # share of these that are attacked again, since small batches are slow
PROBE_SEED = 0x5EED
WIDER, LONGER = 4.0, 2.0  # factors of the radius and of the steps of a probe
ANYTHING = 0.5  # at this radius every image can be made grey, so that no model is correct (arXiv:1802.00420)

Columns = Mapping[str, NDArray[Any]]
Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Evidence:
    """Holds the measurements of a finished test for the checks of the audit.

    Attributes:
        samples: task to the ledger's columns of its samples.
        attacked: task and attack to the ledger's columns of the attack, for the samples that were attacked.
        members: task and attack to the members of the attack.
        class_counts: task to number of classes.
        protocols: task and attack to the protocol of this run.
        is_undefended: whether the run declares that its model has no defence.
        baseline: test of the base model under the same protocol, if there is one.
    """

    samples: Mapping[str, Columns]
    attacked: Mapping[tuple[str, str], Columns]
    members: Mapping[tuple[str, str], Sequence[Member]]
    class_counts: Mapping[str, int]
    protocols: Mapping[str, Mapping[str, Any]]
    is_undefended: bool
    baseline: Run | None = None

    def total(self, column: str) -> NDArray[Any]:
        """Joins a column over all tasks and attacks."""
        parts = [columns[column] for columns in self.attacked.values()]
        return np.concatenate(parts) if parts else np.zeros(0)

    def clean(self, column: str) -> NDArray[Any]:
        """Joins a column over the samples of all tasks."""
        return np.concatenate([np.zeros(0), *(columns[column] for columns in self.samples.values())])

    def share_robust(self, task: str, attack: str) -> float:
        """Returns the robust share of all samples of a task.

        Args:
            task: name of the task.
            attack: name of the attack.
        """
        return float((self.attacked[task, attack]["by"] == "").sum() / max(1, len(self.samples[task]["id"])))

    def undefended(self) -> dict[str, float] | str:
        """Returns the robust accuracy of the undefended model by attack, or the reason why it is not known.

        Only the largest of several radii counts, since an undefended model may survive small ones.
        """
        radii = {
            key: {(member.attack.norm, member.attack.eps) for member in members}
            for key, members in self.members.items()
        }
        largest: dict[str, float] = {}
        for norm, eps in set().union(*radii.values()):
            largest[norm] = max(eps or 0, largest.get(norm, 0))
        keys = [
            key
            for key, pairs in radii.items()
            if len(self.samples[key[0]]["id"]) and any(eps is None or 0 < eps == largest[norm] for norm, eps in pairs)
        ]
        attacks = {attack for _, attack in keys}
        if not attacks:
            return "no attack ran"
        if self.is_undefended:
            shares = {name: [self.share_robust(*key) for key in keys if key[1] == name] for name in attacks}
            return {name: float(np.mean(values)) for name, values in shares.items()}
        if self.baseline is None:
            return "not given; set results.baseline to the folder of the base model's test under the same protocol"
        for task, attack in keys:
            if line := self._difference(self.baseline, task, attack):
                return f"{self.baseline.name} has another protocol for {task} under {attack}: {line}"
        return {name: values["acc1"] for name, values in self.baseline.result["mean"].items() if name in attacks}

    def _difference(self, baseline: Run, task: str, attack: str) -> str:
        """Names the differences between the baseline's protocol and this run's; empty if there are none."""
        own, theirs = (
            protocols.get(task, {}).get(attack, {}).get("axes", {})
            for protocols in (self.protocols, baseline.result["protocol"])
        )
        if not theirs:
            return "it has none"
        columns = self.samples[task]
        rows = {number: {"pixels": pixels} for number, pixels in zip(columns["id"], columns["pixels"], strict=True)}
        of_baseline = {int(row["id"]): row for row in baseline.rows(task)}
        lines = with_counts(differences(theirs, own), of_baseline, rows)
        if not lines and not is_checked(theirs, own):
            return "its images are not known; test it again with this version"
        return "; ".join(lines)


def probed(index: Tensor) -> tuple[Tensor, Tensor]:
    """Chooses by id the samples of a batch that run again, and those among them that are attacked again.

    Args:
        index: ``(B,)`` ids of the samples.

    Returns:
        Places in the batch, twice.
    """
    draw = noise.uniform(index, (1,), seed=PROBE_SEED)[:, 0]
    return (draw < PROBED_SHARE).nonzero()[:, 0], (draw < PROBED_SHARE * ATTACKED_SHARE).nonzero()[:, 0]


def repeat(images: Tensor, forward: Forward, logits: Tensor, *, clip: CLIPModel) -> dict[str, Tensor]:
    """Runs images again, this time in one batch with their mirror images.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        forward: function from images to logits.
        logits: ``(B, C)`` of the first run.
        clip: model whose image tower must receive the images normalised once.

    Returns:
        ``repeat``, the largest change ``(B,)`` of a logit, and ``outside``, the largest distance ``(B,)`` of a pixel
        from [0, 1]; see the ledger's columns.
    """
    seen: list[Tensor] = []
    hook = clip.net.visual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.inference_mode(False), torch.no_grad():
            images = images.clone()
            again = forward(torch.cat([images, images.flip(-1)]))[: len(images)]
    finally:
        hook.remove()
    columns: dict[str, Tensor] = {"repeat": (again - logits).abs().amax(-1)}
    if len(seen) == 1 and len(seen[0]) == 2 * len(images):
        unit = seen[0][: len(images)].float() * clip.std + clip.mean
        columns["outside"] = torch.maximum(-unit, unit - 1).flatten(1).amax(1).clamp(min=0)
    return columns


def losses(images: Tensor, labels: Tensor, forward: Forward) -> Tensor:
    """Computes the cross-entropy ``(B,)`` of images, without gradients.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: function from images to logits.
    """
    with torch.inference_mode(False), torch.no_grad():
        return cross_entropy(forward(images.clone()), labels.clone())


def stronger(attack: Attack, by: Tensor, images: Tensor) -> list[tuple[str, Tensor, Attack | None]]:
    """Lists the probes by an attack that is stronger than the first member.

    Args:
        attack: first member.
        by: ``(B,)`` verdict on the probed samples.
        images: any images of the task, for their size.

    Returns:
        Column of the ledger, mask ``(B,)`` of the samples, and the stronger attack, which must succeed on them.
    """
    is_misclassified, probes = by == 0, []
    if attack.eps:
        probes = [("wider", is_misclassified, attack.scaled(radius=WIDER))]
        half = ANYTHING * (math.sqrt(images[0].numel()) if attack.norm == "l2" else 1)
        if attack.eps < half:
            probes.append(("wider", by == ROBUST, attack.scaled(radius=half / attack.eps)))
    return [*probes, ("longer", is_misclassified, attack.scaled(steps=LONGER))]


def probe_outcomes(
    images: Tensor, labels: Tensor, forward: Forward, attack: Attack | None, *, index: Tensor, seed: int
) -> list[int | str]:
    """Returns 1 for each sample that an attack misclassifies on any image that it tries, else 0.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        labels: ``(B,)``.
        forward: function from images to logits.
        attack: attack of the probe; None gives empty cells.
        index: ``(B,)`` ids of the samples.
        seed: seed of the attack.
    """
    if attack is None:
        return [""] * len(images)
    verdict = examine(images, labels, forward, [Member("probe", attack)], index=index, seed=seed)
    return [int(number != ROBUST) for number in verdict.by.tolist()]


def sample_columns(rows: Rows) -> Columns:
    """Returns the columns of a ledger that hold for the samples under every attack."""
    whole: dict[str, NDArray[Any]] = {name: _integers(rows, name) for name in ("id", "label", "clean")}
    whole["pixels"] = np.array([row["pixels"] for row in rows], dtype=object)
    return whole | {name: _floats(rows, name) for name in ("clean_loss", "largest_logit", "outside", "repeat")}


def attack_columns(rows: Rows, attack: str) -> Columns:
    """Returns the columns of one attack for the samples that are classified correctly without it.

    Args:
        rows: rows of a ledger.
        attack: name of the attack.
    """
    attacked = [row for row in rows if row[f"{attack}.by"] != "clean"]
    names = ("loss", "steps", "dead", "distance", "excess", "nans", "exact", "again", "wider", "longer")
    numbers = {name: _floats(attacked, f"{attack}.{name}") for name in names}
    by = np.array([row[f"{attack}.by"] for row in attacked], dtype=object)
    return numbers | {"by": by, "clean_loss": _floats(attacked, "clean_loss")}


def _integers(rows: Rows, name: str) -> NDArray[Any]:
    return np.array([int(row[name]) for row in rows], dtype=np.int64)


def _floats(rows: Rows, name: str) -> NDArray[Any]:
    return np.array([float(row[name] or "nan") for row in rows])
