"""Compares the adversarial family on photographs: one budget, one protocol, learning rates chosen on held-out images.

Every method fine-tunes on Tiny-ImageNet for the same number of images; the learning rate is the one of three whose
seed-0 model at the smaller radius has the best mean of clean and attacked accuracy on held-out training images. Each
fit and each test is an ordinary command of robustclip and is skipped if its folder exists. Several of these scripts may
therefore share the work, and an interrupted script resumes.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from once import RUN, fit_once, held_out, parser, test_once, write

from robustclip.cli.main import run as command
from robustclip.intervals import mean_interval

CONFIG = "configs/tecoa_photographs.yaml"
RADII = ("0.5/255", "1/255")
SEEDS = (0, 1, 2)
ATTACKS = {
    name: {"class_path": "Recipe", "init_args": {"name": "pgd10", "eps": eps}}
    for name, eps in (("pgd10_half", RADII[0]), ("pgd10", RADII[1]))
}
ADAMW_RATES = ("1e-4", "3e-4", "1e-3")
PROMPT_RATES = ("0.4", "4", "40")  # the paper uses 40, for at least an epoch of ImageNet


class Method(NamedTuple):
    """One row of the table: options of `fit` beyond those of the configuration file."""

    options: tuple[str, ...]
    rates: tuple[str, ...] = ADAMW_RATES
    rate_option: str = "--model.optimizer.lr"
    is_attacked: bool = True


PROMPT = ("--model.prompt", "padding", "--model.prompt_size", "13")  # 13 of 96 pixels correspond to 30 of 224
SGD = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.momentum", "0.9")
METHODS = {
    "clean": Method(("--model", "CleanFineTuning"), is_attacked=False),
    "tecoa": Method(()),
    "tecoa_prompt": Method((*PROMPT, *SGD), rates=PROMPT_RATES, rate_option="--model.prompt_lr"),
    "pmg_aft": Method(("--model", "PMGAFT")),
    "pmg_aft_guidance": Method(("--model", "PMGAFT", "--model.beta", "0")),
    "pmg_aft_clean_pull": Method(("--model", "PMGAFT", "--model.alpha", "0")),
    "fare": Method(("--model", "FARE")),
    "adversarial": Method(("--model", "AdversarialTraining", "--model.head_lr", "1e-3")),
}


class Cell(NamedTuple):
    """One fit."""

    method: str
    rate: str
    radius: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the folders of a fit."""
        return f"{self.method}_{self.radius.removesuffix('/255')}_{self.rate}_seed{self.seed}"


class Family:
    """Fits and tests, each once.

    Args:
        out: folder of fits, tests and selections.
        shared: options of every command: where data and model lie.
        epochs: of every fit.
        samples: of every test set.
    """

    def __init__(self, out: Path, shared: Sequence[str], *, epochs: str, samples: str) -> None:
        self.out, self.shared, self.epochs, self.samples = out, list(shared), epochs, samples

    def fit(self, cell: Cell) -> Path:
        """Fits if needed, and returns the checkpoint."""
        method, names = METHODS[cell.method], ("eps", "alpha")
        attack = [f"--model.attack.{name}={cell.radius}" for name in names] if method.is_attacked else []
        held_out = [f"--evaluation.fit_attacks.pgd2.{name}={cell.radius}" for name in names]
        words = [
            *("--config", CONFIG, *self.shared, *method.options, *attack, *held_out, method.rate_option, cell.rate),
            *("--seed_everything", str(cell.seed), "--trainer.max_epochs", self.epochs, "--data.batch_size", "16"),
        ]
        return fit_once(self.out / "fits" / cell.name, words, **cell._asdict())

    def held_out(self, cell: Cell) -> dict[str, float]:
        """Reads clean and attacked accuracy on the held-out images, in [0, 1]."""
        return held_out(self.fit(cell), "clean", "pgd2")

    def best_rate(self, method: str) -> str:
        """Fits at every rate, and chooses by the held-out images."""
        cells = [Cell(method, rate, RADII[0], 0) for rate in METHODS[method].rates]
        return max(cells, key=lambda cell: statistics.mean(self.held_out(cell).values())).rate

    def test(self, name: str, options: Sequence[str]) -> None:
        """Tests over the eight sets."""
        folder = self.out / "tests"
        baseline = () if name == "zero_shot" else ("--results.baseline", str(folder / "zero_shot"))
        words = [
            *("--config", CONFIG, *self.shared, *options, f"--evaluation.attacks={json.dumps(ATTACKS)}", *baseline),
            *("--evaluation.max_samples", self.samples, "--data.eval_batch_size", "100"),
        ]
        test_once(folder / name, words)

    def run(self, method: str, radii: Sequence[str], seeds: Sequence[int], rate: str | None) -> None:
        """Fits and tests a method at each radius and with each seed."""
        rate = rate or self.best_rate(method)
        for radius in radii:
            for seed in seeds:
                cell = Cell(method, rate, radius, seed)
                self.test(cell.name, (*METHODS[method].options, "--ckpt_path", str(self.fit(cell))))

    def interpolate(self, method: str, rate: str) -> None:
        """Tests the models between the original one and a method's, seed 0 at the smaller radius."""
        cell, options = Cell(method, rate, RADII[0], 0), METHODS[method].options
        folder = self.out / "alphas" / cell.name
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            words = ["--config", CONFIG, *self.shared, *options, "--alphas", "0,0.25,0.5,0.75,1"]
            command(["interpolate", str(self.fit(cell)), "--out", str(folder), *words])
        for path in sorted(folder.glob("*.ckpt")):
            self.test(f"{cell.name}_{path.stem}", (*options, "--ckpt_path", str(path)))

    def results(self) -> Iterator[dict[str, Any]]:
        """Reads the results of every test: means over the sets, their intervals, and every set."""
        for path in sorted((self.out / "tests").glob("*/result.json")):
            result, fit = json.loads(path.read_text()), self.out / "fits" / path.parent.name
            row: dict[str, Any] = {"name": path.parent.name, "commit": result["commit"]}
            if fit.is_dir():
                facts = json.loads((fit / RUN).read_text())
                row |= facts
            for kind in result["mean"]:
                counts = {
                    name: (task[kind]["correct"], task[kind].get("n", task["n"]))
                    for name, task in result["tasks"].items()
                }
                row[kind] = {"acc1": result["mean"][kind]["acc1"], "interval": mean_interval(list(counts.values()))}
                row[kind]["by_set"] = {name: round(correct / n, 4) for name, (correct, n) in counts.items()}
            yield row | {"audit": result["audit"]["grade"]}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Formats means over the seeds, their range and the mean of their intervals as Markdown, in percent."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in results:
        cell = (
            tuple(str(row[key]) for key in ("method", "radius", "rate")) if "method" in row else (row["name"], "", "")
        )
        groups.setdefault(cell, []).append(row)
    kinds = ["clean", *ATTACKS]
    lines = ["| | eps | rate | seeds | " + " | ".join(kinds) + " |", "| --- " * 3 + "| --: " * (1 + len(kinds)) + "|"]
    for cell, rows in groups.items():
        cells = [_percents([row[kind] for row in rows]) for kind in kinds]
        lines.append("| " + " | ".join([*cell, str(len(rows)), *cells]) + " |")
    return "\n".join(lines)


def _percents(scores: Sequence[dict[str, Any]]) -> str:
    values = [100 * score["acc1"] for score in scores]
    low, high = (100 * statistics.mean(score["interval"][end] for score in scores) for end in (0, 1))
    seeds = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{seeds} ({low:.1f}-{high:.1f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing fits and tests, then writes the file."""
    command_line = parser(__doc__)
    command_line.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    command_line.add_argument(
        "--interpolate", nargs="*", default=(), choices=list(METHODS), help="to the original model"
    )
    command_line.add_argument("--radii", nargs="*", default=RADII)
    command_line.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    command_line.add_argument("--rate", help="learning rate, where it is not to be chosen")
    command_line.add_argument("--epochs", default="1")
    command_line.add_argument("--samples", default="100", help="of every test set")
    arguments = command_line.parse_args(argv)
    torch.set_num_threads(1)
    shared = ("--data.root", arguments.data, "--model.pretrained", arguments.model)
    family = Family(arguments.work, shared, epochs=arguments.epochs, samples=arguments.samples)
    family.test("zero_shot", ("--model", "ZeroShot", "--model.image_size", "96"))
    for method in arguments.methods:
        family.run(
            method, arguments.radii if METHODS[method].is_attacked else RADII[:1], arguments.seeds, arguments.rate
        )
    for method in arguments.interpolate:
        family.interpolate(method, arguments.rate or family.best_rate(method))
    results = list(family.results())
    print(table(results))
    rates = {path.parent.name: family.held_out(Cell(**_cell(path))) for path in family.out.glob(f"fits/*/{RUN}")}
    write(arguments.out, results, epochs=arguments.epochs, samples=arguments.samples, held_out=rates)


def _cell(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(path.read_text())
    return {name: facts[name] for name in Cell._fields}


if __name__ == "__main__":
    main()
