"""The package's own sections of a result, computed from the ledgers and facts of a test alone."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from robustclip.attacks import Attack, Member
from robustclip.evaluation.detection_summary import detected
from robustclip.evaluation.evidence import Evidence, attack_columns, sample_columns
from robustclip.evaluation.geometry_summary import GEOMETRY, measured
from robustclip.evaluation.grading import audit, checks_at
from robustclip.results.corruption_error import CORRUPTIONS
from robustclip.results.corruption_summary import corrupted
from robustclip.results.run import baseline_of
from robustclip.results.summary import Record, Summarise
from robustclip.results.tables import DETECTION
from robustclip.types import TrainingImages

FACTS = ("eps", "norm", "is_anytime", "is_black_box")  # attributes of every attack that the audit reads
EFFORT = ("loss", "steps", "targets", "queries")  # further ones, which some attacks have


def stored_members(
    members: Mapping[tuple[str, str], Sequence[Member]], tasks: Sequence[str]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns the members of every attack on every task in JSON's types.

    Args:
        members: task and attack to the members of the attack.
        tasks: names of all tasks.
    """
    stored: dict[str, dict[str, list[dict[str, Any]]]] = {task: {} for task in tasks}
    for (task, attack), several in members.items():
        stored[task][attack] = [
            {
                "name": member.name,
                "note": member.note,
                "attack": {name: getattr(member.attack, name) for name in FACTS}
                | {name: member.attack.settings[name] for name in EFFORT if name in member.attack.settings},
                **({} if member.attack.aim is None else {"aim": member.attack.aim}),
            }
            for member in several
        ]
    return stored


def audited(record: Record) -> dict[str, Any]:
    """Audits a test from its record."""
    facts = record.facts
    members = {
        (task, attack): [
            Member(member["name"], cast(Attack, SimpleNamespace(**member["attack"]))) for member in several
        ]
        for task, attacks in facts["members"].items()
        for attack, several in attacks.items()
        if not any("aim" in member for member in several)  # whether they succeed is no measure of the others
    }
    evidence = Evidence(
        {task: sample_columns(record.rows[task]) for task in facts["tasks"]},
        {(task, attack): attack_columns(record.rows[task], attack) for task, attack in members},
        members,
        {task: given["class_count"] for task, given in facts["tasks"].items()},
        record.protocol,
        is_undefended=facts["is_undefended"],
        is_robust=facts.get("is_robust"),
        trained_on=TrainingImages.read(facts.get("trained_on")),
        baseline=baseline_of(facts),
        defence=facts["model"].get("defence"),
        ways=facts["model"].get("ways", {}),
    )
    return audit(evidence, checks_at(facts["checks"]))


SECTIONS: Mapping[str, Summarise] = {
    DETECTION: detected,
    GEOMETRY: measured,
    CORRUPTIONS: corrupted,
    "audit": audited,
}
