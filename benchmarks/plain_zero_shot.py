"""Measures zero-shot accuracy under PGD in plain PyTorch, as an independent reference for the package.

The script imports nothing from the package, so that it cannot share a fault with it. The complete protocol:

* data: the clip_benchmark layout, `ROOT/<set>/test/N.tar`; the id of a sample is its position in the split;
* model: an open_clip folder, fp32, eval mode; resize to the tower's input and normalisation happen inside the model;
* attack: L-infinity PGD from a random start that depends only on (seed, sample id); the last iterate counts.
"""

import argparse
import io
import itertools
import json
import tarfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import torch
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

SEED = 0
WORD = 0xFFFFFFFF
# These images are not resized before the attack: an attack on CIFAR has 32 x 32 variables.
NATIVE_SIZE_SETS = frozenset({"cifar10", "cifar100", "stl10"})
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
Integer = TypeVar("Integer", int, Tensor)


def mix(word: Integer) -> Integer:
    """Scrambles 32-bit words as the finaliser of MurmurHash3 does.

    The int64 products of a tensor wrap around, which leaves their low 32 bits right.
    """
    word = word ^ (word >> 16)
    word = (word * 0x85EBCA6B) & WORD
    word = word ^ (word >> 13)
    word = (word * 0xC2B2AE35) & WORD
    return word ^ (word >> 16)


def uniform(ids: list[int], shape: torch.Size, seed: int = SEED) -> Tensor:
    """Draws uniform numbers (B, C, H, W) in [0, 1) for a `shape` of (C, H, W), from the seed and the ids only."""
    counters = mix(torch.arange(shape.numel(), dtype=torch.int64)).view(shape)
    keys = [mix(mix(mix(seed & WORD) ^ (number & WORD)) ^ (number >> 32)) for number in ids]
    return torch.stack([(mix(counters ^ key) >> 8).to(torch.float32) / 2**24 for key in keys])


def pgd(
    model: nn.Module, images: Tensor, labels: Tensor, ids: list[int], eps: float, alpha: float, steps: int
) -> Tensor:
    """Attacks images (B, C, H, W) in [0, 1]; the result differs by at most `eps` per pixel."""
    lower, upper = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    start = images + eps * (2 * uniform(ids, images.shape[1:]) - 1)
    attacked = torch.clamp(start, lower, upper)
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        loss = F.cross_entropy(model(attacked), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        attacked = torch.clamp(attacked.detach() + alpha * gradient.sign(), lower, upper)
    return attacked.detach()


class ZeroShotClassifier(nn.Module):
    """Maps images (B, 3, H, W) in [0, 1] to logits (B, C).

    Args:
        folder: open_clip folder with configuration, weights and tokenizer.
        image_size: side of the tower's input.
    """

    def __init__(self, folder: Path, image_size: int) -> None:
        super().__init__()
        settings = json.loads((folder / "open_clip_config.json").read_text())
        text_settings = settings["model_cfg"]["text_cfg"]
        for key in ("hf_model_name", "hf_tokenizer_name"):
            text_settings[key] = str((folder / text_settings[key]).resolve())
        self.clip = CustomTextCLIP(**settings["model_cfg"])
        self.clip.load_state_dict(load_file(folder / "open_clip_model.safetensors"), strict=True)
        # The channels-last tower is 1.7 times faster on a CPU; the values are equal up to rounding.
        self.clip.float().eval().requires_grad_(False).visual.to(memory_format=torch.channels_last)
        self.tokenizer = HFTokenizer(text_settings["hf_tokenizer_name"], context_length=text_settings["context_length"])
        self.image_size = image_size
        self.mean, self.std = (torch.tensor(settings["preprocess_cfg"][key]).view(3, 1, 1) for key in ("mean", "std"))
        self.class_features = torch.empty(0)

    @torch.no_grad()
    def set_classes(self, class_names: list[str], templates: list[str]) -> None:
        """Encodes the classes: each row is the unit mean of one class's unit prompt features."""
        rows = []
        for name in class_names:
            prompts = self.tokenizer([template.replace("{c}", name) for template in templates])
            rows.append(F.normalize(self.clip.encode_text(prompts), dim=-1).mean(dim=0))
        self.class_features = F.normalize(torch.stack(rows), dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        pixels = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = F.normalize(self.clip.encode_image(pixels), dim=-1)
        logits: Tensor = self.clip.logit_scale.exp() * features @ self.class_features.T
        return logits


def read_samples(split: Path) -> Iterator[tuple[bytes, int]]:
    """Yields (encoded image, label) in shard and tar order."""
    for shard in range(int((split / "nshards.txt").read_text())):
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(split / f"{shard}.tar") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    parent, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    samples.setdefault(f"{parent}/{stem}", {})[suffix.lower()] = content.read()
        for sample in samples.values():
            (image,) = (content for suffix, content in sample.items() if suffix in IMAGE_SUFFIXES)
            yield image, int(sample["cls"])


def read_batches(
    folder: Path, size: int, batch_size: int, limit: int | None, crop: str
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Yields images (B, 3, H, W) in [0, 1], labels (B,) and ids of the test split of one set."""
    resize = transforms.Resize(round(size * 256 / 224))
    if crop == "clip":
        resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    whole = [] if folder.name in NATIVE_SIZE_SETS else [resize, transforms.CenterCrop(size)]
    prepare = transforms.Compose([*whole, transforms.ToTensor()])
    samples = list(read_samples(folder / "test"))
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = iter(range(len(samples)) if limit is None else sorted(order[:limit]))
    while ids := list(itertools.islice(chosen, batch_size)):
        images = torch.stack([prepare(Image.open(io.BytesIO(samples[i][0])).convert("RGB")) for i in ids])
        yield images, torch.tensor([samples[i][1] for i in ids]), ids


def evaluate(model: ZeroShotClassifier, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Counts the images of one set that are classified correctly, clean and attacked."""
    started = time.perf_counter()
    class_names = (folder / "classnames.txt").read_text().splitlines()
    model.set_classes(class_names, (folder / "zeroshot_classification_templates.txt").read_text().splitlines())
    eps = float(options.eps)
    total = clean = robust = 0
    size, crop = options.image_size, options.crop
    for images, labels, ids in read_batches(folder, size, options.batch_size, options.limit, crop):
        attacked = pgd(model, images, labels, ids, eps=eps, alpha=eps * options.alpha_over_eps, steps=options.steps)
        with torch.no_grad():
            clean += int((model(images).argmax(dim=-1) == labels).sum())
            robust += int((model(attacked).argmax(dim=-1) == labels).sum())
        total += len(ids)
    return {"n": total, "clean": clean, "pgd": robust, "seconds": round(time.perf_counter() - started, 1)}


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Zero-shot accuracy under PGD in plain PyTorch, without the package.")
    parser.add_argument("--model", type=Path, required=True, help="open_clip folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of sets in the clip_benchmark layout")
    parser.add_argument("--sets", nargs="+", required=True, help="names of folders in --data")
    parser.add_argument("--image-size", type=int, default=128, help="side of the tower's input")
    parser.add_argument("--crop", choices=("tecoa", "clip"), default="tecoa", help="as data.crop of the package")
    parser.add_argument("--eps", type=Fraction, default=Fraction(1, 255), help="radius, such as 1/255")
    parser.add_argument("--alpha-over-eps", type=float, default=0.25, help="step size as a share of the radius")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, help="a fixed random subset of each set")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    """Evaluates every set, writes the JSON after each, and prints a Markdown table."""
    options = parse_options()
    model = ZeroShotClassifier(options.model, options.image_size)
    results: dict[str, dict[str, float]] = {}
    print("| set | images | clean % | PGD % | seconds |\n|---|---|---|---|---|")
    for name in options.sets:
        row = results[name] = evaluate(model, options.data / name, options)
        options.out.write_text(json.dumps(results, indent=2) + "\n")
        clean, robust = (100 * row[key] / row["n"] for key in ("clean", "pgd"))
        print(f"| {name} | {row['n']} | {clean:.2f} | {robust:.2f} | {row['seconds']} |", flush=True)


if __name__ == "__main__":
    main()
