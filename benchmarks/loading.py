"""Times the loaders of training and test against a bare loop over the same shard, in CPU seconds of one process.

The bare loop walks the tar file, decodes with Pillow, resizes and crops with torchvision, and stacks batches: a loader
must do as much. The test loader also hashes the pixels of every image. The ways take turns, so that a
drift of the machine's speed cancels in the ratios, and must give equal pixels.
"""

import argparse
import io
import json
import shlex
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from step import ratios, summary
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

from robustclip.data import CLIPDataModule, DataSource
from robustclip.results.provenance import commit

SIZE, SHORT_SIDE, BATCH = 224, 256, 50
IMAGE_TYPES = (".jpg", ".png", ".webp")


def bare(shard: Path) -> Iterator[Tensor]:
    """Yields batches ``(B, 3, H, W)`` of a shard's images in their order."""
    transform = Compose([Resize(SHORT_SIDE, InterpolationMode.BILINEAR), CenterCrop(SIZE), ToTensor()])
    images: list[Tensor] = []
    with tarfile.open(shard) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is None:
                continue
            if not member.name.endswith(IMAGE_TYPES):
                int(file.read())
                continue
            images.append(transform(Image.open(io.BytesIO(file.read())).convert("RGB")))
            if len(images) == BATCH:
                yield torch.stack(images)
                images = []
    if images:
        yield torch.stack(images)


def loaders(data: Path) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """Returns the package's loaders of one set, with both decoders: shuffled for training, and in order for a test."""
    source = DataSource(f"wds:{data.resolve()}", split="test")
    ways: dict[str, Callable[[], Iterator[Tensor]]] = {}
    for decoder in ("pillow", "torchvision"):
        module = CLIPDataModule(
            train=source, test=source, image_size=SIZE, batch_size=BATCH, holdout=0, decoder=decoder
        )
        module.setup("fit")
        module.setup("test")
        for name, loader in {"training": module.train_dataloader(), "test": module.test_dataloader()[0]}.items():
            ways[f"{name}, {decoder}"] = partial(map, attrgetter("images"), loader)
    return ways


def seconds_of(batches: Callable[[], Iterator[Tensor]]) -> float:
    """Measures CPU seconds to load all batches."""
    started = time.process_time()
    for _ in batches():
        pass
    return time.process_time() - started


def main(argv: list[str] | None = None) -> None:
    """Measures, prints a table, and writes the JSON; fails if pixels differ."""
    parser = argparse.ArgumentParser(description="Time the loaders against a bare loop.")
    parser.add_argument("--data", type=Path, required=True, help="set of WebDataset shards with one shard in test/")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    ways = {"bare": lambda: bare(options.data / "test" / "0.tar"), **loaders(options.data)}
    expected, images = torch.cat(list(ways["bare"]())), torch.cat(list(ways["test, pillow"]()))
    if not torch.equal(expected, images):
        raise SystemExit("the test loader must give the pixels of the bare loop")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, batches in ways.items():
            seconds[name].append(seconds_of(batches))
    rows = {name: summary([len(expected) / value for value in row]) for name, row in seconds.items()}
    against = {name.replace("bare/", ""): row for name, row in ratios(seconds).items() if name.startswith("bare/")}
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "images": len(expected),
        "images_per_cpu_second": rows,
        "bare_loop_over_loader": against,
    }
    print("| | images per CPU second | times the bare loop |\n| --- | --: | --: |")
    for name, row in rows.items():
        ratio = f"{against[name]['median']:.2f}" if name in against else ""
        print(f"| {name} | {row['median']:.0f} ({row['min']:.0f}-{row['max']:.0f}) | {ratio} |")
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
