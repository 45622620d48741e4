"""Compares CRoFT with methods on the same frozen features, on photographs: under domain shift, and on unknown classes.

PACS leave-one-domain-out, and Tiny-ImageNet with 80 of its 200 classes; 16 images of each class. All methods of a
seed share one cache of features. The settings of each method are chosen from a grid by accuracy on held-out training
images, at the first seed; those of CRoFT once with and once without the energy's penalty. Finished runs are skipped, so
that an interrupted script resumes, and several may share the work.
"""

import csv
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from once import fit_once, over_seeds, parser, test_once, write

from robustclip.cli.main import run as command

CONFIG = "configs/croft_photographs.yaml"
DOMAINS = ("pacs_art_painting", "pacs_cartoon", "pacs_photo", "pacs_sketch")
TINY = "tiny_imagenet"
TARGETS = (*DOMAINS, TINY)
SEEDS = (1, 2, 3)
KNOWN = 80  # of Tiny-ImageNet's classes
LAMBDA1, LAMBDA2 = "--model.lambda1", "--model.lambda2"
GENERATED = ("0", "1", "5", "10", "15")
PENALTIES = ("0", "1", "10", "100", "1000")  # CRoFT's scripts for PACS
RATE = "--model.optimizer.lr"
DECAYS = {"--model.optimizer.weight_decay": ("0.1", "5e-4")}  # CRoFT's code for all methods, and CoOp's
METHODS: dict[str, tuple[str, dict[str, Sequence[str]]]] = {
    "clip_adapter": ("CLIPAdapter", {RATE: ("2e-3", "2e-2", "2e-1"), **DECAYS}),
    "tip_adapter": ("TipAdapter", {RATE: ("1e-3", "1e-2", "1e-1"), **DECAYS}),
    "coop": ("CoOp", {RATE: ("2e-3", "2e-2"), **DECAYS}),
    "croft_no_penalty": ("CRoFT", {LAMBDA2: PENALTIES[:1], LAMBDA1: GENERATED}),
    "croft": ("CRoFT", {LAMBDA2: PENALTIES[1:], LAMBDA1: GENERATED}),
}
DETECTED = ("auroc", "aupr", "fpr95")
LAST_ONLY = ("--checkpoint.every_n_epochs", "{epochs}", "--trainer.check_val_every_n_epoch", "{epochs}")


class Target:
    """All runs that are tested on one set.

    Args:
        name: name of the set.
        work: folder of features, fits and tests.
        shared: options of every command: where data and model lie.
        views: number of augmented views of each image.
        known: number of known classes of Tiny-ImageNet.
        shots: training images of each class.
    """

    def __init__(
        self, name: str, *, work: Path, shared: Sequence[str], views: str, known: int = KNOWN, shots: int = 16
    ) -> None:
        self.name, self.work, self.shared, self.views = name, work / name, list(shared), views
        self.known, self.shots = known, shots

    def rows(self, seeds: Sequence[int], methods: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Runs the missing fits and tests, and returns the measures."""
        zero_shot = ("--model", "ZeroShot", "--model.image_size", "96")
        for seed in seeds if self.name == TINY else seeds[:1]:
            yield self._test("zero_shot", seed, [*self._data(seed), *zero_shot])
        for method in methods:
            model, chosen = METHODS[method][0], self.chosen(method, seeds[0])
            yield from (self.row(method, model, chosen, seed) for seed in seeds)

    def by_penalty(self, seed: int) -> Iterator[dict[str, Any]]:
        """Tests CRoFT at every weight of the penalty; the other weight is the best one without penalty."""
        without = self.chosen("croft_no_penalty", seed)
        for weight in PENALTIES:
            yield self.row(f"lambda2={weight}", "CRoFT", without | {LAMBDA2: weight}, seed)

    def row(self, method: str, model: str, options: dict[str, str], seed: int) -> dict[str, Any]:
        """Fits and tests a method if needed, and returns its measures."""
        features = ("--data.features", str(self.features(seed)), "--data.features_in_test", "true")
        words = [*self._data(seed), *_words(model, options), *features]
        row = self._test(method, seed, [*words, "--ckpt_path", str(self._fit(model, options, seed))])
        return row | {"chosen": options}

    def features(self, seed: int) -> Path:
        """Creates the feature cache of a seed if needed, and returns its folder."""
        out = self.work / f"features_seed{seed}"
        if not out.is_dir():
            words = ["--config", CONFIG, *self._data(seed), "--data.features", str(out), "--with_test", "true"]
            command(["cache", *words, "--views", self.views, "--seed_everything", str(seed)])
        return out

    def chosen(self, method: str, seed: int) -> dict[str, str]:
        """Selects the grid point of the best held-out accuracy; ties go to the first."""
        model, grid = METHODS[method]
        points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        return max(points, key=lambda point: self.held_out(model, point, seed))

    def held_out(self, model: str, options: dict[str, str], seed: int) -> float:
        """Reads the accuracy on held-out training images after the last epoch."""
        rows = list(csv.DictReader((self._fit(model, options, seed).parents[1] / "metrics.csv").open()))
        return max(float(row["val/mean/clean/acc1"]) for row in rows if row["val/mean/clean/acc1"])

    def _data(self, seed: int) -> list[str]:
        words = [*self.shared, "--data.shots_seed", str(seed), "--data.shots", str(self.shots)]
        if self.name == TINY:
            known = [{"source": f"wds:{TINY}", "known": self.known, "known_seed": seed}]
            names = {"train": known, "test": known, "unknown": [{**known[0], "name": f"{TINY}_unknown"}]}
            return [*words, *(f"--data.{key}={json.dumps(value)}" for key, value in names.items())]
        sources = [f"wds:{domain}" for domain in DOMAINS if domain != self.name]
        return [*words, f"--data.train={json.dumps(sources)}", f"--data.test={json.dumps([f'wds:{self.name}'])}"]

    def _fit(self, model: str, options: dict[str, str], seed: int) -> Path:
        epochs = "5" if model == "CoOp" and self.name == TINY else "50" if model == "TipAdapter" else "30"
        once = [word.format(epochs=epochs) for word in LAST_ONLY]
        words = ["--config", CONFIG, *self._data(seed), *_words(model, options), *once, "--trainer.max_epochs", epochs]
        places = ("--data.features", str(self.features(seed)), "--seed_everything", str(seed))
        folder = self.work / "fits" / f"{'_'.join([model, *options.values()])}_seed{seed}"
        return fit_once(folder, [*words, *places])

    def _test(self, method: str, seed: int, words: Sequence[str]) -> dict[str, Any]:
        result = test_once(self.work / "tests" / f"{method}_seed{seed}", ["--config", CONFIG, *words])
        detection = result["detection"]["tasks"][self.name]
        energy = {name: each["scores"]["energy"] for name, each in detection["unknown"].items()}
        scores = {name: {key: each[key] for key in DETECTED} for name, each in energy.items()}
        means = {key: statistics.mean(each[key] for each in scores.values()) for key in DETECTED}
        accuracy = result["tasks"][self.name]["clean"]["acc1"]
        facts = {"target": self.name, "method": method, "seed": seed, "commit": result["commit"]}
        return facts | {"accuracy": accuracy, **means, "sets": scores}


def _words(model: str, options: dict[str, str]) -> list[str]:
    return ["--model", model, *(word for option in options.items() for word in option)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats means over targets and seeds, and the range of the seeds' means, as Markdown in percent."""
    lines = ["| data | method | accuracy | AUROC | FPR95 |", "| --- | --- | --: | --: | --: |"]
    for data, targets in {"PACS": DOMAINS, "Tiny-ImageNet": (TINY,)}.items():
        for method in ("zero_shot", *METHODS, *(f"lambda2={weight}" for weight in PENALTIES)):
            members = [row for row in rows if row["method"] == method and row["target"] in targets]
            if members:
                cells = (over_seeds(members, measure) for measure in ("accuracy", "auroc", "fpr95"))
                lines.append(f"| {data} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing fits and tests, prints the table, and writes the file."""
    command_line = parser(__doc__)
    command_line.add_argument("--targets", nargs="*", default=TARGETS, choices=TARGETS)
    command_line.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    command_line.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    arguments = command_line.parse_args(argv)
    torch.set_num_threads(1)
    shared = ("--data.root", arguments.data, "--model.pretrained", arguments.model)
    rows: list[dict[str, Any]] = []
    for name in arguments.targets:
        views, started = "10" if name == TINY else "30", time.process_time()
        target = Target(name, work=arguments.work.resolve(), shared=shared, views=views)
        rows += [*target.rows(arguments.seeds, arguments.methods), *target.by_penalty(arguments.seeds[0])]
        print(f"{name}: {time.process_time() - started:.0f} CPU seconds")
    print(table(rows))
    write(arguments.out, rows)


if __name__ == "__main__":
    main()
