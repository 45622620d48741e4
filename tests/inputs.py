"""What tests read: a tiny model, and data sets of noise."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.model
import torch
from PIL import Image
from safetensors.torch import save_file

TEMPLATES = ("a photo of a {c}", "a drawing of a {c}")

ShardWriter = Callable[..., Path]


def write_tiny_model(folder: Path, **vision: Any) -> Path:
    """A CLIP of 32 x 32 images with random weights, in open_clip's local-dir layout; returns its folder.

    Args:
        folder: of the model.
        vision: changes of the image tower's configuration; four ``layers`` make a ResNet.
    """
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8} | vision,
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = open_clip.model.CLIP(**config)
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    save_file(net.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_shards(
    folder: Path,
    name: str,
    split: str,
    counts_per_shard: Sequence[int],
    classes: Sequence[str] = ("red", "green", "blue"),
    *,
    kind: str = "png",
    mode: str = "RGB",
    size: int = 32,
    seed: int = 0,
    broken: Sequence[int] = (),
) -> Path:
    """A data set in the layout of clip_benchmark: noise whose tint tells the label.

    Labels go round the classes in the order of the samples.

    Args:
        folder: gets a sub-folder ``name``, which is returned.
        name: of the data set.
        split: sub-folder of the shards.
        counts_per_shard: number of samples of each shard.
        classes: their names.
        kind: extension and format of the images.
        mode: of the images, ``RGB`` or ``L``.
        size: side in pixels.
        seed: of the noise.
        broken: numbers of samples whose image is no image.
    """
    base = folder / name
    (base / split).mkdir(parents=True, exist_ok=True)
    (base / "classnames.txt").write_text("".join(f"{each}\n" for each in classes))
    (base / "zeroshot_classification_templates.txt").write_text("".join(f"{each}\n" for each in TEMPLATES))
    (base / split / "nshards.txt").write_text(str(len(counts_per_shard)))
    random = np.random.default_rng(seed)
    number = 0
    for shard, count in enumerate(counts_per_shard):
        with tarfile.open(base / split / f"{shard}.tar", "w") as archive:
            for _ in range(count):
                label = number % len(classes)
                data = b"no image" if number in broken else picture(random, label, kind=kind, mode=mode, size=size)
                add_member(archive, f"s{number:07d}.{kind}", data)
                add_member(archive, f"s{number:07d}.cls", str(label).encode())
                number += 1
    return base


def picture(random: np.random.Generator, label: int, *, kind: str, mode: str, size: int) -> bytes:
    pixels = random.integers(0, 160, (size, size, 3))
    pixels[..., label % 3] += 95
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(buffer, format={"jpg": "jpeg"}.get(kind, kind))
    return buffer.getvalue()


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
