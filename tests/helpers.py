"""Makers that tests share: a tiny model, data sets of noise, and a quiet trainer on the CPU."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import open_clip.model
import torch
from PIL import Image
from safetensors.torch import save_file

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

TEMPLATES = ("a photo of a {c}", "a drawing of a {c}")

ShardWriter = Callable[..., Path]

# Ends of the names of ledger columns whose last digits depend on the other images of a batch.
ROUNDED = (
    "loss",
    "logit",
    "distance",
    "repeat",
    "logit_sum",
    "outside",
    "again",
    "regrad",
    "spread",
    "steady",
    "state",
    "leak",
    "draws",
)


def tiny_clip(folder: Path, *, embed_dim: int = 16, **vision: Any) -> Path:
    """Writes a CLIP of 32 x 32 images with random weights in open_clip's local-dir layout; returns its folder.

    Args:
        folder: folder of the model.
        embed_dim: width of the features.
        vision: changes of the image tower's configuration; four ``layers`` make a ResNet.
    """
    config = {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8} | vision,
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = open_clip.model.CLIP(**config)
    return save_clip(folder, config, net)


def save_clip(folder: Path, config: dict[str, Any], net: torch.nn.Module) -> Path:
    """Writes a model in open_clip's local-dir layout; returns its folder.

    Args:
        folder: folder of the model; made if it does not exist.
        config: configuration of the model.
        net: the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    save_file(net.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def build_wheel(folder: Path) -> Path:
    """Builds the wheel of the package without network; returns its path.

    Args:
        folder: folder of the wheel and of a copy of the sources, since a build leaves files behind that the next packs.
    """
    root, source = Path(__file__).parents[1], folder / "source"
    shutil.copytree(root / "robustclip", source / "robustclip", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(root / name, source)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    return wheel


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
    """Writes noise in clip_benchmark's layout, tinted by the label; labels follow the order of the classes.

    Args:
        folder: gets a sub-folder ``name``, which is returned.
        name: name of the data set.
        split: sub-folder of the shards.
        counts_per_shard: number of samples of each shard.
        classes: names of the classes.
        kind: extension and format of the images.
        mode: ``RGB`` or ``L``.
        size: side of the images in pixels.
        seed: seed of the noise.
        broken: numbers of samples whose image does not decode.
    """
    base = folder / name
    (base / split).mkdir(parents=True, exist_ok=True)
    (base / "classnames.txt").write_text("".join(f"{line}\n" for line in classes))
    (base / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in TEMPLATES))
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
    """Encodes an image of noise, tinted by the label."""
    pixels = random.integers(0, 160, (size, size, 3))
    pixels[..., label % 3] += 95
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(buffer, format={"jpg": "jpeg"}.get(kind, kind))
    return buffer.getvalue()


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to an archive."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def quick_trainer(*callbacks: "Callback", processes: int = 1, **options: Any) -> "Trainer":
    """Makes a CPU trainer that prints nothing and saves nothing.

    Args:
        callbacks: callbacks of the trainer.
        processes: number of processes, by DistributedDataParallel from two on.
        options: options of the trainer, which replace these defaults.
    """
    from lightning.pytorch import Trainer  # slow, and many tests only write data

    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": processes, "strategy": "ddp" if processes > 1 else "auto", "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **quiet | options)


def run_test(
    method: "LightningModule", data: "LightningDataModule", *callbacks: "Callback", **options: Any
) -> "Trainer":
    """Tests a method with a quick trainer, which is returned.

    Args:
        method: the tested method.
        data: data module with the test sets.
        callbacks: see `quick_trainer`.
        options: see `quick_trainer`.
    """
    trainer = quick_trainer(*callbacks, **options)
    trainer.test(method, datamodule=data, verbose=False)
    return trainer
