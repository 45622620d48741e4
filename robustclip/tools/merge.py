"""Joins the shards of a test, which ran on several machines, to the result of one test."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from robustclip import persistence
from robustclip.evaluation.geometry_summary import CAPTIONED, GEOMETRY, tidied_tables
from robustclip.evaluation.identity import unlike
from robustclip.evaluation.journal import first_misclassified
from robustclip.evaluation.result_display import print_result
from robustclip.evaluation.sections import SECTIONS
from robustclip.results import ledger
from robustclip.results.adversarial_examples import SUFFIX
from robustclip.results.run import EXAMPLES, FACTS, LEDGERS, PROTOCOL, SHARD, read_facts
from robustclip.results.summary import Record, ledger_names, summarise, write_result

EQUAL = ("is_undefended", "baseline", "averages", "checks", "tasks", "members", "tables")
# Paths and repository of the model, which may differ; the fingerprints of the weights do not.
OF_MACHINE = ("checkpoint", "pretrained", "source")
SHOWN = 3  # differences or shards in a message


@dataclass(frozen=True)
class Shard:
    """The finished test of a part of the samples.

    Attributes:
        folder: folder that `robustclip test --shard I --shards N` wrote.
        facts: content of its ``facts.json``.
    """

    folder: Path
    facts: Mapping[str, Any]

    @property
    def number(self) -> int:
        """Number of the part, from 0."""
        return int(self.facts[SHARD]["number"])

    @property
    def count(self) -> int:
        """Number of parts."""
        return int(self.facts[SHARD]["count"])

    @property
    def identity(self) -> dict[str, Any]:
        """The facts that determine rows and results, in which all shards of a test agree."""
        sections = {name: {**values} for name, values in self.facts["sections"].items()}
        sections.get(GEOMETRY, {}).pop(CAPTIONED, None)  # the first shard has measured it
        return {**self.facts, "sections": sections, SHARD: None}


def merge(shards: list[Path], out: Path) -> None:
    """Join the shards of a test to one result, which equals that of a test of all samples by one process.

    Nothing is evaluated and no model is loaded. Seconds are summed over the shards.

    Args:
        shards: folders that `robustclip test --shard I --shards N` wrote, one for every I.
        out: folder of the result; it must not exist.

    Raises:
        ValueError: a folder is no finished shard, a shard is missing or given twice, the shards are of different tests,
            or a sample is in two of them.
    """
    opened = sorted((_opened(path) for path in shards), key=lambda shard: shard.number)
    _check_complete(opened)
    for other in opened[1:]:
        _check_same_test(opened[0], other)
    facts = _joined_facts(opened)
    with persistence.atomic_folder(out) as folder:
        (folder / LEDGERS).mkdir()
        rows = {name: _joined_ledger(opened, name, facts, folder) for name in ledger_names(out, facts)}
        persistence.atomic_write(folder / FACTS, json.dumps(facts, indent=1) + "\n")
        result = summarise(Record(facts, rows), {name: SECTIONS[name] for name in facts["sections"]})
        _copy_examples(opened, rows, facts, folder / EXAMPLES)
        write_result(folder, result)
    print_result(result, out)


def _opened(folder: Path) -> Shard:
    if (folder / PROTOCOL).is_file():
        raise ValueError(f"{folder} is a test that has not finished; start the same command again")
    facts = read_facts(folder)
    shard = facts.get(SHARD)
    if not shard:
        raise ValueError(f"{folder} is a whole test, and no shard of one; nothing is to be joined")
    return Shard(folder, facts)


def _check_complete(shards: Sequence[Shard]) -> None:
    """Checks that every shard is there once.

    Raises:
        ValueError: shards are missing, repeated, or of different splits.
    """
    first = shards[0]
    for one, other in pairwise(shards):
        if first.count != other.count:
            split = f"{first.folder} is one of {first.count} shards, {other.folder} one of {other.count}"
            raise ValueError(f"{split}; give all shards of one split")
        if one.number == other.number:
            raise ValueError(f"{one.folder} and {other.folder} are both shard {one.number}; leave one out")
    missing = sorted({*range(first.count)} - {shard.number for shard in shards})
    if missing:
        some = ", ".join(map(str, missing[:SHOWN])) + (" and others" if len(missing) > SHOWN else "")
        raise ValueError(f"{len(missing)} of {first.count} shards, numbered from 0, are missing: {some}; give all")


def _check_same_test(first: Shard, other: Shard) -> None:
    """Checks that two shards have the same model, data, attacks and settings.

    Raises:
        ValueError: they differ; the message has the first differences.
    """
    a, b = first.identity, other.identity
    lines = unlike(a, b)
    models = [{name: value for name, value in test["model"].items() if name not in OF_MACHINE} for test in (a, b)]
    pairs = {name: (a.get(name), b.get(name)) for name in EQUAL} | {
        f"model.{name}": (value, models[1].get(name)) for name, value in models[0].items()
    }
    lines += [f"{name}: {_short(one)} against {_short(two)}" for name, (one, two) in pairs.items() if one != two]
    if lines:
        more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        both = f"{first.folder} and {other.folder}"
        raise ValueError(f"{both} are shards of different tests ({'; '.join(lines[:SHOWN])}{more}); test one again")


def _joined_facts(shards: Sequence[Shard]) -> dict[str, Any]:
    """Returns the facts of the whole test."""
    all_facts = [shard.facts for shard in shards]
    facts = {name: value for name, value in all_facts[0].items() if name != SHARD}
    counts = [shard["bad_samples"] for shard in all_facts]
    config = facts["config"]
    if config is not None:
        config = {**config, "shard": 0, "shards": 1}
    return facts | {
        "finished": max(shard["finished"] for shard in all_facts),
        "versions": {name: _distinct([shard["versions"][name] for shard in all_facts]) for name in facts["versions"]},
        "commit": _distinct([shard["commit"] for shard in all_facts]),
        "device": _distinct([shard["device"] for shard in all_facts]),
        "config": config,
        "bad_samples": {task: sum(count[task] for count in counts) for task in facts["bad_samples"]},
        "other_metrics": _equal_metrics([shard["other_metrics"] for shard in all_facts]),
    }


def _equal_metrics(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the metrics of further callbacks that are equal in all shards, and warns about the others."""
    equal = {name: value for name, value in metrics[0].items() if all(other.get(name) == value for other in metrics)}
    if left_out := sorted({name for one in metrics for name in one} - equal.keys()):
        names = ", ".join(left_out[:SHOWN])
        sys.stderr.write(f"warning: metrics that differ between the shards are left out of the result: {names}\n")
    return equal


def _joined_ledger(shards: Sequence[Shard], name: str, facts: Mapping[str, Any], folder: Path) -> list[dict[str, str]]:
    """Writes the rows of all shards in the order of the ids, and returns them.

    Raises:
        ValueError: a sample is in two shards, or the shards have different columns.
    """
    rows: dict[int, dict[str, str]] = {}
    header = ledger.header(shards[0].folder / LEDGERS / f"{name}.csv")
    for shard in shards:
        for row in ledger.read(shard.folder / LEDGERS / f"{name}.csv", header):
            if rows.setdefault(int(row["id"]), row) is not row:
                where = f"sample {row['id']} of {name} is in two shards, one of them {shard.folder}"
                raise ValueError(f"{where}; the data module must yield every sample in one share")
    ordered = [rows[number] for number in sorted(rows)]
    tidies = tidied_tables([name], facts["sections"][GEOMETRY]) if GEOMETRY in facts["sections"] else {}
    ordered = tidies[name](ordered) if name in tidies else ordered
    ledger.write(folder / LEDGERS / f"{name}.csv", header, ordered)
    return ordered


def _copy_examples(
    shards: Sequence[Shard], rows: Mapping[str, Sequence[Mapping[str, str]]], facts: Mapping[str, Any], target: Path
) -> None:
    """Copies the adversarial examples of the smallest ids, of which every shard has kept its own.

    Raises:
        ValueError: an example is missing.
    """
    for task, attacks in facts["members"].items():
        for attack in attacks:
            for number in first_misclassified(rows[task], attack, facts["save_examples"]):
                name = Path(task, attack, f"{number}{SUFFIX}")
                sources = [shard.folder / EXAMPLES / name for shard in shards]
                source = next((path for path in sources if path.is_file()), None)
                if source is None:
                    raise ValueError(f"no shard has the adversarial example {name}; test the shard of the sample again")
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target / name)


def _distinct(values: Sequence[str | None]) -> str | None:
    """Joins the different values of all shards."""
    return "; ".join(dict.fromkeys(value for value in values if value is not None)) or None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
