"""The measurements of a finished test for the audit: the ledgers as columns of numbers, and facts beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustclip.attacks import Member
from robustclip.evaluation.ways import WAYS
from robustclip.results.protocol import differences, is_checked, with_counts
from robustclip.results.run import Run
from robustclip.types import TrainingImages

Columns = Mapping[str, NDArray[Any]]
Rows = Sequence[Mapping[str, str]]
SAMPLE_NUMBERS = (
    *("clean_loss", "largest_logit", "logit_sum", "least_logit", "outside", "repeat", "faithful", "regrad", "spread"),
    *("steady", "rise", "random", "autograd", "state", "leak", "draws"),
)
ATTACK_NUMBERS = (
    *("loss", "steps", "dead", "distance", "excess", "nans", "exact", "again"),
    *("wider", "longer", "other", "transfer", "borrowed", "own"),
)


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
        is_robust: whether its weights are known to be robust; None if that is not known.
        trained_on: images that the weights were trained on with labels.
        baseline: test of the base model under the same protocol, if there is one.
        defence: description of the test-time defence with its declared properties; None without one.
        ways: settings of the ways through it.
    """

    samples: Mapping[str, Columns]
    attacked: Mapping[tuple[str, str], Columns]
    members: Mapping[tuple[str, str], Sequence[Member]]
    class_counts: Mapping[str, int]
    protocols: Mapping[str, Mapping[str, Any]]
    is_undefended: bool
    is_robust: bool | None = None
    trained_on: TrainingImages = field(default_factory=TrainingImages)
    baseline: Run | None = None
    defence: Mapping[str, Any] | None = None
    ways: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_declared_cut(self) -> bool:
        """Whether the defence declares that its gradient is cut, so that only the other ways attack it."""
        return self.defence is not None and self.defence["backward"] == "none"

    @property
    def omitted_ways(self) -> list[str]:
        """Ways through the defence that the test left out, and averages that it did not take."""
        if self.defence is None:
            return []
        omitted: list[str] = [name for name in WAYS if name not in self.ways["names"]]
        if "black_box" not in omitted and not self.ways["queries"]:
            omitted.append("black_box")
        return [*omitted, "draws"] if self.defence["is_random"] and self.ways["draws"] == 1 else omitted

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
        if self.is_undefended and not self.is_robust:
            shares = {name: [self.share_robust(*key) for key in keys if key[1] == name] for name in attacks}
            return {name: float(np.mean(values)) for name, values in shares.items()}
        if self.baseline is None and self.is_robust:
            return (
                "the tested weights are robust, hence no baseline; set results.baseline to a test of the model before"
            )
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


def sample_columns(rows: Rows) -> Columns:
    """Returns the columns of a ledger that hold for the samples under every attack."""
    whole: dict[str, NDArray[Any]] = {name: _integers(rows, name) for name in ("id", "label", "clean")}
    whole["pixels"] = np.array([row["pixels"] for row in rows], dtype=object)
    return whole | {name: _floats(rows, name) for name in SAMPLE_NUMBERS}


def attack_columns(rows: Rows, attack: str) -> Columns:
    """Returns the columns of one attack for the samples that are classified correctly without it.

    Args:
        rows: rows of a ledger.
        attack: name of the attack.
    """
    attacked = [row for row in rows if row[f"{attack}.by"] != "clean"]
    numbers = {name: _floats(attacked, f"{attack}.{name}") for name in ATTACK_NUMBERS}
    by = np.array([row[f"{attack}.by"] for row in attacked], dtype=object)
    return numbers | {"by": by, "clean_loss": _floats(attacked, "clean_loss")}


def _integers(rows: Rows, name: str) -> NDArray[Any]:
    return np.array([int(row[name]) for row in rows], dtype=np.int64)


def _floats(rows: Rows, name: str) -> NDArray[Any]:
    return np.array([float(row.get(name) or "nan") for row in rows])  # ledgers of older versions have fewer columns
