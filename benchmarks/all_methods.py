"""Fine-tunes one model by every method and several seeds, and tests all under one protocol.

Without `--data` and `--model`, the model is that of the shapes; with them, one of photographs (`worlds.py` defines
both). The rate of a method is the one of three whose seed-0 model has the best mean of clean and attacked accuracy on
held-out training images. Each fit and each test is an ordinary command of robustclip and is skipped if it is done, so
that an interrupted script resumes. What a model measured is kept in the file `--cells`, from which a later script, also
on another machine, goes on with further methods and seeds.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cells import ZERO_SHOT, Cell, Cells, answers, difference, interval
from once import fit_once, held_out, parser, test_once, write
from worlds import World, world

from robustclip.cli.main import run as command
from robustclip.results.run import Run

KINDS = ("clean", "pgd", "cascade", "shifts", "elsewhere")
REFERENCES = (ZERO_SHOT, "TeCoA")  # measured first, and every other method is compared with them
DETECTION = ("auroc", "auroc_attacked", "h", "ece")


class Comparison:
    """Fits and tests, each once.

    Args:
        world: training and test of every method.
        work: folder of fits and tests.
        cells: what was measured so far.
        samples: images of every set under attack.
        recipes: number of seeds that are tested under the full recipe; others are tested by PGD alone.
    """

    def __init__(self, world: World, work: Path, cells: Cells, *, samples: str, recipes: int) -> None:
        self.world, self.work, self.cells = world, work, cells
        self.samples, self.recipes = samples, recipes
        self._anchors: list[str] | None = None

    def fit(self, name: str, rate: str | None, seed: int) -> Path:
        """Fits if needed, and returns the checkpoint."""
        method = self.world.methods[name]
        folder = self.work / "fits" / f"{name}_{rate or 'default'}_seed{seed}"
        holdout = ["--data.holdout", "0.1"] if method.rates or method.rate_of else []
        words = [*method.training, *self.model(name, seed), *holdout, "--seed_everything", str(seed)]
        words += ["--model.optimizer.lr", rate] if rate else []
        if method.needs_anchors:
            self._anchors = self._anchors or self.world.anchors(self.work)
            words += self._anchors
        words += ["--evaluation.fit_attacks", json.dumps(self.world.selection if holdout else {})]
        return fit_once(folder, words, method=name, rate=rate, seed=seed)

    def model(self, name: str, seed: int) -> list[str]:
        """Returns the options that build the model; one with a base starts from the base's exported model."""
        method = self.world.methods[name]
        if method.base is None:
            return list(method.options)
        folder = self.work / "bases" / f"{method.base}_seed{seed}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            checkpoint = self.fit(method.base, self.rate(method.base), seed)
            if status := command(["export", str(checkpoint), str(folder)]):
                raise SystemExit(status)
        return [*method.options, "--model.pretrained", str(folder)]

    def rate(self, name: str) -> str | None:
        """Chooses a rate by the held-out images, or takes that of another method; None is the method's default."""
        rule = self.world.methods[name].rate_of or name
        accuracies = self.held_out(rule)
        return max(accuracies, key=lambda rate: accuracies[rate], default=None)

    def held_out(self, name: str) -> dict[str, float]:
        """Returns the mean of clean and attacked accuracy on the held-out images by learning rate, in [0, 1]."""
        if known := self.cells.get(name, 0):
            return known.held_out
        checkpoints = {rate: self.fit(name, rate, 0) for rate in self.world.methods[name].rates}
        kinds = ("clean", *self.world.selection)
        return {rate: statistics.mean(held_out(path, *kinds).values()) for rate, path in checkpoints.items()}

    def cell(self, name: str, seed: int) -> Cell:
        """Returns what the model of a method and seed measures; fits and tests it if the file does not have it."""
        by_recipe = seed < self.recipes
        cell = self.cells.get(name, seed)
        if cell is None or (by_recipe and "cascade" not in cell.answers):
            cell = self.measure(name, seed, by_recipe=by_recipe)
            self.cells.add(cell)
        return cell

    def measure(self, name: str, seed: int, *, by_recipe: bool) -> Cell:
        """Fits, and tests all images without attack, and some under attack."""
        world, tested = self.world, "recipes" if by_recipe else "pgd"
        rate = None if name == ZERO_SHOT else self.rate(name)
        if name == ZERO_SHOT:
            model, baseline = list(world.test), ["--results.is_undefended", "true"]
        else:
            model = [*world.test, *self.model(name, seed), "--ckpt_path", str(self.fit(name, rate, seed))]
            baseline = ["--results.baseline", str(self.undefended(tested))]
        clean = self.work / "clean" / f"{name}_seed{seed}"
        attacked = self.work / tested / f"{name}_seed{seed}"
        test_once(clean, [*model, *world.clean])
        attacks = f"--evaluation.attacks={json.dumps(world.recipe if by_recipe else world.pgds)}"
        few = ("--evaluation.max_samples", self.samples, "--evaluation.probes", "16")
        test_once(attacked, [*model, *world.attacked, attacks, *few, *baseline])
        return self.read(name, seed, rate, Run.open(clean), Run.open(attacked))

    def undefended(self, tested: str) -> Path:
        """Returns the folder of the test of the model before training, which it makes if needed."""
        folder = self.work / tested / f"{ZERO_SHOT}_seed0"
        if not (folder / "result.json").is_file():
            self.measure(ZERO_SHOT, 0, by_recipe=tested == "recipes")
        return folder

    def read(self, name: str, seed: int, rate: str | None, clean: Run, attacked: Run) -> Cell:
        """Reads both tests."""
        kinds = {"clean": answers(clean, "clean"), "pgd": answers(attacked, "pgd")}
        if "cascade" in attacked.result["mean"]:
            kinds["cascade"] = answers(attacked, "cascade")
        averages = {column: clean.result["averages"][of]["tasks"] for column, of in self.world.averages.items()}
        chosen = self.held_out(name) if seed == 0 and name != ZERO_SHOT else {}
        facts = {"audit": attacked.result["audit"]["grade"], "commit": attacked.result["commit"]}
        detection = self._detection(clean.result, attacked.result)
        return Cell(name, seed, rate, chosen, kinds, averages, detection=detection, **facts)

    def _detection(self, clean: dict[str, Any], attacked: dict[str, Any]) -> dict[str, float]:
        """Reads the measures of unknown classes, means over the unknown sets, in [0, 1]."""
        both = [result["detection"]["tasks"][self.world.known] for result in (clean, attacked) if "detection" in result]
        scores = [[unknown["scores"]["mcm"] for unknown in task["unknown"].values()] for task in both]
        worst = next(values for values in scores if "attacked" in values[0])
        return {
            "auroc": statistics.mean(values["auroc"] for values in scores[0]),
            "auroc_attacked": statistics.mean(values["attacked"]["auroc"] for values in worst),
            "h": statistics.mean(values["h"] for values in scores[0]),
            "ece": both[0]["ece"],
        }


def row(cells: Sequence[Cell], others: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
    """Collects the measures of a method: means over sets by seed, intervals, and differences from other methods.

    Args:
        cells: models of the method, one for each seed.
        others: models by the name of the method from which the difference is taken.
    """
    row: dict[str, Any] = {"method": cells[0].method, "seeds": len(cells), "rate": cells[0].rate}
    for kind in KINDS:
        measured = [cell for cell in cells if cell.of(kind)]
        row[kind] = [cell.mean(kind) for cell in measured]
        row[f"{kind}_interval"] = interval(measured, kind) if measured else None
    row |= {measure: [cell.detection[measure] for cell in cells] for measure in DETECTION}
    row |= {"audits": [cell.audit for cell in cells], "commits": sorted({cell.commit for cell in cells})}
    return row | {f"over_{name}": over(cells, theirs) for name, theirs in others.items()}


def over(ours: Sequence[Cell], theirs: Sequence[Cell]) -> dict[str, list[float] | None]:
    """Computes differences of two methods, paired by seed; a method with one model is compared with every seed."""
    pairs = list(zip(ours, theirs if len(theirs) > 1 else [*theirs] * len(ours), strict=True))
    return {kind: difference(pairs, kind) for kind in KINDS}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the table as Markdown, in percent: mean over the seeds with their range."""
    columns = (*KINDS, *DETECTION)
    lines = [
        f"| {' | '.join(['method', 'rate', 'seeds', *columns])} |",
        f"| --- | --- {'| --: ' * (1 + len(columns))}|",
    ]
    for row in rows:
        cells = [row["method"], row["rate"] or "default", str(row["seeds"]), *(_range(row[name]) for name in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = f"{100 * min(values):.1f}", f"{100 * max(values):.1f}"
    return f"{100 * statistics.mean(values):.1f}" + (f" [{low}, {high}]" if high != low else "")


def contrasts(differences: Mapping[str, Mapping[str, Sequence[float] | None]]) -> str:
    """Formats differences between two methods as Markdown, in points."""
    lines = [f"| | {' | '.join(KINDS)} |", f"| --- {'| --: ' * len(KINDS)}|"]
    lines += [f"| {name} | {' | '.join(_points(of[kind]) for kind in KINDS)} |" for name, of in differences.items()]
    return "\n".join(lines)


def _points(difference: Sequence[float] | None) -> str:
    return "" if difference is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in difference))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing fits and tests, prints the table after each method, and writes the file."""
    words = parser(__doc__, data=False)
    words.add_argument("methods", nargs="*", help="by default all")
    words.add_argument("--data", help="folder of the photographs")
    words.add_argument("--model", help="folder of the model for the photographs")
    words.add_argument("--cells", type=Path, required=True, help="JSON lines file of what was measured, which grows")
    words.add_argument("--seeds", type=int, default=3, help="number of seeds")
    words.add_argument("--recipes", type=int, default=1, help="number of seeds under the full recipe; others have PGD")
    words.add_argument("--samples", default="100", help="images of every set under attack")
    arguments = words.parse_args(argv)
    torch.set_num_threads(1)
    chosen = world(arguments.data, arguments.model)
    settings = {"samples": arguments.samples, "recipes": arguments.recipes}
    comparison = Comparison(chosen, arguments.work, Cells(arguments.cells), **settings)
    measured: dict[str, list[Cell]] = {}
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys((*REFERENCES, *(arguments.methods or chosen.methods))):
        measured[name] = [comparison.cell(name, seed) for seed in range(1 if name == ZERO_SHOT else arguments.seeds)]
        others = {other: measured[other] for other in REFERENCES if other in measured and other != name}
        rows.append(row(measured[name], others))
        print(table(rows), flush=True)
        write(arguments.out, rows)
    pairs = [(a, b) for a, b in chosen.contrasts if {a, b} <= measured.keys()]
    differences = {f"{a} minus {b}": over(measured[a], measured[b]) for a, b in pairs}
    for other in REFERENCES:
        print(f"Minus {other}:")
        print(contrasts({row["method"]: row[f"over_{other}"] for row in rows if f"over_{other}" in row}))
    print(contrasts(differences))
    write(arguments.out, rows, contrasts=differences)


if __name__ == "__main__":
    main()
