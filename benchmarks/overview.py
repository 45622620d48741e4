"""Tests checkpoints of all five methods under one protocol: clean, robust, shifted, zero-shot, unknown classes.

All checkpoints start from one model and take two tests: one of all images without attack, and one of a few images of
each set under the full recipe and with attacked detection.
"""

import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from once import parser, test_once, write

CONFIG = "configs/overview.yaml"
KNOWN, SCORE = "pacs_photo", "mcm"
DETECTION = {"class_path": "robustclip.evaluation.OODDetection", "init_args": {"known": [KNOWN], "attack": None}}
CLEAN = ("--evaluation", "configs/evaluation/clean.yaml", f"--trainer.callbacks={json.dumps([DETECTION])}")


def measures(clean: dict[str, Any], attacked: dict[str, Any]) -> dict[str, float]:
    """Collects the measures of the table from both results, in [0, 1]."""
    scores, worst = _scores(clean), [each["attacked"] for each in _scores(attacked)]
    return {
        "clean": clean["mean"]["clean"]["acc1"],
        "robust": attacked["mean"]["cascade"]["acc1"],
        "shifts": clean["averages"]["shifts"]["clean"]["acc1"],
        "elsewhere": clean["averages"]["zero_shot"]["clean"]["acc1"],
        "auroc": statistics.mean(each["auroc"] for each in scores),
        "auroc_attacked": statistics.mean(each["auroc"] for each in worst),
        "h": statistics.mean(each["h"] for each in scores),
    }


def _scores(result: dict[str, Any]) -> list[dict[str, Any]]:
    unknown = result["detection"]["tasks"][KNOWN]["unknown"]
    return [each["scores"][SCORE] for each in unknown.values()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the table as Markdown, in percent."""
    names = [name for name in rows[0] if name not in ("model", "commit", "audit")]
    lines = ["| | " + " | ".join(names) + " |", "| --- " + "| --: " * len(names) + "|"]
    lines += [f"| {row['model']} | " + " | ".join(f"{100 * row[name]:.1f}" for name in names) + " |" for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the missing tests, prints the table, and writes the file."""
    command_line = parser(__doc__)
    command_line.add_argument(
        "models", nargs="*", metavar="METHOD=CHECKPOINT", help="class of the method and its checkpoint"
    )
    command_line.add_argument("--samples", default="25", help="of every attacked set")
    arguments = command_line.parse_args(argv)
    torch.set_num_threads(1)
    shared = ("--config", CONFIG, "--data.root", arguments.data, "--model.pretrained", arguments.model)
    rows = []
    for name, _, checkpoint in (("ZeroShot", "", ""), *(each.partition("=") for each in arguments.models)):
        is_base = name == "ZeroShot"
        baseline = () if is_base else ("--results.baseline", str(arguments.work / "ZeroShot"))
        model = [*shared, *(() if is_base else ("--model", name, "--ckpt_path", checkpoint))]
        clean = test_once(arguments.work / f"{name}_clean", [*model, *CLEAN])
        attacked = test_once(arguments.work / name, [*model, "--evaluation.max_samples", arguments.samples, *baseline])
        facts = {"audit": attacked["audit"]["grade"], "commit": attacked["commit"]}
        rows.append({"model": name, **measures(clean, attacked), **facts})
    print(table(rows))
    write(arguments.out, rows)


if __name__ == "__main__":
    main()
