"""Sections of a result that the package makes, from the ledgers and facts of a test alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from robustclip.attacks import Member
from robustclip.evaluation.audit import audit
from robustclip.evaluation.detection_summary import detected
from robustclip.evaluation.probes import Evidence, attack_columns, sample_columns
from robustclip.results.run import Run
from robustclip.results.summary import Record, Summarise
from robustclip.results.tables import DETECTION

GEOMETRY = "geometry"


@dataclass(frozen=True)
class AttackFacts:
    """The facts about an attack that the audit looks at; see `Attack`."""

    eps: float | None
    norm: str
    is_anytime: bool
    is_black_box: bool


class StoredMember(NamedTuple):
    """A member of an attack as a finished test stores it; see `Member`."""

    name: str
    attack: AttackFacts
    note: str


def stored_members(
    members: Mapping[tuple[str, str], Sequence[Member]], tasks: Sequence[str]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Members of every attack on every task, in JSON's types.

    Args:
        members: task and attack to the members of the attack.
        tasks: names of all tasks.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {task: {} for task in tasks}
    for (task, attack), given in members.items():
        found[task][attack] = [
            {"name": each.name, "note": each.note}
            | {name: getattr(each.attack, name) for name in AttackFacts.__dataclass_fields__}
            for each in given
        ]
    return found


def audited(record: Record) -> dict[str, Any]:
    """The audit of a test."""
    facts = record.facts
    members: dict[tuple[str, str], Any] = {
        (task, attack): [_member(each) for each in given]
        for task, attacks in facts["members"].items()
        for attack, given in attacks.items()
    }
    evidence = Evidence(
        {task: sample_columns(record.rows[task]) for task in facts["tasks"]},
        {(task, attack): attack_columns(record.rows[task], attack) for task, attack in members},
        members,
        {task: given["class_count"] for task, given in facts["tasks"].items()},
        record.protocol,
        is_undefended=facts["is_undefended"],
        baseline=None if facts["baseline"] is None else Run.open(Path(facts["baseline"])),
    )
    return audit(evidence)


def measured(record: Record) -> dict[str, Any]:
    """The section of a test with `FeatureGeometry`."""
    found: dict[str, Any] = record.settings(GEOMETRY)["values"]
    return found


def _member(given: Mapping[str, Any]) -> StoredMember:
    attack = AttackFacts(**{name: given[name] for name in AttackFacts.__dataclass_fields__})
    return StoredMember(given["name"], attack, given["note"])


SECTIONS: Mapping[str, Summarise] = {DETECTION: detected, GEOMETRY: measured, "audit": audited}
