"""Fine-tunes one model by every method and several seeds, and tests all under one protocol.

Without `--data` and `--model`, the model is that of the shapes; with them, one of photographs (`worlds.py` defines
both). The rate of a method is the one of three whose seed-0 model has the best mean of clean and attacked accuracy on
held-out training images. Each fit and each test is an ordinary command of robustclip and is skipped if it is done, so
that an interrupted script resumes and a later one adds methods and seeds.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from once import fit_once, held_out, parser, test_once, write
from worlds import PGDS, World, world

from robustclip.cli.main import run as command
from robustclip.intervals import mean_difference, mean_interval
from robustclip.results.run import Run

KINDS = ("clean", "pgd", "cascade")


class Comparison:
    """Fits and tests, each once.

    Args:
        world: training and test of every method.
        work: folder of fits and tests.
        samples: images of every set under attack.
    """

    def __init__(self, world: World, work: Path, samples: str) -> None:
        self.world, self.work, self.samples = world, work, samples
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
        method = self.world.methods[name]
        if method.rate_of is not None:
            return self.rate(method.rate_of)
        return max(method.rates, key=lambda rate: self.held_out(name, rate), default=None)

    def held_out(self, name: str, rate: str) -> float:
        """Reads the mean of clean and attacked accuracy on the held-out images, in [0, 1]."""
        return statistics.mean(held_out(self.fit(name, rate, 0), "clean", *self.world.selection).values())

    def test(self, name: str, seed: int) -> None:
        """Tests if needed: all images without attack, and some under attack."""
        world = self.world
        if name == "ZeroShot":
            model, baseline = list(world.test), ["--results.is_undefended", "true"]
        else:
            checkpoint = ["--ckpt_path", str(self.fit(name, self.rate(name), seed))]
            model = [*world.test, *self.model(name, seed), *checkpoint]
            baseline = ["--results.baseline", str(self.work / "tests" / "ZeroShot_seed0")]
        clean, attacked = (self.work / kind / f"{name}_seed{seed}" for kind in ("clean", "tests"))
        test_once(clean, [*model, *world.clean])
        attacks = world.further_attacks if seed else world.attacks
        few = ("--evaluation.max_samples", self.samples, "--evaluation.probes", "16")
        test_once(attacked, [*model, *world.attacked, f"--evaluation.attacks={json.dumps(attacks)}", *few, *baseline])

    def row(self, name: str, seeds: Sequence[int]) -> dict[str, Any]:
        """Collects the measures of a method: means over sets by seed, intervals, and differences from TeCoA."""
        attacked = [Run.open(self.work / "tests" / f"{name}_seed{seed}") for seed in seeds]
        clean = [Run.open(self.work / "clean" / f"{name}_seed{seed}").result for seed in seeds]
        row: dict[str, Any] = {"method": name, "seeds": len(seeds)}
        row["rate"] = None if name == "ZeroShot" else self.rate(name)
        row["clean"] = [result["mean"]["clean"]["acc1"] for result in clean]
        for column, average in self.world.averages.items():
            row[column] = [result["averages"][average]["clean"]["acc1"] for result in clean]
        for kind in KINDS[1:]:
            counts = [list(_counts(run, kind)) for run in attacked if _has(run, kind)]
            row[kind] = [statistics.mean(correct / n for _, correct, n in sets) for sets in counts]
            flat = [count for sets in counts for count in sets]
            row[f"{kind}_interval"] = mean_interval([count[1:] for count in flat], images=[count[0] for count in flat])
        detection = [self._detection(result, run.result) for result, run in zip(clean, attacked, strict=True)]
        for column in detection[0]:
            row[column] = [values[column] for values in detection]
        row |= {"audits": [run.result["audit"]["grade"] for run in attacked]}
        row |= {"commits": sorted({run.result["commit"] for run in attacked})}
        if name not in ("ZeroShot", "TeCoA"):
            row["over_tecoa"] = self.difference(name, "TeCoA", seeds)
        return row

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

    def difference(self, name: str, other: str, seeds: Sequence[int]) -> dict[str, list[float]]:
        """Computes accuracies minus those of another method on the same images, with 95 % intervals.

        Seeds of one set are taken as dependent, since they share its images.
        """
        differences = {}
        for kind in KINDS:
            folder = self.work / ("clean" if kind == "clean" else "tests")
            pairs = [[Run.open(folder / f"{method}_seed{seed}") for method in (name, other)] for seed in seeds]
            measured = [(a, b, task) for a, b in pairs if _has(a, kind) and _has(b, kind) for task in a.result["tasks"]]
            counts = [_discordant(_correct(a, task, kind), _correct(b, task, kind)) for a, b, task in measured]
            differences[kind] = list(mean_difference(counts, images=[task for _, _, task in measured]))
        return differences


def _has(run: Run, kind: str) -> bool:
    """Returns whether a test measured a kind of accuracy."""
    return kind != "cascade" or kind in run.result["mean"]


def _discordant(ours: dict[Any, bool], theirs: dict[Any, bool]) -> tuple[int, int, int]:
    """Counts the images that one model alone classifies correctly, those that the other alone does, and all."""
    assert ours.keys() == theirs.keys(), "the tests used different images"
    gained = sum(ours[image] and not theirs[image] for image in ours)
    return gained, sum(theirs[image] and not ours[image] for image in ours), len(ours)


def _counts(run: Run, kind: str) -> Iterator[tuple[str, int, int]]:
    """Yields the name of each set, the number of its correct images, and that of all."""
    for task in run.result["tasks"]:
        correct = _correct(run, task, kind)
        yield task, sum(correct.values()), len(correct)


def _correct(run: Run, task: str, kind: str) -> dict[Any, bool]:
    """Maps the identity of each image to whether it is classified correctly: without attack, or by the attacks.

    ``pgd`` is PGD-10 with both losses, which the recipe `cascade` runs first.
    """
    successes = {"clean": set[str](), "pgd": set(PGDS), "cascade": None}[kind]
    return {row["id"]: row["clean"] == row["label"] and not _falls(row, successes) for row in run.rows(task)}


def _falls(row: dict[str, Any], members: set[str] | None) -> bool:
    """Returns whether one of the members, or any if None, misclassifies the image of a row."""
    if "cascade.by" in row:
        return bool(row["cascade.by"]) if members is None else row["cascade.by"] in members
    return any(row[f"{name}.by"] for name in members or ())


COLUMNS = ("clean", "pgd", "cascade", "shifts", "elsewhere", "auroc", "auroc_attacked", "h", "ece")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the table as Markdown, in percent: mean over the seeds with their range, and differences in points."""
    head = ["method", "rate", "seeds", *COLUMNS, *(f"{kind} over TeCoA" for kind in KINDS)]
    lines = [f"| {' | '.join(head)} |", f"| --- | --- {'| --: ' * (len(head) - 2)}|"]
    for row in rows:
        over = row.get("over_tecoa", {})
        cells = [_range(row[name]) for name in COLUMNS] + [_points(over.get(kind)) for kind in KINDS]
        lines.append(f"| {' | '.join([row['method'], row['rate'] or 'default', str(row['seeds']), *cells])} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * statistics.mean(values):.1f}" + (f" [{low:.1f}, {high:.1f}]" if high > low else "")


def contrasts(differences: dict[str, dict[str, list[float]]]) -> str:
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
    words.add_argument("--seeds", type=int, default=3, help="number of seeds")
    words.add_argument("--samples", default="40", help="images of every set under attack")
    arguments = words.parse_args(argv)
    torch.set_num_threads(1)
    chosen = world(arguments.data, arguments.model)
    comparison, rows, seeds = Comparison(chosen, arguments.work, arguments.samples), [], range(arguments.seeds)
    names = dict.fromkeys(("ZeroShot", "TeCoA", *(arguments.methods or chosen.methods)))
    for name in names:
        needed = [0] if name == "ZeroShot" else list(seeds)
        for seed in needed:
            comparison.test(name, seed)
        rows.append(comparison.row(name, needed))
        print(table(rows), flush=True)
        write(arguments.out, rows)
    pairs = [pair for pair in chosen.contrasts if set(pair) <= set(names)]
    differences = {f"{a} minus {b}": comparison.difference(a, b, seeds) for a, b in pairs}
    print(contrasts(differences))
    write(arguments.out, rows, contrasts=differences)


if __name__ == "__main__":
    main()
