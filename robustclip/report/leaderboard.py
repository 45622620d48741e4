"""``robustclip leaderboard`` writes a static page of results; only results of one protocol share a table."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

from robustclip.persistence import atomic_folder
from robustclip.report.templating import environment
from robustclip.report.view import CLEAN, FAILED, MISSING, Score, View, views
from robustclip.results.protocol import digest
from robustclip.tools.claims import Claim, is_same, read

SCRIPT, STYLE, PAGE = "leaderboard.js", "report.css", "leaderboard.html.j2"


@dataclass(frozen=True)
class Cell:
    """A number of the table.

    Args:
        text: accuracy in percent, or a dash.
        note: 95 % interval, or the claims' conditions.
        order: number that the column is sorted by.
    """

    text: str
    note: str = ""
    order: float = -1.0


@dataclass(frozen=True)
class Row:
    """One result of a table.

    Args:
        name: name of the method, unique on the page.
        model: architecture and pre-trained weights.
        grade: grade of the audit.
        cells: clean accuracy and accuracy under every attack, means over the tasks.
        claimed: claims of papers about the method.
        file: name of its JSON file.
    """

    name: str
    model: str
    grade: str
    cells: Sequence[Cell]
    claimed: Sequence[str]
    file: str


@dataclass(frozen=True)
class Group:
    """Results of one protocol.

    Args:
        protocol: short hash of the protocol.
        tasks: number of samples by task.
        columns: ``clean`` and the attacks.
        facts: description of each attack.
        rows: results, the highest accuracy under the last attack first; failed audits stand last.
    """

    protocol: str
    tasks: Mapping[str, int]
    columns: Sequence[str]
    facts: Mapping[str, str]
    rows: Sequence[Row]

    @property
    def size(self) -> int:
        """Number of results."""
        return len(self.rows)


def leaderboard(runs: list[Path], *, out: Path) -> None:
    """Write a static page that ranks finished tests, with one table per protocol and one JSON file per result.

    Tests of unlike protocols never share a table. A test whose audit failed is listed last, with a mark. The page needs
    no network, and its columns are sorted by a click.

    Args:
        runs: folders that ``robustclip test`` wrote.
        out: folder to write; it must not exist.

    Raises:
        ValueError: there is no run, a test is unfinished, or the folder exists.
    """
    if not runs:
        raise ValueError("leaderboard needs at least one folder of `robustclip test`")
    opened = views(runs)
    names = dict(zip((view.number for view in opened), _file_names(opened), strict=True))
    groups = [_group(protocol, members, names) for protocol, members in _by_protocol(opened).items()]
    with atomic_folder(out) as aside:
        (aside / "index.html").write_text(_page(groups), encoding="utf-8")
        for view in opened:
            (aside / names[view.number]).write_text(json.dumps(entry(view), indent=1), encoding="utf-8")


def entry(view: View) -> dict[str, Any]:
    """Returns the content of a result's JSON file.

    Args:
        view: the result.
    """
    result = view.run.result
    keys = ("method", "commit", "finished", "device", "versions", "model", "mean", "tasks")
    audit = {"grade": view.grade, "failed": [check["name"] for check in view.checks if check["status"] == "fail"]}
    protocol = {"hash": protocol_of(view), "of_tasks": _hashes(view)}
    seed = (result.get("config") or {}).get("seed_everything")
    return {**{key: result.get(key) for key in keys}, "seed": seed, "audit": audit, "protocol": protocol}


def protocol_of(view: View) -> str:
    """Returns a hash of all protocols of a result: tasks, samples, prompts, attacks and their settings."""
    return digest(_hashes(view))


def _hashes(view: View) -> dict[str, dict[str, Any]]:
    protocol = view.part("protocol")
    return {task: {kind: value.get("hash") for kind, value in protocol[task].items()} for task in sorted(protocol)}


def _by_protocol(opened: Sequence[View]) -> dict[str, list[View]]:
    """Collects the results by protocol, the protocol with the most results first."""
    groups: dict[str, list[View]] = {}
    for view in opened:
        groups.setdefault(protocol_of(view), []).append(view)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def _group(protocol: str, members: Sequence[View], names: Mapping[int, str]) -> Group:
    first = members[0]
    columns = [CLEAN, *first.attacks]
    ranked = sorted(members, key=lambda view: (view.has_failed, -view.mean[columns[-1]].value))
    tasks = {task: values["n"] for task, values in first.part("tasks").items()}
    rows = [_row(view, columns, names[view.number]) for view in ranked]
    return Group(protocol, tasks, columns, {kind: _attack(first, kind) for kind in first.attacks}, rows)


def _row(view: View, columns: Sequence[str], file: str) -> Row:
    model = view.part("model")
    title = " ".join(str(model[key]) for key in ("arch", "pretrained") if model.get(key)) or MISSING
    seed = (view.run.result.get("config") or {}).get("seed_everything")
    parts = [title, *([f"seed {seed}"] if seed is not None else []), f"commit {view.run.result.get('commit')}"]
    claimed = list(_claimed(view.run.result["method"]))
    return Row(view.label, ", ".join(parts), view.grade, [_cell(view.mean[kind]) for kind in columns], claimed, file)


def _cell(score: Score) -> Cell:
    return Cell(score.text, score.interval, score.value)


def _attack(view: View, kind: str) -> str:
    """Describes an attack by radius and members."""
    axes = view.axes(next(iter(view.scores)), kind)
    norm, _, eps = str(axes.get("eps", "")).partition(" ")
    radius = f"{255 * float(eps):.3g}/255 in {norm}" if norm == "linf" and eps else f"{eps} in {norm}"
    steps = axes.get("steps")
    return f"{', '.join(steps) if isinstance(steps, Mapping) else steps} at {radius}"


def _claimed(method: str) -> Iterator[str]:
    """Yields the range of papers' means for a method by attack and radius, under protocols of their own."""
    means: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for claim in read("claims.csv", Claim):
        if is_same(claim.method, method):
            source = (claim.source, claim.set if claim.set.startswith("mean of ") else claim.trained)
            means.setdefault((claim.metric, claim.eps), {}).setdefault(source, []).append(float(claim.value))
    for (metric, eps), sources in means.items():
        values = sorted(sum(figures) / len(figures) for figures in sources.values())
        span = f"{values[0]:.1f}" if len(values) == 1 else f"{values[0]:.1f} to {values[-1]:.1f}"
        yield f"{metric}{'' if metric == CLEAN else f' at {eps}'}: {span}"


def _file_names(opened: Sequence[View]) -> Iterator[str]:
    """Yields a distinct file name for every result."""
    taken: set[str] = set()
    for view in opened:
        base = "".join(letter if letter.isalnum() else "_" for letter in view.name.removesuffix(FAILED)).strip("_")
        names = (f"{base or 'run'}{f'_{number}' if number else ''}.json" for number in count())
        name = next(name for name in names if name.lower() not in taken)
        taken.add(name.lower())
        yield name


def _page(groups: Sequence[Group]) -> str:
    """Renders the page; its only script is allowed by its hash."""
    script = resources.files("robustclip.report").joinpath("templates", SCRIPT).read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment().get_template(PAGE).render(groups=groups, script=script, allowed=allowed)
