"""Compares robust accuracy by the package's recipes with the reference AutoAttack, on equal real images.

Every recipe and `pyautoattack` (version "standard") see the same images, labels and frozen model. A package that finds
fewer adversarial images than the reference overestimates robustness.
"""

import argparse
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evaluation import SETS, models
from torch import Tensor, nn

from robustclip.attacks import APGD, Attack, Recipe, pixels
from robustclip.data import CLIPDataModule
from robustclip.evaluation.engine import ROBUST, examine
from robustclip.methods import RobustMethod
from robustclip.results.provenance import commit


class Logits(nn.Module):
    """Module for the reference attack: it returns the logits of one task."""

    def __init__(self, method: RobustMethod, task: str) -> None:
        super().__init__()
        self.method, self.task = (
            (method,),
            task,
        )  # a tuple hides the method from torch: the attack cannot change its mode or flags

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 3, H, W) to logits (B, C)."""
        return self.method[0].logits(images, self.task)


def reference(method: RobustMethod, task: str, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Returns a mask (B,), true where the standard AutoAttack finds no adversarial image."""
    from pyautoattack import AutoAttack

    model = Logits(method, task).eval()
    # Targets are the nine wrong classes with the highest logits; a set with fewer classes has fewer targets.
    attack = AutoAttack(model, eps=eps, norm="Linf", seed=0, version="standard", device="cpu")
    attacked = attack.run_standard_evaluation(images, labels, batch_size=16)
    attacked = attacked[0] if isinstance(attacked, tuple) else attacked
    with torch.no_grad():
        logits = torch.cat([model(part) for part in torch.split(attacked, 16)])
    return logits.argmax(1) == labels


def measure(method: RobustMethod, data: CLIPDataModule, eps: str) -> dict[str, Any]:
    """Counts the robust samples under each attack, over all sets."""
    ours: dict[str, Attack] = {
        "apgd_ce": APGD(eps=eps),
        "cascade": Recipe("cascade", eps=eps),
        "autoattack": Recipe("autoattack", eps=eps),
    }
    robust, seconds = dict.fromkeys([*ours, "pyautoattack"], 0), dict.fromkeys([*ours, "pyautoattack"], 0.0)
    n, clean = 0, 0
    method.eval().requires_grad_(False)
    method.prepare(data.test_tasks)
    for task, loader in zip(data.test_tasks, data.test_dataloader(), strict=True):
        batches = [(batch.images, batch.labels, batch.index) for batch in loader]
        images, labels, index = (torch.cat(parts) for parts in zip(*batches, strict=True))
        forward = partial(method.logits, task=task.name)
        with torch.no_grad():
            is_right = torch.cat([forward(part) for part in torch.split(images, 16)]).argmax(1) == labels
        n, clean = n + len(labels), clean + int(is_right.sum())
        for name, attack in ours.items():
            started = time.perf_counter()
            for rows in torch.split(is_right.nonzero()[:, 0], 16):
                members = attack.members(len(task.class_names))
                verdict = examine(images[rows], labels[rows], forward, members, index=index[rows])
                robust[name] += int((verdict.by == ROBUST).sum())
            seconds[name] += time.perf_counter() - started
        started = time.perf_counter()
        is_robust = reference(method, task.name, images[is_right], labels[is_right], pixels(eps, name="eps"))
        robust["pyautoattack"] += int(is_robust.sum())
        seconds["pyautoattack"] += time.perf_counter() - started
        print(task.name, robust, flush=True)
    return {"n": n, "clean": clean, "robust": robust, "seconds": seconds}


def main() -> None:
    """Measures, prints and writes the JSON; fails if the reference finds more than half a point more."""
    parser = argparse.ArgumentParser(description="Compare the recipes with the reference AutoAttack.")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="folder of the photographs")
    parser.add_argument(
        "--checkpoint", type=Path, help="checkpoint of TeCoA; without it only the undefended model is attacked"
    )
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--per-set", type=int, default=25)
    parser.add_argument("--eps", default="0.5/255")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = CLIPDataModule(
        test=[f"wds:{name}" for name in SETS], root=options.data, image_size=options.image_size, batch_size=16
    )
    data.connect(limit=options.per_set)
    data.setup("test")
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "eps": options.eps}
    for name, method in models(options).items():
        report[name] = measure(method, data, options.eps)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, entry in report.items():
        if isinstance(entry, dict):
            allowed = entry["robust"]["pyautoattack"] + 0.005 * entry["n"]
            weak = [way for way, count in entry["robust"].items() if count > allowed]
            if weak:
                raise SystemExit(f"{name}: {weak} leave more than half a point more than the reference: {entry}")


if __name__ == "__main__":
    main()
