"""Compares ARF with fine-tuning and FLYP on photographs: in distribution, under domain shift, and zero-shot.

Fine-tunes on one set of labelled photographs with Flickr8k as the pool of image-text pairs. Pairs are retrieved by
image. The caption of a training image is a human caption of its nearest pair, since no captioner was available. All
methods have equal optimiser, rate, steps and batches, and are tested as they are and half-way to the original (WiSE-FT
0.5). Finished runs are skipped, so that an interrupted script resumes.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from once import fit_once, over_seeds, parser, test_once, write
from pyarrow import parquet

from robustclip.cli.main import run as command
from robustclip.data.sources.wds import IndexedShards, list_shards

CONFIG = "configs/fine_tuning_pacs.yaml"
SHIFTS = {"pacs_photo": ["pacs_art_painting", "pacs_cartoon", "pacs_sketch"], "caltech101": []}
ZERO_SHOT = ["cifar10", "dtd_10", "flowers17_12", "food101_10", "oxford_pets"]
OTHER = {"pacs_photo": "caltech101", "caltech101": "pacs_photo"}  # the sixth zero-shot set
SEEDS = (0, 1, 2)
METHODS = {
    "ce": ("--model", "FineTuning", "--model.probe_epochs", "0"),
    "flyp": ("--model", "FLYP"),
    "flyp_captions": ("--model", "ARF", "--model.anchor_weight", "0"),
    "flyp_retrieval": ("--model", "ARF", "--model.caption_weight", "0"),
    "arf": ("--model", "ARF"),
}


def captions_and_pairs(train: str, guarded: Sequence[str], *, data: Path, model: str, work: Path) -> list[str]:
    """Returns the options for captions and pairs of a fit; creates the files first if they are missing.

    Args:
        train: name of the training set.
        guarded: names of test sets whose images may not be in the pool.
        data: folder of the data sets.
        model: folder of the model that finds the pairs.
        work: folder of the files.
    """
    folder, captions = work / "pairs", work / "captions.parquet"
    if not folder.is_dir():
        guards = [word for name in guarded for word in ("--guard", f"wds:{name}")]
        words = ["--data", f"wds:{train}", "--root", str(data), "--pool", "wds:flickr8k", *guards]
        command(["retrieve", *words, "--pretrained", model, "--image_size", "96", "--out", str(folder)])
    if not captions.is_file():
        _nearest_captions(folder, captions)
    return ["--data.captions", str(captions), "--data.anchors", str(folder)]


class Anchored:
    """All runs on one training set.

    Args:
        train: name of the training set.
        data: folder of the data sets.
        model: folder of the model.
        work: folder of anchors, fits and tests.
        options: options of every fit.
    """

    def __init__(self, train: str, *, data: Path, model: str, work: Path, options: Sequence[str]) -> None:
        self.train, self.data, self.model, self.work, self.options = train, data, model, work / train, options
        self.averages = {"zero_shot": [*ZERO_SHOT, OTHER[train]]}
        if SHIFTS[train]:
            self.averages["shifts"] = SHIFTS[train]
        tests = [train, *SHIFTS[train], *self.averages["zero_shot"]]
        self.shared = [
            *("--config", CONFIG, "--data.root", str(data), "--model.pretrained", model),
            *("--data.train", f"wds:{train}", f"--data.test={json.dumps([f'wds:{name}' for name in tests])}"),
            *("--data.eval_batch_size", "100", "--data.attack_resolution", "model"),
            f"--results.averages={json.dumps(self.averages)}",
        ]

    def anchors(self) -> list[str]:
        """Returns the options for captions and pairs of a fit; creates the files first if they are missing."""
        guarded = self.averages["zero_shot"]
        return captions_and_pairs(self.train, guarded, data=self.data, model=self.model, work=self.work)

    def rows(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Runs the missing fits and tests, and returns all accuracies."""
        zero_shot = ["--model", "ZeroShot", "--model.image_size", "96"]
        rows = [self._row("zero_shot", zero_shot, method="zero_shot", alpha=0.0, seed=0)]
        anchors = self.anchors()
        for name, words in METHODS.items():
            for seed in seeds:
                fit, run = self.work / "fits" / f"{name}_seed{seed}", [*words, *(anchors if "ARF" in words else ())]
                checkpoint = fit_once(fit, [*self.shared, *run, *self.options, "--seed_everything", str(seed)])
                between = fit / "alphas"
                if not between.is_dir():
                    shared = [*self.shared, *words]
                    command(["interpolate", str(checkpoint), "--alphas", "0.5", "--out", str(between), *shared])
                for alpha, path in ((1.0, checkpoint), (0.5, between / "alpha-0.5.ckpt")):
                    label = f"{fit.name}_alpha{alpha:g}"
                    rows.append(
                        self._row(label, [*words, "--ckpt_path", str(path)], method=name, alpha=alpha, seed=seed)
                    )
        return rows

    def _row(self, label: str, words: Sequence[str], **facts: Any) -> dict[str, Any]:
        result = test_once(self.work / "tests" / label, [*self.shared, *words])
        sets = {name: values["clean"]["acc1"] for name, values in result["tasks"].items()}
        averages = {name: values["clean"]["acc1"] for name, values in result.get("averages", {}).items()}
        geometry = result.get("geometry", {}).get(self.train, {})
        return facts | {"in_distribution": sets[self.train], **averages, "sets": sets, "geometry": geometry}


def _nearest_captions(pairs: Path, out: Path) -> None:
    """Writes a table with the captions of each image's nearest pair."""
    table = parquet.read_table(pairs / "neighbours.parquet").to_pydict()
    captions = IndexedShards([Path(shard) for shard in list_shards(str(pairs), "train")], is_labelled=False).captions
    nearest = [captions(neighbours[0]) if neighbours else [] for neighbours in table["neighbours"]]
    schema = pa.schema(
        [("index", pa.int64()), ("captions", pa.list_(pa.string()))],
        metadata={"captioner": "captions of the nearest retrieved pair", "decoding": "none", "source": str(pairs)},
    )
    parquet.write_table(pa.table([table["index"], nearest], schema=schema), out)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats means over the seeds and their ranges as Markdown, in percent."""
    kinds = [kind for kind in ("in_distribution", "shifts", "zero_shot") if kind in rows[0]]
    lines = [
        "| method | alpha | " + " | ".join([*kinds, "class scatter"]) + " |",
        "| --- " + "| --: " * (2 + len(kinds)) + "|",
    ]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["alpha"]), []).append(row)
    for (method, alpha), members in groups.items():
        cells = [over_seeds(members, kind) for kind in kinds]
        scatter = [row["geometry"]["collapse"] for row in members if row["geometry"]]
        cells.append(f"{statistics.mean(scatter):.2f}" if scatter else "")
        lines.append(f"| {method} | {alpha:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing fits and tests, prints tables, and writes the file."""
    command_line = parser(__doc__)
    command_line.add_argument("--train", nargs="*", default=list(SHIFTS), choices=list(SHIFTS))
    command_line.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    command_line.add_argument("--rate", default="1e-4")
    command_line.add_argument("--epochs", default="6")
    arguments = command_line.parse_args(argv)
    torch.set_num_threads(1)
    options = ["--model.optimizer.lr", arguments.rate, "--trainer.max_epochs", arguments.epochs]
    options += ["--data.batch_size", "32", "--data.holdout", "0"]
    results = {}
    for train in arguments.train:
        place = {"data": Path(arguments.data).resolve(), "model": arguments.model, "work": arguments.work.resolve()}
        results[train] = Anchored(train, **place, options=options).rows(arguments.seeds)
        print(f"{train}\n{table(results[train])}")
    write(arguments.out, results)


if __name__ == "__main__":
    main()
