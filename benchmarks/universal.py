"""Compares UEO with other methods without labels on photographs: four category shifts, known and unknown classes.

Each set is adapted to alone and without labels, and tested on its own test images: known classes for accuracy, known
against unknown ones for detection. UEO and its options have one rate for all sets, each other method its own; they are
chosen on one further set, seed 0. With `--attacked`, a checkpoint of TeCoA, the undefended model, TeCoA and UEO after
an open shift are tested again under an attack that makes known images look unknown and unknown ones look known.
Finished runs are skipped, so that an interrupted script resumes, and several may share the work.
"""

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from once import fit_once, over_seeds, parser, test_once, write

CONFIG = "configs/ueo_photographs.yaml"
SHIFTS = ("closed", "partial", "open", "open_partial")
KNOWN = {
    "caltech101": 60,
    "tiny_imagenet": 120,
    "pacs_photo": 5,
    "pacs_art_painting": 5,
    "pacs_cartoon": 5,
    "pacs_sketch": 5,
    "cifar10": 6,
}
CHOICE = "cifar10"  # set on which the rate is chosen; it is in no table
ATTACK = {"class_path": "PGD", "init_args": {"eps": "0.5/255", "alpha": "0.125/255", "steps": 10, "keep": "best"}}
ATTACKED = "100"  # number of images of every known and unknown set
METHODS = {
    "entmin": ("--model.weights", "uniform", "--model.marginal_weight", "0"),
    "infomax": ("--model.weights", "uniform"),
    "ueo_official": ("--model.weights", "confidence", "--model.weight_temperature", "1"),
    "ueo_msp": ("--model.weights", "confidence", "--model.weight_temperature", "0.01"),
    "oracle": ("--model.weights", "oracle"),
    "upl": ("--model", "UPL"),
    "pouf": ("--model", "POUF"),
    "dance": ("--model", "DANCE"),
}
RATES = {"ueo": "1e-1", "upl": "1e-2", "pouf": "1e-1", "dance": "1"}  # the best on CIFAR-10; UEO's for its options


class Cell(NamedTuple):
    """One fit."""

    data: str
    shift: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the folders of a fit."""
        return f"{self.data}_{self.shift}_{self.method}_seed{self.seed}"


class Universal:
    """Fits and tests, each once.

    Args:
        work: folder of fits and tests.
        shared: options of every command: where data and model lie.
        rate: learning rate of context and norms; None takes the method's.
        options: options of every fit.
    """

    def __init__(self, work: Path, shared: Sequence[str], rate: str | None, options: Sequence[str]) -> None:
        self.work, self.shared, self.rate, self.options = work, list(shared), rate, list(options)

    def row(self, cell: Cell) -> dict[str, Any]:
        """Fits and tests if needed, and returns accuracy, AUROC and H-score."""
        if cell.method == "oracle" and cell.shift in ("closed", "partial"):  # all known: uniform weights, to rounding
            return self.row(cell._replace(method="infomax")) | {"method": cell.method}
        seed = ("--seed_everything", str(cell.seed))
        checkpoint = fit_once(self.work / "fits" / cell.name, [*self._fit_words(cell), *seed])
        words = [*self._words(cell.data, cell.shift), *METHODS[cell.method]]
        return cell._asdict() | self._measures(cell.name, cell.data, [*words, "--ckpt_path", str(checkpoint)])

    def zero_shot(self, data: str) -> dict[str, Any]:
        """Returns the measures of the zero-shot model, which do not depend on the shift."""
        words = [*self._words(data, "closed"), "--model", "ZeroShot", "--model.image_size", "96"]
        return {"data": data, "method": "zero_shot", "seed": 0} | self._measures(f"{data}_zero_shot", data, words)

    def attacked(self, data: str, tecoa: str) -> Iterator[dict[str, Any]]:
        """Measures AUROC, clean and attacked, of the undefended model, of TeCoA and of UEO."""
        cell = Cell(data, "open", "ueo_msp", 0)
        ueo = fit_once(self.work / "fits" / cell.name, [*self._fit_words(cell), "--seed_everything", "0"])
        models = {
            "zero_shot": ("--model", "ZeroShot", "--model.image_size", "96"),
            "tecoa": ("--model", "TeCoA", "--ckpt_path", tecoa),
            "ueo_msp": (*METHODS[cell.method], "--ckpt_path", str(ueo)),
        }
        detection = {"class_path": "robustclip.evaluation.OODDetection", "init_args": {"attack": ATTACK}}
        for method, model in models.items():
            words = [*self._words(data, cell.shift), *model, f"--trainer.callbacks={json.dumps([detection])}"]
            result = test_once(
                self.work / "attacked" / f"{data}_{method}", [*words, "--evaluation.max_samples", ATTACKED]
            )
            scores = result["detection"]["tasks"][data]["unknown"][f"{data}_unknown"]["scores"]["mcm"]
            facts = {"data": data, "method": method, "commit": result["commit"]}
            yield facts | {"auroc": scores["auroc"], "attacked": scores["attacked"]["auroc"]}

    def _fit_words(self, cell: Cell) -> list[str]:
        rate = self.rate or RATES.get(cell.method, RATES["ueo"])
        rates = ("--model.context_lr", rate, "--model.optimizer.lr", rate)
        return [*self._words(cell.data, cell.shift), *METHODS[cell.method], *rates, *self.options]

    def _words(self, data: str, shift: str) -> list[str]:
        source = {"source": f"wds:{data}", "shift": shift, "known": KNOWN[data], "templates": ["a photo of a {}."]}
        unknown = source | {"name": f"{data}_unknown"}
        return [
            *("--config", CONFIG, *self.shared, f"--data.train={json.dumps(source)}"),
            *(f"--data.test={json.dumps([source])}", f"--data.unknown={json.dumps([unknown])}"),
        ]

    def _measures(self, name: str, data: str, words: Sequence[str]) -> dict[str, Any]:
        result = test_once(self.work / "tests" / name, words)
        detection = result["detection"]["tasks"][data]
        scores = detection["unknown"][f"{data}_unknown"]["scores"]
        measures = {"accuracy": detection["class_accuracy"], "auroc": scores["mcm"]["auroc"], "h": scores["mcm"]["h"]}
        facts = {"auroc_msp": scores["msp"]["auroc"], "commit": result["commit"]}
        return measures | facts | {"commonest": commonest_answer(self.work / "tests" / name / "ledger" / f"{data}.csv")}


def commonest_answer(ledger: Path) -> float:
    """Returns the share of a test's images that get the most frequent answer, in [0, 1]."""
    with ledger.open() as file:
        answers = Counter(row["clean"] for row in csv.DictReader(file))
    return round(max(answers.values()) / answers.total(), 4)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats, per shift, the means over sets and seeds and the range of the seeds' means, as Markdown in percent."""
    measures = ("accuracy", "auroc", "h")
    lines = ["| shift | method | " + " | ".join(measures) + " |", "| --- | --- " + "| --: " * len(measures) + "|"]
    for shift, method, members in _groups(rows):
        cells = [over_seeds(members, measure) for measure in measures]
        lines.append(f"| {shift} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_by_set(rows: Sequence[dict[str, Any]]) -> str:
    """Formats means of AUROC and of the share of the most frequent answer under open shifts, as Markdown."""
    sets = list(dict.fromkeys(row["data"] for row in rows))
    lines = ["| AUROC / commonest | " + " | ".join(sets) + " |", "| --- " + "| --: " * len(sets) + "|"]
    for method in ("zero_shot", *METHODS):
        members = [row for row in rows if row["method"] == method and row.get("shift", "open").startswith("open")]
        if not members:
            continue
        cells = []
        for name in sets:
            own = [row for row in members if row["data"] == name]
            cells.append(" / ".join(f"{100 * mean(row[key] for row in own):.1f}" for key in ("auroc", "commonest")))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def attacked_table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats AUROC of every set, clean and attacked, as Markdown in percent."""
    sets = list(dict.fromkeys(row["data"] for row in rows))
    lines = ["| method | " + " | ".join(sets) + " |", "| --- " + "| --: " * len(sets) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        by_set = {row["data"]: row for row in rows if row["method"] == method}
        cells = (f"{100 * by_set[name]['auroc']:.1f} / {100 * by_set[name]['attacked']:.1f}" for name in sets)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _groups(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    for shift in SHIFTS:
        for method in ("zero_shot", *METHODS):
            members = [row for row in rows if row["method"] == method and row.get("shift", shift) == shift]
            if members:
                yield shift, method, members


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing fits and tests, prints the table, and writes the file."""
    command_line = parser(__doc__)
    sets = [name for name in KNOWN if name != CHOICE]
    command_line.add_argument("--sets", nargs="*", default=sets, choices=list(KNOWN))
    command_line.add_argument("--shifts", nargs="*", default=SHIFTS, choices=SHIFTS)
    command_line.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    command_line.add_argument("--seeds", nargs="*", type=int, default=range(5))
    command_line.add_argument(
        "--rate", help="of context and norms; without it, the one that was chosen for each method"
    )
    command_line.add_argument("--steps", default="12")
    command_line.add_argument(
        "--attacked", metavar="TECOA", help="checkpoint of TeCoA; detection under attack, and no more"
    )
    arguments = command_line.parse_args(argv)
    torch.set_num_threads(1)
    shared = ("--data.root", arguments.data, "--model.pretrained", arguments.model)
    runs = Universal(arguments.work, shared, arguments.rate, ("--trainer.max_steps", arguments.steps))
    if arguments.attacked is not None:
        rows = [row for data in arguments.sets for row in runs.attacked(data, arguments.attacked)]
        print(attacked_table(rows))
    else:
        rows = _rows(runs, arguments)
        print(table(rows), table_by_set(rows), sep="\n\n")
    write(arguments.out, rows)


def _rows(runs: Universal, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [runs.zero_shot(data) for data in arguments.sets]
    for seed in arguments.seeds:
        cells = (
            Cell(data, shift, method, seed)
            for data in arguments.sets
            for shift in arguments.shifts
            for method in arguments.methods
        )
        rows += [runs.row(cell) for cell in cells]
    return rows


if __name__ == "__main__":
    main()
