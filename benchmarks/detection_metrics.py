"""Compares metrics and scores of detection with pytorch-ood's, on photographs and on random logits.

usage: PYTHONPATH=PEERS python benchmarks/detection_metrics.py --data DATA --model MODEL --work WORK --out FILE

PEERS is a folder with pytorch-ood, which the package does not need. Photographs of PACS are known, textures unknown.
"""

import json
from pathlib import Path
from typing import Any

import torch
from once import parser
from pytorch_ood.detector import GEN, EnergyBased, Entropy, MaxLogit, MaxSoftmax
from pytorch_ood.metrics.functional import aupr, auroc, autc, fpr_at_tpr
from torch import Tensor

from robustclip.cli.lightning import main as robustclip
from robustclip.metrics import separation
from robustclip.results.provenance import commit

KNOWN, UNKNOWN = "pacs_photo", "dtd_10"
SCORES = ("mcm", "msp", "energy")
DIGITS = 6


def scored(folder: Path, data: str, model: str, samples: int) -> Path:
    """Tests the model once with `OODDetection`; returns the folder of the result."""
    if not (folder / "result.json").is_file():
        detection = {"class_path": "OODDetection", "init_args": {"scores": list(SCORES)}}
        words = ["test", "--model", "ZeroShot", "--model.pretrained", model, "--data.root", data]
        words += ["--data.test", f'["wds:{KNOWN}"]', "--data.unknown", f'["wds:{UNKNOWN}"]', "--data.image_size", "128"]
        words += ["--evaluation.max_samples", str(samples), "--trainer.callbacks", json.dumps([detection])]
        words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
        robustclip([*words, "--results.folder", str(folder.parent), "--results.name", folder.name])
    return folder


def column(folder: Path, name: str, score: str) -> list[float]:
    """Reads the values of a score from a ledger, rounded as they are kept."""
    header, *lines = (folder / "ledger" / f"{KNOWN}@{name}.csv").read_text().splitlines()
    place = header.split(",").index(score)
    return [round(float(line.split(",")[place]), DIGITS) for line in lines if line]


def theirs(known: Tensor, unknown: Tensor) -> dict[str, float]:
    """Computes pytorch-ood's metrics by our names; for FPR95 of known positives the sides and the sign are swapped."""
    scores, labels = -torch.cat([known, unknown]), torch.cat([torch.zeros(len(known)), -torch.ones(len(unknown))]).int()
    values = {
        "auroc": auroc(scores, labels),
        "aupr": aupr(scores, labels, "id"),
        "fpr95": fpr_at_tpr(-scores, -1 - labels),
        "aupr_out": aupr(scores, labels, "ood"),
        "fpr95_out": fpr_at_tpr(scores, labels),
        "autc": autc(scores, labels),
    }
    return {name: round(float(value), DIGITS + 2) for name, value in values.items()}


def of_logits() -> dict[str, Any]:
    """Computes pytorch-ood's outlier scores of random logits, by our names."""
    logits = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = {
        "msp": MaxSoftmax.score(logits),
        "max_logit": MaxLogit.score(logits),
        "energy": EnergyBased.score(logits),
        "entropy": Entropy.score(logits),
        "gen": GEN.score(logits),  # a mean over the classes
    }
    return {"logits": logits.tolist()} | {name: outliers.tolist() for name, outliers in values.items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=100, help="images of each set")
    given = options.parse_args()
    folder = scored(given.work / "detection_metrics", given.data, given.model, given.samples)
    results: dict[str, Any] = {
        "known": KNOWN,
        "unknown": UNKNOWN,
        "commit": commit(),
        "scores": {},
        "of_logits": of_logits(),
    }
    for score in SCORES:
        sides = {"known": column(folder, KNOWN, score), "unknown": column(folder, UNKNOWN, score)}
        known, unknown = (torch.tensor(values, dtype=torch.float64) for values in sides.values())
        reference = theirs(known, unknown)
        results["scores"][score] = sides | {"pytorch_ood": reference}
        print(score, "ours, theirs:")
        for name, value in separation(known, unknown).items():
            print(f"  {name:10s}{float(value):.6f} {reference[name]:.6f}")
    if given.out:
        given.out.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
