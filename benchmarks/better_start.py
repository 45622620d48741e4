"""Tunes the small model of photographs further by its pre-training loss, and tests both as zero-shot classifiers.

FLYP trains both towers on the images and class texts of Tiny-ImageNet; ARF adds captions and pairs of Flickr8k. The
model with the highest recall of held-out captions is exported; accuracy on held-out images of the training classes
prefers models that forget others. No class or image of the other test sets is used. Finished runs are skipped, so that
an interrupted script resumes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anchors import captions_and_pairs
from once import fit_once, held_out, parser, test_once, write

from robustclip.cli.main import run as command

TRAIN, POOL = "tiny_imagenet", "flickr8k"
AVERAGES = {
    "zero_shot": ("cifar10", "caltech101", "oxford_pets", "flowers17_12", "food101_10", "dtd_10"),
    "domains": ("pacs_photo", "pacs_art_painting", "pacs_cartoon", "pacs_sketch"),
}
TESTS = [name for names in AVERAGES.values() for name in names]
RATES = ("1e-5", "3e-5", "1e-4")
EPOCHS = "2"
SIZE = "96"


class Tuning:
    """Fits and tests, each once.

    Args:
        data: folder of the data sets.
        model: folder of the model.
        work: folder of pairs, fits and tests.
    """

    def __init__(self, data: Path, model: str, work: Path) -> None:
        self.data, self.model, self.work = data, model, work
        self._shared = [
            *(
                "--data.root",
                str(data),
                "--data.crop",
                "tecoa",
                "--trainer.accelerator",
                "cpu",
                "--trainer.devices",
                "1",
            ),
            *("--model.pretrained", model, "--model.image_size", SIZE, "--seed_everything", "0"),
        ]

    def fit(self, method: str, rate: str) -> Path:
        """Fits if needed, and returns the checkpoint."""
        words = ["--model", method, *self._shared, "--data.train", f"wds:{TRAIN}", "--data.holdout", "0.1"]
        words += ["--data.batch_size", "64", "--trainer.max_epochs", EPOCHS, "--trainer.gradient_clip_val", "1.0"]
        words += ["--model.warmup_steps", "20", "--model.optimizer.lr", rate]
        if method == "ARF":
            words += captions_and_pairs(TRAIN, TESTS, data=self.data, model=self.model, work=self.work)
        return fit_once(self.work / "fits" / f"{method}_{rate}", words, method=method, rate=rate)

    def row(self, method: str, rate: str | None = None) -> dict[str, Any]:
        """Tests the original model or a tuned one if needed, and collects its accuracies and recalls."""
        sets = json.dumps([f"wds:{name}" for name in TESTS])
        callback = json.dumps([{"class_path": "FeatureGeometry"}])
        words = ["--model", method, *self._shared, f"--data.test={sets}", "--data.captioned", POOL]
        words += ["--data.eval_batch_size", "100", "--evaluation", "clean", f"--trainer.callbacks={callback}"]
        words += [f"--results.averages={json.dumps(AVERAGES)}"]
        row: dict[str, Any] = {"method": method, "rate": rate}
        if rate is not None:
            checkpoint = self.fit(method, rate)
            words += ["--ckpt_path", str(checkpoint)]
            row |= {"held_out": held_out(checkpoint, "clean")["clean"], "checkpoint": str(checkpoint)}
        result = test_once(self.work / "tests" / f"{method}_{rate}", words)
        row |= {name: result["averages"][name]["clean"]["acc1"] for name in AVERAGES}
        row["sets"] = {name: values["clean"]["acc1"] for name, values in result["tasks"].items()}
        return row | {"retrieval": result["geometry"][POOL]}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the table as Markdown, in percent."""
    head = ["model", "rate", "held out", *AVERAGES, *rows[0]["sets"], *rows[0]["retrieval"]]
    lines = [f"| {' | '.join(head)} |", f"| --- | --- {'| --: ' * (len(head) - 2)}|"]
    for row in rows:
        means = [row.get("held_out"), *(row[name] for name in AVERAGES)]
        numbers = [*means, *row["sets"].values(), *row["retrieval"].values()]
        cells = ["" if number is None else f"{100 * number:.1f}" for number in numbers]
        lines.append(f"| {' | '.join([row['method'], row['rate'] or '', *cells])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing fits and tests, prints the table, exports the chosen model, and writes the file."""
    arguments = parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    tuning = Tuning(Path(arguments.data).resolve(), arguments.model, arguments.work.resolve())
    rows = [tuning.row("ZeroShot")]
    for method in ("FLYP", "ARF"):
        for rate in RATES:
            rows.append(tuning.row(method, rate))
            print(table(rows), flush=True)
            write(arguments.out, rows)
    best = max(rows[1:], key=lambda row: sum(row["retrieval"].values()))
    folder = arguments.work / "model"
    if not folder.is_dir() and (status := command(["export", best["checkpoint"], str(folder)])):
        raise SystemExit(status)
    print(f"chosen: {best['method']} with {best['rate']}, exported to {folder}")


if __name__ == "__main__":
    main()
