"""Tests test-time defences on eight sets of photographs: undefended, static and adaptive accuracy with intervals.

Each defence is put before one model and attacked in every way. An interrupted script resumes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from once import parser, test_once, write

from robustclip.intervals import mean_difference
from robustclip.results.run import Run
from robustclip.results.tables import COLUMNS

CONFIG = "configs/defences.yaml"
ATTACK = "apgd"
DEFENCES: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "ResizeAndPad": {},
    "GaussianNoise": {"copies": 4},
    "TTC": {},
    "ET3": {},
    "MAC": {},
    "DBD": {"views": 7, "kept": 4},
    "CLIPure": {},
    "RTPT": {"views": 8, "kept": 0.25},  # a text tower per image, draw and step: cheap with few classes alone
}


def row(name: str, run: Run) -> dict[str, Any]:
    """Collects the numbers of one defence: means over the sets, with intervals, and the successes by way."""
    result = run.result
    mean, tasks = result["mean"], result["tasks"].values()
    by_way: dict[str, int] = {}
    for values in tasks:
        for way, count in values[ATTACK]["by_way"].items():
            by_way[way] = by_way.get(way, 0) + count
    parts = {"clean": mean["clean"], **{column: mean[ATTACK][column] for column in COLUMNS}}
    return {
        "defence": name,
        "by_set": {name: _of_set(values) for name, values in result["tasks"].items()},
        "n": sum(values["n"] for values in tasks),
        "settings": result["model"]["defence"],
        **{part: {"acc1": value["acc1"], "interval": value["interval"]} for part, value in parts.items()},
        "clean_undefended": mean["clean"]["undefended"]["acc1"],
        "gap": gap(run),
        "by_way": by_way,
        "cost": sum(values["cost"] for values in tasks) / len(tasks),
        "audit": result["audit"]["grade"],
        "commit": result["commit"],
    }


def _of_set(values: Mapping[str, Any]) -> dict[str, float]:
    """Reads the accuracies of one set, in [0, 1]."""
    columns = {column: values[ATTACK][column]["acc1"] for column in COLUMNS}
    return {"clean": values["clean"]["acc1"], **columns}


def gap(run: Run) -> list[float]:
    """Computes adaptive minus static, the mean over the sets, with its paired 95 % interval."""
    counts = []
    for task in run.result["tasks"]:
        rows = run.rows(task)
        lost = sum(not line[f"{ATTACK}.static"] and bool(line[f"{ATTACK}.by"]) for line in rows)
        counts.append((0, lost, len(rows)))
    return list(mean_difference(counts))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the table as Markdown, in percent with 95 % intervals."""
    head = ["defence", "images", "clean", *COLUMNS, "adaptive - static", "ways that succeeded first", "cost"]
    lines = [f"| {' | '.join(head)} |", f"| --- {'| --: ' * (len(head) - 1)}|"]
    for values in rows:
        cells = [_percent(values[name]) for name in ("clean", *COLUMNS)]
        cells[-1] = f"**{cells[-1]}**"
        points = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in values["gap"]))
        ways = ", ".join(f"{way} {count}" for way, count in values["by_way"].items() if count)
        cells = [values["defence"], str(values["n"]), *cells, points, ways, f"{values['cost']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(accuracy: Mapping[str, Any]) -> str:
    low, high = accuracy["interval"]
    return f"{100 * accuracy['acc1']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing tests, prints the table, and writes the file."""
    words = parser(__doc__)
    words.add_argument("defences", nargs="*", default=list(DEFENCES), help=f"among {', '.join(DEFENCES)}")
    words.add_argument("--sets", nargs="+", help="by default the eight of the configuration")
    words.add_argument("--samples", default="100", help="of every set")
    words.add_argument("--probes", default="32", help="samples of every set on which the audit measures")
    arguments = words.parse_args(argv)
    torch.set_num_threads(1)
    shared = ["--config", CONFIG, "--data.root", arguments.data, "--model.pretrained", arguments.model]
    shared += ["--data.test", json.dumps([f"wds:{name}" for name in arguments.sets])] if arguments.sets else []
    rows = []
    for name in arguments.defences:
        defence = json.dumps({"class_path": name, "init_args": DEFENCES[name]})
        options = ["--model.defence", defence, "--evaluation.max_samples", arguments.samples]
        options += ["--evaluation.probes", arguments.probes]
        folder = arguments.work / "_".join([name, *(arguments.sets or ()), arguments.samples])
        test_once(folder, [*shared, *options])
        rows.append(row(name, Run.open(folder)))
        print(table(rows), flush=True)
        write(arguments.out, rows)


if __name__ == "__main__":
    main()
