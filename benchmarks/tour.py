"""Fine-tunes the shapes model by each of the five methods and tests all under one protocol; `make tour` runs it.

ARF gets captions of the training images and drawn pairs of another set, UEO images of six colours without labels among
those of six unknown ones, and CRoFT sixteen images of each of the six.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image
from pyarrow import parquet

from robustclip.cli.main import run
from robustclip.data.sources.shapes import ShapesDataset
from robustclip.results.run import Run

ATTACK = ("--model.attack", "PGD", "--model.attack.eps", "5/255", "--model.attack.alpha", "3.75/255")
COLOURS = '{source: "shapes:colours", classes: 0-5%s}'  # of the training split
METHODS: dict[str, tuple[str, ...]] = {
    "TeCoA": (*ATTACK, "--model.optimizer.lr", "3e-3"),
    "PMGAFT": (*ATTACK, "--model.optimizer.lr", "3e-3"),
    "ARF": ("--model.optimizer.lr", "3e-4"),
    "UEO": (
        "--data.train",
        COLOURS % ", images: 0-11",
        "--model.phrase",
        "a picture of a",
    ),  # the model knows no photos
    "CRoFT": ("--data.train", COLOURS % "", "--data.shots", "16"),
}
Pair = tuple[Image.Image, str]
PAIRS = 240  # anchors of ARF, drawn from a set that is not tested
LESS, MORE, ORIGINAL = "#c2572b", "#2a7f62", "#6b7280"


def drawn_pairs() -> list[Pair]:
    """Draws images with captions from a set that no table shows."""
    pool = ShapesDataset("colour_shapes")
    return [(pool[number][0], pool.caption(number)) for number in range(PAIRS)]


def anchors(folder: Path, pairs: Sequence[Pair]) -> list[str]:
    """Writes captions and anchors in the layout of `robustclip caption` and `retrieve`, and returns their options.

    Args:
        folder: is created.
        pairs: images with their captions; the training images take turns with them.
    """
    source = ShapesDataset("source", "train")
    base = folder / "anchors" / "train"
    base.mkdir(parents=True, exist_ok=True)
    (base / "nshards.txt").write_text("1")
    with tarfile.open(base / "0.tar", "w") as archive:
        for number, (image, caption) in enumerate(pairs):
            buffer = io.BytesIO()
            image.save(buffer, format="png")
            for name, content in ((f"{number:05}.png", buffer.getvalue()), (f"{number:05}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    _table(folder / "captions.parquet", "captions", pa.string(), [[source.caption(i)] for i in range(len(source))])
    _table(base.parent / "neighbours.parquet", "neighbours", pa.int32(), [[i % len(pairs)] for i in range(len(source))])
    return ["--data.captions", str(folder / "captions.parquet"), "--data.anchors", json.dumps(str(base.parent))[1:-1]]


def _table(path: Path, column: str, kind: pa.DataType, lists: list[list[object]]) -> None:
    columns = [pa.array(range(len(lists)), pa.int64()), pa.array(lists, pa.list_(kind))]
    parquet.write_table(pa.table(columns, ["index", column]), path)


def measures(test: Run) -> dict[str, float]:
    """Reads what the picture shows, in percent."""
    result = test.result
    unknown = result["detection"]["tasks"]["colours"]["unknown"]["other_colours"]
    shares = {
        "same style": result["averages"]["same_style"]["clean"]["acc1"],
        "under attack": result["averages"]["same_style"]["pgd10"]["acc1"],
        "other styles": result["averages"]["shifts"]["clean"]["acc1"],
        "unknown colours (AUROC)": unknown["scores"]["mcm"]["auroc"],
    }
    return {name: 100 * share for name, share in shares.items()}


def picture(tests: list[Run], path: Path) -> None:
    """Draws gains and losses of every method, one panel per measure; the dashed line is the original model.

    A bar is green if the method gains a point or more, red if it loses one, and grey in between.
    """
    original, rows = measures(tests[0]), [measures(test) for test in tests[1:]]
    names = [test.method for test in tests[1:]]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tour", "font.size": 10}):
        figure = Figure(figsize=(10, 2.4), layout="constrained", facecolor="white")
        for axes, name in zip(figure.subplots(1, len(original), sharey=True), original, strict=True):
            values = [row[name] for row in rows]
            changes = [round(value - original[name]) for value in values]
            colours = [ORIGINAL if change == 0 else MORE if change > 0 else LESS for change in changes]
            bars = axes.barh(names, values, color=colours, height=0.62)
            axes.bar_label(bars, fmt="%.0f", padding=-17, fontsize=9, color="white")
            axes.axvline(original[name], color=ORIGINAL, linestyle="--", linewidth=1)
            axes.set(title=name, xlim=(0, 112), xticks=[0, 50, 100])
            axes.title.set_fontsize(10.5)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        figure.savefig(path, metadata={"Date": None})


def command(*words: str) -> None:
    """Runs a command, and stops after an error."""
    if status := run(list(words)):
        raise SystemExit(status)


def main() -> None:
    """Runs the missing fits and tests, then table and report."""
    command_line = argparse.ArgumentParser(description=__doc__)
    command_line.add_argument("--work", type=Path, default=Path("runs/tour"), help="folder of checkpoints and results")
    command_line.add_argument("--samples", default="120", help="images of each set")
    arguments = command_line.parse_args()
    work = arguments.work
    quiet = ("--trainer.enable_progress_bar", "false", "--trainer.logger", "false")
    short = ("--evaluation.max_samples", arguments.samples, "--evaluation.probes", "16", "--results.folder", str(work))
    runs = [work / "original"]
    if not (runs[0] / "result.json").is_file():
        command(
            "test", "--config", "tour", "--results.name", "original", "--results.is_undefended", "true", *short, *quiet
        )
    for name, options in METHODS.items():
        fitted, result = work / f"{name}.fit", work / name
        model = ("--config", "tour", "--model", name, *options)
        if not fitted.is_dir():
            part = fitted.with_suffix(".part")  # an interrupted fit resumes
            more = anchors(work, drawn_pairs()) if name == "ARF" else []
            more += ["--ckpt_path", str(part / "last.ckpt")] if (part / "last.ckpt").is_file() else []
            command("fit", *model, *more, "--checkpoint.dirpath", str(part), "--evaluation.fit_attacks", "{}", *quiet)
            part.rename(fitted)
        if not (result / "result.json").is_file():
            more = [
                "--ckpt_path",
                str(fitted / "last.ckpt"),
                "--results.name",
                name,
                "--results.baseline",
                str(runs[0]),
            ]
            command("test", *model, *more, *short, *quiet)
        runs.append(result)
    picture([Run.open(folder) for folder in runs], work / "picture.svg")
    command("table", *map(str, runs))
    command("report", *map(str, runs), "--out", str(work / "report.html"))


if __name__ == "__main__":
    main()
