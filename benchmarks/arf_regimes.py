"""Searches for a regime in which ARF keeps what FLYP loses: the shapes model knows all styles, training shows one.

FLYP and ARF train on `shapes:source`, whose images are filled. The pool of anchors has filled scenes alone, all styles
as in pre-training, or the other styles alone; both weights of ARF vary over two decades. Tests use the test split of
`shapes:source`, sets of the same style, and three sets of other styles, without attack. Differences are paired by seed.
Finished runs are skipped, so that an interrupted script resumes.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from once import fit_once, held_out, parser, test_once, write
from PIL import Image
from tour import Pair, anchors

from robustclip.data.sources.scenes import render
from robustclip.data.sources.shapes import describe, pretraining_pair

SEEDS = (0, 1, 2)
RATES = ("1e-4", "3e-4", "1e-3")
PAIRS = 960
SEED_OF_POOL = 7  # a stream apart from that of the pre-training
FILLED, OTHERS = ("filled",), ("outline", "mosaic", "faint")
POOLS = {"filled": FILLED, "all styles": (*FILLED, *OTHERS), "other styles": OTHERS}
WEIGHTS_OF_PAIRS = (("0", "1"), ("0.1", "0.1"), ("1", "1"), ("10", "10"))  # of captions and of anchors
WEIGHTS = (("1", "0"), *WEIGHTS_OF_PAIRS)
GROUPS = {
    "training_classes": ["source"],
    "same_style": ["textures", "backgrounds", "shapes"],
    "shifts": ["outlines", "mosaics", "faint_prints"],
}
TESTS = [f"shapes:{name}" for names in GROUPS.values() for name in names]
SHARED = ("--config", "tour", f"--data.test={json.dumps(TESTS)}", "--data.unknown=[]", "--trainer.callbacks=[]")


class Regimes:
    """Fits and tests, each once, below one folder."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def anchors(self, pool: str) -> list[str]:
        """Draws a pool of anchors if needed, and returns its options."""
        folder, styles, pairs = self.work / "pools" / pool.replace(" ", "_"), POOLS[pool], list[Pair]()
        number = 0
        while len(pairs) < PAIRS:
            scene, random = pretraining_pair(SEED_OF_POOL, number)
            if scene.style in styles:
                pairs.append((Image.fromarray(render(scene, random)), describe(scene)))
            number += 1
        return anchors(folder, pairs)

    def fit(self, name: str, seed: int, rate: str, *options: str, pool: str | None = None) -> Path:
        """Fits if needed, and returns the checkpoint."""
        model = ("--model", name, *options)
        values = [option for option in options if not option.startswith("--")]
        folder = self.work / "fits" / "_".join([name, rate, *values, *(pool or "").split(), f"seed{seed}"])
        words = [*SHARED, *model, "--seed_everything", str(seed), "--model.optimizer.lr", rate, "--data.holdout", "0.1"]
        words += self.anchors(pool) if pool else []
        return fit_once(folder, [*words, "--evaluation.fit_attacks={}"], seed=seed, rate=rate)

    def row(self, name: str, seed: int, rate: str, *options: str, pool: str | None = None) -> dict[str, Any]:
        """Fits and tests if needed, and returns the accuracies."""
        checkpoint = self.fit(name, seed, rate, *options, pool=pool)
        measures = self.test(checkpoint.parents[1].name, "--model", name, *options, "--ckpt_path", str(checkpoint))
        return {"seed": seed, "rate": rate, **measures}

    def test(self, folder: str, *options: str) -> dict[str, Any]:
        """Tests if needed, and returns the accuracies and the commit of the test."""
        shared = (*SHARED, "--evaluation.attacks={}", f"--results.averages={json.dumps(GROUPS)}")
        result = test_once(self.work / "tests" / folder, [*shared, *options])
        accuracies = {group: result["averages"][group]["clean"]["acc1"] for group in GROUPS}
        return {"commit": result["commit"], **accuracies}

    def rows(self) -> list[dict[str, Any]]:
        """Runs FLYP at its best rate on held-out training images, and every regime of ARF at the same rate."""
        rate = max(RATES, key=lambda rate: held_out(self.fit("FLYP", 0, rate), "clean")["clean"])
        flyp = [self.row("FLYP", seed, rate) | {"method": "FLYP"} for seed in SEEDS]
        rows = [self.test("ZeroShot") | {"method": "ZeroShot"}, *flyp]
        baseline = {row["seed"]: row for row in flyp}
        for pool in POOLS:
            for captions, pairs in WEIGHTS if pool == "filled" else WEIGHTS_OF_PAIRS:
                for seed in SEEDS:
                    options = ("--model.caption_weight", captions, "--model.anchor_weight", pairs)
                    row = self.row("ARF", seed, rate, *options, pool=pool)
                    gains = {f"over_flyp_{group}": row[group] - baseline[seed][group] for group in GROUPS}
                    rows.append(row | gains | {"method": "ARF", "pool": pool, "weights": [captions, pairs]})
                print(table(rows), flush=True)
        return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats accuracies in percent and ARF's gains over FLYP in points: mean of the seeds, [lowest, highest]."""
    groups = list(GROUPS)
    lines = [
        f"| method | pool | captions, anchors | {' | '.join(groups)} | {' | '.join(f'{g}, gain' for g in groups)} |"
    ]
    lines.append(f"| --- | --- | --- {'| --: ' * 2 * len(groups)}|")
    by_name: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        name = (row["method"], row.get("pool", ""), ", ".join(row.get("weights", ())))
        by_name.setdefault(name, []).append(row)
    for name, members in by_name.items():
        cells = [f"{100 * statistics.mean(row[group] for row in members):.1f}" for group in groups]
        if "over_flyp_shifts" in members[0]:
            for group in groups:
                gains = [100 * row[f"over_flyp_{group}"] for row in members]
                cells.append(f"{statistics.mean(gains):+.1f} [{min(gains):+.1f}, {max(gains):+.1f}]")
        else:
            cells += [""] * len(groups)
        lines.append(f"| {' | '.join([*name, *cells])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing fits and tests, prints the table, and writes the file."""
    arguments = parser(__doc__, data=False).parse_args(argv)
    torch.set_num_threads(1)
    rows = Regimes(arguments.work.resolve()).rows()
    write(arguments.out, rows)


if __name__ == "__main__":
    main()
