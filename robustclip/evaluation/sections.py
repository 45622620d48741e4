"""Sections of a result that the package makes, from the ledgers and facts of a test alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from robustclip.attacks import Attack, Member
from robustclip.evaluation.audit import audit, checks_at
from robustclip.evaluation.detection_summary import detected
from robustclip.evaluation.geometry_summary import GEOMETRY, measured
from robustclip.evaluation.probes import Evidence, attack_columns, sample_columns
from robustclip.results.run import Run
from robustclip.results.summary import Record, Summarise
from robustclip.results.tables import DETECTION

OF_ATTACKS = ("eps", "norm", "is_anytime", "is_black_box")  # facts about an attack that the audit looks at


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
            {"name": each.name, "note": each.note, "attack": {name: getattr(each.attack, name) for name in OF_ATTACKS}}
            for each in given
        ]
    return found


def audited(record: Record) -> dict[str, Any]:
    """The audit of a test."""
    facts = record.facts
    members = {
        (task, attack): [Member(each["name"], cast(Attack, SimpleNamespace(**each["attack"]))) for each in given]
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
    return audit(evidence, checks_at(facts["checks"]))


SECTIONS: Mapping[str, Summarise] = {DETECTION: detected, GEOMETRY: measured, "audit": audited}
