"""Fine-tunes the shapes model by every method and several seeds, and tests all under the full recipe.

The rate of a method is the one of three whose seed-0 model has the best mean of clean and attacked accuracy on held-out
training images. Each fit and each test is an ordinary command of robustclip and is skipped if its folder exists, so
that an interrupted script resumes and a later one adds methods and seeds.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from once import fit_once, held_out, parser, test_once, write
from tour import COLOURS, anchors, drawn_pairs

from robustclip.cli.main import run as command
from robustclip.intervals import mean_difference, mean_interval
from robustclip.results.run import Run

SHARED = ("--config", "tour")
PGD2 = {"class_path": "PGD", "init_args": {"eps": "5/255", "alpha": "3.75/255", "steps": 2}}
CASCADE = {"cascade": {"class_path": "Recipe", "init_args": {"name": "cascade", "eps": "5/255"}}}
PGD10 = {"class_path": "PGD", "init_args": {"eps": "5/255", "alpha": "1.25/255", "steps": 10, "keep": "best"}}
DETECTION = {"class_path": "OODDetection", "init_args": {"known": ["colours"], "headline": "mcm", "attack": PGD10}}
OWN_SCALE = 25.9926  # of the shapes model


class Method(NamedTuple):
    """One row of the table.

    Attributes:
        options: of fit and test.
        rates: learning rates to choose from, or the one that another method chose.
        rate_of: method whose rate is used.
        training: options of the fit alone.
        needs_anchors: whether the fit needs captions and anchors.
        base: method over whose model of the same seed this one trains.
    """

    options: tuple[str, ...]
    rates: tuple[str, ...] = ()
    rate_of: str | None = None
    training: tuple[str, ...] = ()
    needs_anchors: bool = False
    base: str | None = None


def attacked(name: str, *options: str) -> tuple[str, ...]:
    """Returns the options of a method that trains the image tower on attacked images, with one optimiser for all."""
    adamw = ("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.weight_decay", "1e-4")
    return ("--model", name, "--model.attack", json.dumps(PGD2), *adamw, "--model.warmup_steps", "20", *options)


TOWER, PAIRS, CONTEXT = ("1e-3", "3e-3", "1e-2"), ("1e-4", "3e-4", "1e-3"), ("2e-3", "2e-2", "2e-1")
METHODS = {
    "TeCoA": Method(attacked("TeCoA"), TOWER),
    "PMGAFT": Method(attacked("PMGAFT"), TOWER),
    "AGFT": Method(attacked("AGFT"), TOWER),
    "UCAT": Method(attacked("UCAT"), TOWER),
    "CAW": Method(attacked("CAW"), TOWER),
    "APT": Method(("--model", "APT", "--model.attack", json.dumps(PGD2), "--model.tokens", "4"), CONTEXT, base="TeCoA"),
    "ARF": Method(("--model", "ARF"), PAIRS, needs_anchors=True),
    "DiVE": Method(("--model", "DiVE"), PAIRS, needs_anchors=True),
    # Controls: TeCoA at AGFT's rate and scale (PMG-AFT without its terms), plain soft labels, a constant level.
    "TeCoA_as_AGFT": Method(
        attacked("PMGAFT", "--model.alpha=0", "--model.beta=0", f"--model.logit_scale={1.8 * OWN_SCALE}"),
        rate_of="AGFT",
    ),
    "AGFT_plain": Method(attacked("AGFT", "--model.gamma=1", f"--model.scale={OWN_SCALE}"), rate_of="AGFT"),
    "UCAT_constant": Method(attacked("UCAT", "--model.level=10.5"), rate_of="UCAT"),
    # Logits without scale and sums over the batch, as in PMG-AFT's released code.
    "PMGAFT_code": Method(attacked("PMGAFT", "--model.logit_scale=1", "--model.reduction=sum"), TOWER),
    "FARE": Method(attacked("FARE"), TOWER),
    "CleanFineTuning": Method(("--model", "CleanFineTuning"), PAIRS),
    "FLYP": Method(("--model", "FLYP"), PAIRS),
    "UEO": Method(
        ("--model", "UEO", "--model.phrase", "a picture of a"), training=("--data.train", COLOURS % ", images: 0-11")
    ),
    "CRoFT": Method(("--model", "CRoFT"), training=("--data.train", COLOURS % "", "--data.shots", "16")),
}


class Comparison:
    """Fits and tests, each once.

    Args:
        work: folder of fits and tests.
        samples: images of every set under attack.
    """

    def __init__(self, work: Path, samples: str) -> None:
        self.work, self.samples = work, samples
        self._anchors: list[str] | None = None

    def fit(self, name: str, rate: str | None, seed: int) -> Path:
        """Fits if needed, and returns the checkpoint."""
        method = METHODS[name]
        folder = self.work / "fits" / f"{name}_{rate or 'default'}_seed{seed}"
        holdout = ["--data.holdout", "0.1"] if method.rates or method.rate_of else []
        words = [*SHARED, *self.model(name, seed), *method.training, *holdout, "--seed_everything", str(seed)]
        words += ["--model.optimizer.lr", rate] if rate else []
        if method.needs_anchors:
            self._anchors = self._anchors or anchors(self.work, drawn_pairs())
            words += self._anchors
        words += ["--evaluation.fit_attacks", json.dumps({"pgd2": PGD2} if holdout else {})]
        return fit_once(folder, words, method=name, rate=rate, seed=seed)

    def model(self, name: str, seed: int) -> list[str]:
        """Returns the options that build the model; one with a base starts from the base's exported model."""
        method = METHODS[name]
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
        method = METHODS[name]
        if method.rate_of is not None:
            return self.rate(method.rate_of)
        return max(method.rates, key=lambda rate: self.held_out(name, rate), default=None)

    def held_out(self, name: str, rate: str) -> float:
        """Reads the mean of clean and attacked accuracy on the held-out images, in [0, 1]."""
        return statistics.mean(held_out(self.fit(name, rate, 0), "clean", "pgd2").values())

    def test(self, name: str, seed: int) -> None:
        """Tests if needed: all images without attack and with attacked detection, and some under the full recipe."""
        if name == "ZeroShot":
            model, baseline = list(SHARED), ["--results.is_undefended", "true"]
        else:
            checkpoint = ["--ckpt_path", str(self.fit(name, self.rate(name), seed))]
            model = [*SHARED, *self.model(name, seed), *checkpoint]
            baseline = ["--results.baseline", str(self.work / "tests" / "ZeroShot_seed0")]
        clean, robust = (self.work / kind / f"{name}_seed{seed}" for kind in ("clean", "tests"))
        detection = f"--trainer.callbacks={json.dumps([DETECTION])}"
        test_once(clean, [*model, "--evaluation.attacks={}", detection])
        few = ("--evaluation.max_samples", self.samples, "--evaluation.probes", "16", "--trainer.callbacks=[]")
        test_once(robust, [*model, f"--evaluation.attacks={json.dumps(CASCADE)}", *few, *baseline])

    def row(self, name: str, seeds: Sequence[int]) -> dict[str, Any]:
        """Collects the measures of a method: means over seeds and sets, intervals, and differences from TeCoA."""
        runs = [Run.open(self.work / "tests" / f"{name}_seed{seed}") for seed in seeds]
        clean = [Run.open(self.work / "clean" / f"{name}_seed{seed}").result for seed in seeds]
        unknown = [next(iter(each["detection"]["tasks"]["colours"]["unknown"].values())) for each in clean]
        scores = [each["scores"]["mcm"] for each in unknown]
        rate = None if name == "ZeroShot" else self.rate(name)
        row: dict[str, Any] = {"method": name, "seeds": len(seeds), "rate": rate}
        row["clean"] = [each["mean"]["clean"]["acc1"] for each in clean]
        row["shifts"] = [each["averages"]["shifts"]["clean"]["acc1"] for each in clean]
        row["elsewhere"] = [each["averages"]["same_style"]["clean"]["acc1"] for each in clean]
        row["robust"] = [run.result["mean"]["cascade"]["acc1"] for run in runs]
        row["pgd_ce"] = [statistics.mean(_after_pgd(run)) for run in runs]
        row["auroc"] = [each["auroc"] for each in scores]
        row["auroc_attacked"] = [each["attacked"]["auroc"] for each in scores]
        row["h"] = [each["h"] for each in scores]
        row["ece"] = [each["detection"]["tasks"]["colours"]["ece"] for each in clean]
        counts = [(task, values["cascade"]["correct"], values["n"]) for run in runs for task, values in _tasks(run)]
        row["interval"] = mean_interval([count[1:] for count in counts], images=[count[0] for count in counts])
        row |= {"audits": [run.result["audit"]["grade"] for run in runs], "commit": runs[0].result["commit"]}
        if name not in ("ZeroShot", "TeCoA"):
            row["over_tecoa"] = {kind: self.over_tecoa(name, seeds, kind) for kind in ("clean", "cascade")}
        return row

    def over_tecoa(self, name: str, seeds: Sequence[int], kind: str) -> list[float]:
        """Returns accuracy minus TeCoA's on the same images of the attacked tests, with its 95 % interval.

        Seeds of one set are taken as dependent, since they share its images.
        """
        counts, images = [], []
        for seed in seeds:
            a, b = (Run.open(self.work / "tests" / f"{each}_seed{seed}") for each in (name, "TeCoA"))
            for task in a.result["tasks"]:
                ours, theirs = (_correct(run, task, kind) for run in (a, b))
                assert ours.keys() == theirs.keys(), f"{a.folder} and {b.folder} tested other images of {task}"
                counts.append((
                    sum(ours[each] and not theirs[each] for each in ours),
                    sum(theirs[each] and not ours[each] for each in ours),
                    len(ours),
                ))  # fmt: skip
                images.append(task)
        return list(mean_difference(counts, images=images))


def _tasks(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from run.result["tasks"].items()


def _after_pgd(run: Run) -> Iterator[float]:
    """Yields the accuracy of each set that the recipe's first member, PGD-10 with cross-entropy, leaves."""
    for _, values in _tasks(run):
        broken = sum(values["cascade"]["broken_by"].values()) - values["cascade"]["broken_by"]["pgd_ce"]
        yield (values["cascade"]["correct"] + broken) / values["n"]


def _correct(run: Run, task: str, kind: str) -> dict[Any, bool]:
    """Maps the identity of each image to whether its answer is correct."""
    is_clean = {row["id"]: row["clean"] == row["label"] for row in run.rows(task)}
    if kind == "clean":
        return is_clean
    return {row["id"]: is_clean[row["id"]] and not row[f"{kind}.by"] for row in run.rows(task)}


COLUMNS = ("clean", "robust", "pgd_ce", "shifts", "elsewhere", "auroc", "auroc_attacked", "h", "ece")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the table as Markdown, in percent: mean over the seeds with their range, and differences in points."""
    head = ["method", "rate", "seeds", *COLUMNS, "clean over TeCoA", "robust over TeCoA"]
    lines = [f"| {' | '.join(head)} |", f"| --- | --- {'| --: ' * (len(head) - 2)}|"]
    for row in rows:
        over = row.get("over_tecoa", {})
        cells = [_range(row[name]) for name in COLUMNS] + [_points(over.get(kind)) for kind in ("clean", "cascade")]
        lines.append(f"| {' | '.join([row['method'], row['rate'] or 'default', str(row['seeds']), *cells])} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * statistics.mean(values):.1f}" + (f" [{low:.1f}, {high:.1f}]" if high > low else "")


def _points(difference: Sequence[float] | None) -> str:
    return "" if difference is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * each for each in difference))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing fits and tests, prints the table after each method, and writes the file."""
    words = parser(__doc__, data=False)
    words.add_argument("methods", nargs="*", default=list(METHODS), help=f"among {', '.join(METHODS)}")
    words.add_argument("--seeds", type=int, default=3, help="number of seeds")
    words.add_argument("--samples", default="40", help="images of every set under the full recipe")
    arguments = words.parse_args(argv)
    torch.set_num_threads(1)
    comparison, rows, seeds = Comparison(arguments.work, arguments.samples), [], range(arguments.seeds)
    comparison.test("ZeroShot", 0)
    for seed in seeds:
        comparison.test("TeCoA", seed)
    for name in dict.fromkeys(("ZeroShot", "TeCoA", *arguments.methods)):
        chosen = [0] if name == "ZeroShot" else list(seeds)
        for seed in chosen:
            comparison.test(name, seed)
        rows.append(comparison.row(name, chosen))
        print(table(rows), flush=True)
        write(arguments.out, rows)


if __name__ == "__main__":
    main()
