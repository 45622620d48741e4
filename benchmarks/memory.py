"""Times an image tower on a CPU while glibc keeps freed memory, as in robustclip's commands, and while it does not.

Each measurement is a process of its own, since the setting holds for the life of a process. The two ways take turns, so
that a drift of the machine's speed cancels in the ratios, and must give equal features and gradients. Times are CPU
seconds of one thread, those of the system included, per image.
"""

import argparse
import hashlib
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import ratios, summary
from torch import Tensor

from robustclip.cli.memory import VARIABLES, keep_freed_memory
from robustclip.models.clip import CLIPModel
from robustclip.results.provenance import commit

BATCHES, REPEATS = (16, 64), 4
WAYS = ("given back", "kept")  # the slow one first, see `ratios`


def measure(model: str) -> dict[str, Any]:
    """Measures milliseconds per image of a forward pass and of a gradient in the pixels, and the peak memory in GiB."""
    torch.set_num_threads(1)
    clip = CLIPModel(pretrained=model).eval().requires_grad_(False)
    times, digest = {}, hashlib.sha256()
    for batch in BATCHES:
        images = torch.rand(batch, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(0))
        for name, step in {"forward": _forward, "gradient": _gradient}.items():
            digest.update(step(clip, images).numpy().tobytes())
            times[f"{name}, batch {batch}"] = 1000 * min(_seconds(step, clip, images) for _ in range(REPEATS)) / batch
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"times": times, "peak": peak, "digest": digest.hexdigest()}


def _seconds(step: Callable[[CLIPModel, Tensor], Tensor], clip: CLIPModel, images: Tensor) -> float:
    started = time.process_time()
    step(clip, images)
    return time.process_time() - started


@torch.no_grad()
def _forward(clip: CLIPModel, images: Tensor) -> Tensor:
    return clip.encode_image(images)


def _gradient(clip: CLIPModel, images: Tensor) -> Tensor:
    pixels = images.clone().requires_grad_()
    return torch.autograd.grad(clip.encode_image(pixels).sum(), pixels)[0]


def in_process(way: str, model: str) -> dict[str, Any]:
    """Runs `measure` in a new process, in one of `WAYS`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
    command = [sys.executable, __file__, "--model", model, "--way", way]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    measured: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Prints and writes the times of both ways and their ratios."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--model", required=True, help="folder of the model")
    words.add_argument("--repeats", type=int, default=5, help="rounds")
    words.add_argument("--out", type=Path, help="JSON file to write")
    words.add_argument("--way", choices=WAYS, help="measure one way in this process")
    arguments = words.parse_args()
    if arguments.way:
        assert arguments.way == "given back" or keep_freed_memory(), "this C library is not glibc"
        print(json.dumps(measure(arguments.model)))
        return
    rounds = [{way: in_process(way, arguments.model) for way in WAYS} for _ in range(arguments.repeats)]
    assert len({measured["digest"] for both in rounds for measured in both.values()}) == 1, "the ways differ"
    report: dict[str, Any] = {"ms_per_image": {}}
    for name in rounds[0]["kept"]["times"]:
        durations = {way: [both[way]["times"][name] for both in rounds] for way in WAYS}
        report["ms_per_image"][name] = {way: summary(values) for way, values in durations.items()} | ratios(durations)
    report["peak_gib"] = {way: summary([both[way]["peak"] for both in rounds]) for way in WAYS}
    report |= {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "device": "cpu"}
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
