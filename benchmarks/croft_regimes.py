"""Searches for a regime in which CRoFT's penalty helps: modes, scales of the energy, shots and classes, three seeds.

In each regime the weight of the penalty varies over four decades; all else is that of `open_set.py`. Differences are
paired: each fit is compared with the fit without penalty on the same images, with the same seed. Finished runs are
skipped, so that an interrupted script resumes.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from once import parser, write
from open_set import DOMAINS, LAMBDA1, LAMBDA2, SEEDS, TINY, Target

WEIGHTS = ("1", "10", "100", "1000")
SMALL = ("0.001", "0.01", "0.1", "1")  # at the model's scale the squared gradient is about 1e4 times as large
EACH_IMAGE = {"--model.penalty": "sample"}
AT_SCALE = {**EACH_IMAGE, "--model.energy_scale": "null"}
MEASURES = ("accuracy", "auroc", "fpr95")


class Regime(NamedTuple):
    """One block of rows.

    Attributes:
        targets: sets that are tested.
        weights: of the penalty, beside 0.
        options: of CRoFT.
        known: number of known classes of Tiny-ImageNet.
        shots: training images of each class.
    """

    targets: tuple[str, ...]
    weights: tuple[str, ...] = WEIGHTS
    options: dict[str, str] = {}  # never changed
    known: int = 80
    shots: int = 16


OFFICIAL = {"--model.mode": "official"}
REGIMES = {
    "PACS, clean": Regime(DOMAINS),
    "PACS, official": Regime(DOMAINS, options=OFFICIAL),
    "PACS, each image": Regime(DOMAINS, options=EACH_IMAGE),
    "PACS, each image at the score's scale": Regime(DOMAINS, SMALL, AT_SCALE),
    "Tiny-ImageNet, 80 classes, 16 shots": Regime((TINY,)),
    "Tiny-ImageNet, official": Regime((TINY,), options=OFFICIAL),
    "Tiny-ImageNet, each image at the score's scale": Regime((TINY,), SMALL, AT_SCALE),
    "Tiny-ImageNet, 1 shot": Regime((TINY,), shots=1),
    "Tiny-ImageNet, 4 shots": Regime((TINY,), shots=4),
    "Tiny-ImageNet, 7 classes": Regime((TINY,), known=7),
    "Tiny-ImageNet, 20 classes": Regime((TINY,), known=20),
    "Tiny-ImageNet, 120 classes": Regime((TINY,), known=120),
    "Tiny-ImageNet, 32 shots": Regime((TINY,), shots=32),
}


def rows(name: str, *, work: Path, shared: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Runs the missing fits and tests of a regime, and yields one row per target, seed and weight."""
    regime = REGIMES[name]
    place = work / f"known{regime.known}_shots{regime.shots}"
    for set_name in regime.targets:
        views = "10" if set_name == TINY else "30"
        target = Target(set_name, work=place, shared=shared, views=views, known=regime.known, shots=regime.shots)
        for seed in SEEDS:
            for weight in ("0", *regime.weights):
                without = {LAMBDA1: "5", **(regime.options if weight != "0" or regime.options is OFFICIAL else {})}
                options = without | {LAMBDA2: weight}
                label = "_".join(["CRoFT", *options.values()])
                row = target.row(label, "CRoFT", options, seed)
                yield row | {"regime": name, "weight": weight, "held_out": target.held_out("CRoFT", options, seed)}


def differences(regime_rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the paired differences of each weight and of the weight of the best held-out accuracy, by seed."""
    by_place: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in regime_rows:
        by_place.setdefault((row["target"], row["seed"]), {})[row["weight"]] = row
    weights = list(next(iter(by_place.values())))
    for weight in (*weights[1:], "chosen"):
        changes: dict[str, list[float]] = {}
        for measure in MEASURES:
            by_seed: dict[int, list[float]] = {}
            for (_, seed), cells in by_place.items():
                # A tie goes to the smallest weight.
                best = max(cells, key=lambda each: cells[each]["held_out"]) if weight == "chosen" else weight
                by_seed.setdefault(seed, []).append(cells[best][measure] - cells["0"][measure])
            changes[measure] = [statistics.mean(each) for each in by_seed.values()]
        yield {"regime": regime_rows[0]["regime"], "weight": weight, **changes}


def table(regime_rows: Sequence[dict[str, Any]]) -> str:
    """Formats the differences as Markdown, in points: mean of the seeds, [lowest, highest]."""
    lines = ["| regime | lambda2 | accuracy | AUROC | FPR95 |", "| --- | --: | --: | --: | --: |"]
    for row in regime_rows:
        cells = [_points(row[measure]) for measure in MEASURES]
        lines.append(f"| {row['regime']} | {row['weight']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _points(changes: Sequence[float]) -> str:
    low, high = 100 * min(changes), 100 * max(changes)
    return f"{100 * statistics.mean(changes):+.1f} [{low:+.1f}, {high:+.1f}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing fits and tests, prints the table after each regime, and writes the file."""
    command_line = parser(__doc__)
    command_line.add_argument("--regimes", nargs="*", default=list(REGIMES), choices=list(REGIMES))
    arguments = command_line.parse_args(argv)
    torch.set_num_threads(1)
    shared = ("--data.root", arguments.data, "--model.pretrained", arguments.model)
    everything, changes = [], []
    for name in arguments.regimes:
        regime_rows = list(rows(name, work=arguments.work.resolve(), shared=shared))
        everything += regime_rows
        changes += list(differences(regime_rows))
        print(table(changes), flush=True)
        write(arguments.out, everything, differences=changes)


if __name__ == "__main__":
    main()
