"""Times the evaluation engine against plain loops, and checks that the verdicts are equal.

* real images: the engine against a loop that attacks every sample to the end (text features cached), for the undefended
  model and for a fine-tuned one; both take the worst image of each sample, from the same starts;
* a whole `test` with the audit's probes and gradient counts against one without;
* ViT-B/32 with random weights: one attacked image in the engine against one in the authors' way, in which both towers
  and all their gradients are computed in every step (see `ways.py`); the ways take turns.

All times are CPU seconds of one thread, which other programs disturb less than wall-clock time.
"""

import argparse
import contextlib
import io
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Trainer
from step import summary
from torch import Tensor
from torch.nn import functional as F
from ways import Official, Ours, Problem

from robustclip.attacks import PGD
from robustclip.attacks.perturbation_set import start
from robustclip.data import CLIPDataModule
from robustclip.data.sources.shapes import SHAPES_SETS
from robustclip.evaluation import ResultsWriter, RobustEvaluation, engine, journal
from robustclip.evaluation.engine import ROBUST, examine
from robustclip.methods import RobustMethod, TeCoA, ZeroShot
from robustclip.results.provenance import commit
from robustclip.types import Batch

SETS = ("cifar10", "caltech101", "oxford_pets", "pacs_photo", "pacs_sketch", "food101_10", "dtd_10", "tiny_imagenet")


def plain_loop(method: RobustMethod, batch: Batch, task: str, attack: PGD) -> Tensor:
    """Attacks all samples in all steps; returns a mask (B,), true where a sample is correct on every image."""
    forward = partial(method.logits, task=task)
    with torch.no_grad():
        is_robust = forward(batch.images).argmax(1) == batch.labels
    attacked = start(batch.images, attack.eps, attack.norm, batch.index, 0)
    lower, upper = (batch.images - attack.eps).clamp(min=0), (batch.images + attack.eps).clamp(max=1)
    for _ in range(attack.steps):
        attacked.requires_grad_()
        logits = forward(attacked)
        is_robust &= logits.argmax(1) == batch.labels
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        attacked = torch.clamp(attacked.detach() + attack.alpha * gradient.sign(), lower, upper)
    with torch.no_grad():
        return is_robust & (forward(attacked).argmax(1) == batch.labels)


def by_package(method: RobustMethod, batch: Batch, task: str, attack: PGD) -> Tensor:
    """Attacks by the package; returns a mask (B,), true where a sample is robust."""
    forward = partial(method.logits, task=task)
    return examine(batch.images, batch.labels, forward, attack.members(0), index=batch.index).by == ROBUST


def time_real(method: RobustMethod, data: CLIPDataModule, attack: PGD) -> dict[str, Any]:
    """Measures seconds of both ways over all sets, with a frozen model, and counts unequal verdicts."""
    ways: dict[str, Callable[..., Tensor]] = {"engine": by_package, "plain": plain_loop}
    seconds, robust, n, clean, different = dict.fromkeys(ways, 0.0), 0, 0, 0, 0
    method.eval().requires_grad_(False)
    method.prepare(data.test_tasks)
    for task, loader in zip(data.test_tasks, data.test_dataloader(), strict=True):
        for batch in loader:
            outcomes = {}
            for name, way in ways.items():
                started = time.process_time()
                outcomes[name] = way(method, batch, task.name, attack)
                seconds[name] += time.process_time() - started
            clean += int((method.logits(batch.images, task.name).argmax(1) == batch.labels).sum())
            different += int((outcomes["engine"] != outcomes["plain"]).sum())
            robust, n = robust + int(outcomes["engine"].sum()), n + len(batch.labels)
    ratio = seconds["plain"] / seconds["engine"]
    return {
        "n": n,
        "clean": clean,
        "robust": robust,
        "different_verdicts": different,
        "seconds": seconds,
        "ratio": ratio,
    }


def time_official(options: argparse.Namespace) -> dict[str, Any]:
    """Measures seconds per attacked image and step of both ways, which attack every sample to the end."""
    problem = Problem.random("ViT-B-32", options.batch_size, options.classes, options.steps)
    official, ours = Official(problem), Ours(problem)
    attack = PGD(eps="1/255", alpha="1/255", steps=problem.steps)
    forward = partial(ours.method.logits, task="train")
    ours.method.eval().requires_grad_(False)
    images, labels = problem.images, problem.labels

    def by_engine() -> None:
        examine(images, labels, forward, attack.members(options.classes), index=torch.arange(len(images)), stop="last")

    def by_official() -> None:
        official.logits(images + official.attack(official.random_start(), problem.tokens()), problem.tokens())

    seconds: dict[str, list[float]] = {"engine": [], "official": []}
    for repeat in range(options.repeats + 1):
        for name, way in (("engine", by_engine), ("official", by_official)):
            started = time.process_time()
            way()
            if repeat:
                seconds[name].append((time.process_time() - started) / len(images))
    ratios = [slow / fast for slow, fast in zip(seconds["official"], seconds["engine"], strict=True)]
    print(f"| ViT-B/32 | {statistics.median(ratios):.1f}x |")
    return {"seconds_per_image": {name: summary(row) for name, row in seconds.items()}, "ratio": summary(ratios)}


def time_audit(repeats: int, samples: int) -> dict[str, Any]:
    """Measure CPU seconds of a test of the undefended shapes model under PGD-10, with and without the audit."""
    attack = PGD(eps="5/255", alpha="1.25/255", steps=10)
    data = CLIPDataModule(
        test=[f"shapes:{name}" for name in SHAPES_SETS if name != "source"], image_size=32, batch_size=64
    )

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            callbacks = [RobustEvaluation({"pgd10": attack}, max_samples=samples), ResultsWriter(folder)]
            trainer = Trainer(
                callbacks=callbacks,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            method = ZeroShot()
            started = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.test(method, datamodule=data, verbose=False)
            return time.process_time() - started

    def run_without() -> float:
        nothing = torch.empty(0, dtype=torch.int64)
        with (
            mock.patch.object(journal, "probed", return_value=(nothing, nothing)),
            mock.patch.object(engine._Watch, "_note_gradient", return_value=None),
        ):
            return run()

    run()
    pairs = [(run(), run_without()) for _ in range(repeats)]
    cost = [slow / fast - 1 for slow, fast in pairs]
    print(f"| audit | {statistics.median(cost):+.1%} |")
    return {"seconds": [list(pair) for pair in pairs], "cost": summary(cost)}


def models(options: argparse.Namespace) -> dict[str, RobustMethod]:
    """Loads the undefended model, and the fine-tuned one."""
    shared: dict[str, Any] = {"pretrained": options.model, "image_size": options.image_size}
    models: dict[str, RobustMethod] = {"undefended": ZeroShot(**shared)}
    if options.checkpoint:
        models["TeCoA"] = TeCoA(**shared)
        checkpoint = torch.load(options.checkpoint, weights_only=True)
        models["TeCoA"].on_load_checkpoint(checkpoint)
        models["TeCoA"].load_state_dict(checkpoint["state_dict"], strict=False)
    return models


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Time the evaluation engine against plain loops.")
    parser.add_argument("--model", help="folder of the real model; without it only ViT-B/32 is timed")
    parser.add_argument("--data", help="folder of the photographs")
    parser.add_argument("--checkpoint", type=Path, help="of TeCoA")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--per-set", type=int, default=25, help="images of each of the eight sets")
    parser.add_argument("--eps", default="1/255")
    parser.add_argument("--alpha", default="1/255")
    parser.add_argument("--attack-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="of the random ViT-B/32")
    parser.add_argument("--classes", type=int, default=100, help="of the random ViT-B/32")
    parser.add_argument("--steps", type=int, default=3, help="of the random ViT-B/32")
    parser.add_argument("--repeats", type=int, default=3, help="of the random ViT-B/32")
    parser.add_argument("--audit-repeats", type=int, default=5)
    parser.add_argument("--audit-samples", type=int, default=240, help="of each of the fifteen shapes sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    """Times, compares and writes the JSON; fails if a verdict differs."""
    options = parse_options()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print("| model | faster |\n|---|--:|")
    if options.model:
        data = CLIPDataModule(
            test=[f"wds:{name}" for name in SETS], root=options.data, image_size=options.image_size, batch_size=16
        )
        data.connect(limit=options.per_set)
        data.setup("test")
        attack = PGD(eps=options.eps, alpha=options.alpha, steps=options.attack_steps)
        report["real"] = {}
        for name, method in models(options).items():
            report["real"][name] = time_real(method, data, attack)
            print(f"| {name} | {report['real'][name]['ratio']:.1f}x |")
    report["audit"] = time_audit(options.audit_repeats, options.audit_samples)
    report["official"] = time_official(options)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    different = sum(row["different_verdicts"] for row in report.get("real", {}).values())
    if different:
        raise SystemExit(f"{different} verdicts differ between the engine and the plain loop")


if __name__ == "__main__":
    main()
