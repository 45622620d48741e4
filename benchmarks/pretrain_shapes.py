"""Trains the tiny CLIP model of the shapes world: `python benchmarks/pretrain_shapes.py --out DIR`.

Contrastive training on a stream of random scenes and captions. The stream contains no
image of a test set, and no colour and shape of `held_out_pairs`. A caption is correct for every image of the batch that
shows the mentioned properties. The loss therefore has several positives; each is compared only with wrong partners.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import shutil
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from robustclip.data.sources.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    pick,
    render,
)
from robustclip.data.sources.shapes import MENTIONABLE, SHAPES_SETS, ShapesDataset, describe, plural, pretraining_pair

MEAN, STD = (0.5, 0.5, 0.5), (0.27, 0.27, 0.27)
OPENINGS = ("", "", "a picture of ", "an image of ")
OTHER_WORDS = "a of at the on shape shapes picture image an line drawing mosaic faint print"
BPE_NAME = "bpe_shapes.txt.gz"


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges the most frequent pair of symbols until each word is one token (Sennrich et al., arXiv 1508.07909)."""
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in split):
        pairs = Counter(pair for symbols in split for pair in pairwise(symbols))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in split:
            place = 0
            while place < len(symbols) - 1:
                if (symbols[place], symbols[place + 1]) == best:
                    symbols[place : place + 2] = ["".join(best)]
                place += 1
    return merges


def write_tokenizer(path: Path) -> int:
    """Writes the merges of the vocabulary and returns the number of tokens."""
    words = set(OTHER_WORDS.split()) | {word for position in POSITIONS for word in position.split()}
    words |= {*SHAPES, *map(plural, SHAPES), *COLOURS, *TEXTURES, *COUNTS, *SIZES, *BACKGROUNDS}
    merges = learn_merges(sorted(words))
    text = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return 2 * 256 + len(merges) + 2


def model_config(vocab_size: int) -> dict[str, Any]:
    """Returns the `model_cfg` of open_clip_config.json."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": {
            "context_length": 18,
            "vocab_size": vocab_size,
            "width": 64,
            "heads": 2,
            "layers": 2,
            "tokenizer_kwargs": {"bpe_path": BPE_NAME},
        },
    }


def mentions(scene: Scene, random: Random) -> list[str]:
    """Chooses the fields that a caption mentions, among those that the scene has a word for."""
    silent = {"size", "position"} if scene.count > 1 else set()
    silent |= {"background"} if scene.background == "plain" else set()
    silent |= {"style"} if scene.style == "filled" else set()
    fields = [field for field in MENTIONABLE if field not in silent]
    rate = pick(random, (0.2, 0.4, 0.6, 1.0))
    return [field for field in fields if random.random() < rate] or [pick(random, fields)]


def make_batch(seed: int, start: int, size: int) -> tuple[Tensor, list[str], Tensor]:
    """Returns images (B, 3, H, W) in [0, 1], captions, and a mask (B, B): caption j is correct for image i."""
    images, captions = [], []
    values = np.zeros((size, len(MENTIONABLE)), dtype=np.int64)
    masks = np.zeros((size, len(MENTIONABLE)), dtype=bool)
    codes: dict[Any, int] = {}
    for row in range(size):
        scene, random = pretraining_pair(seed, start + row)
        images.append(render(scene, random))
        chosen = mentions(scene, random)
        captions.append(pick(random, OPENINGS) + describe(scene, chosen))
        values[row] = [codes.setdefault(getattr(scene, field), len(codes)) for field in MENTIONABLE]
        masks[row] = [field in chosen for field in MENTIONABLE]
    agrees = (values[:, None] == values[None]) | ~masks[None]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return pixels, captions, torch.from_numpy(agrees.all(axis=2))


def one_sided_loss(logits: Tensor, is_right: Tensor) -> Tensor:
    """Compares each correct partner with all wrong ones of its row, from logits and mask (B, B); mean over rows."""
    wrong = logits.masked_fill(is_right, -torch.inf).logsumexp(dim=1, keepdim=True)
    losses = functional.softplus(wrong - logits) * is_right
    return (losses.sum(dim=1) / is_right.sum(dim=1)).mean()


def normalise(images: Tensor) -> Tensor:
    """Applies the model's mean and standard deviation to images in [0, 1]."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.no_grad()
def zero_shot_accuracy(model: nn.Module, tokenizer: SimpleTokenizer, name: str) -> float:
    """Returns the top-1 accuracy of one set with the mean text feature over its templates."""
    dataset = ShapesDataset(name)
    texts = [template.format(word) for template in dataset.templates for word in dataset.class_names]
    features = model.encode_text(tokenizer(texts), normalize=True)  # type: ignore[operator]
    classifier = features.unflatten(0, (len(dataset.templates), -1)).mean(dim=0)
    pixels = np.stack([np.asarray(dataset[index][0]) for index in range(len(dataset))])
    images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    scores = model.encode_image(images, normalize=True) @ functional.normalize(classifier, dim=1).T  # type: ignore[operator]
    return float((scores.argmax(dim=1) == torch.tensor(dataset.labels)).float().mean())


def train(model: nn.Module, tokenizer: SimpleTokenizer, options: argparse.Namespace) -> None:
    """Trains both towers with AdamW, a linear warm-up and a cosine decay."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))
    began = time.perf_counter()
    for step in range(options.steps):
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        images, captions, is_right = make_batch(options.seed, step * options.batch, options.batch)
        image_features, text_features, scale = model(normalise(images), tokenizer(captions))
        logits = scale * image_features @ text_features.T
        loss = 0.5 * (one_sided_loss(logits, is_right) + one_sided_loss(logits.T, is_right.T))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # type: ignore[operator]
        if step % 50 == 0:
            print(f"step {step:5d}  loss {loss.detach():.3f}  {time.perf_counter() - began:5.0f} s", flush=True)


def main() -> None:
    """Trains, writes the folder under another name, renames it, and prints the accuracy of each set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make; one that exists is replaced")
    parser.add_argument("--steps", type=int, default=700, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=256, help="image-caption pairs per step")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the stream")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(options.seed)
    aside = options.out.with_name(f"{options.out.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    config = model_config(write_tokenizer(aside / BPE_NAME))
    text_config = config["text_cfg"]
    tokenizer = SimpleTokenizer(bpe_path=str(aside / BPE_NAME), context_length=text_config["context_length"])
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text_config)
    train(model, tokenizer, options)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (aside / "open_clip_config.json").write_text(text + "\n")
    halves = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(halves, aside / "open_clip_model.safetensors")
    shutil.rmtree(options.out, ignore_errors=True)
    aside.rename(options.out)
    model.load_state_dict({name: value.float() for name, value in halves.items()})
    model.eval()
    accuracies = {name: zero_shot_accuracy(model, tokenizer, name) for name in SHAPES_SETS}
    for name, accuracy in accuracies.items():
        print(f"{name:20s} {accuracy:6.1%}")
    print(f"{'mean of zero-shot':20s} {sum(list(accuracies.values())[1:]) / (len(accuracies) - 1):6.1%}")


if __name__ == "__main__":
    main()
