"""Tests checkpoints of all five methods under one protocol: clean, robust, shifted, zero-shot, unknown classes.

Each was trained by its own script (`family.py`, `anchors.py`, `universal.py`, `open_set.py`), on data of its own; what
they share is the model that they started from, and this test.
"""

from collections.abc import Sequence
from typing import Any

import torch
from once import parser, test_once, write

CONFIG = "configs/overview.yaml"
KNOWN, SCORE = "pacs_photo", "mcm"


def measures(result: dict[str, Any]) -> dict[str, float]:
    """What the table shows, in [0, 1]."""
    averages, unknown = result["averages"], result["detection"]["tasks"][KNOWN]["unknown"]
    scores = [each["scores"][SCORE] for each in unknown.values()]
    return {
        "clean": result["mean"]["clean"]["acc1"],
        "robust": result["mean"]["cascade"]["acc1"],
        "shifts": averages["shifts"]["clean"]["acc1"],
        "zero_shot": averages["zero_shot"]["clean"]["acc1"],
        "auroc": sum(each["auroc"] for each in scores) / len(scores),
        "auroc_attacked": sum(each["attacked"]["auroc"] for each in scores) / len(scores),
        "h": sum(each["h"] for each in scores) / len(scores),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, in percent."""
    names = [name for name in rows[0] if name not in ("model", "commit", "audit")]
    lines = ["| | " + " | ".join(names) + " |", "| --- " + "| --: " * len(names) + "|"]
    lines += [f"| {row['model']} | " + " | ".join(f"{100 * row[name]:.1f}" for name in names) + " |" for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Tests what is missing, prints the table, and writes the file."""
    words = parser(__doc__)
    words.add_argument("models", nargs="*", metavar="METHOD=CHECKPOINT", help="class of the method and its checkpoint")
    arguments = words.parse_args(argv)
    torch.set_num_threads(1)
    shared = ("--config", CONFIG, "--data.root", arguments.data, "--model.pretrained", arguments.model)
    rows = []
    for name, _, checkpoint in (("ZeroShot", "", ""), *(each.partition("=") for each in arguments.models)):
        is_base = name == "ZeroShot"
        baseline = () if is_base else ("--results.baseline", str(arguments.work / "ZeroShot"))
        model = () if is_base else ("--model", name, "--ckpt_path", checkpoint)
        result = test_once(arguments.work / name, [*shared, *model, *baseline])
        rows.append({"model": name, **measures(result), "audit": result["audit"]["grade"], "commit": result["commit"]})
    print(table(rows))
    write(arguments.out, rows)


if __name__ == "__main__":
    main()
