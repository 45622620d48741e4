"""Measures how far the attack's gradients in half precision agree with those in fp32.

The gradient of the summed cross-entropy is taken with respect to the pixels, at a random point of the perturbation set.
Each way is compared with fp32 image by image: cosine of the gradients, share of pixels of equal sign, and share of
pixels whose gradient is zero although it is not in fp32. Logits are products in fp32 of the features, as in the
package; "logits too" computes them in the half precision, as plain autocast does. A factor multiplies the loss, as loss
scaling does. The towers are the embedded shapes model, on drawn images, and a ViT with random weights, on noise.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from once import write
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.perturbation_set import start
from robustclip.data import CLIPDataModule
from robustclip.methods import RobustMethod, ZeroShot
from robustclip.types import Batch, Task

NAMES = tuple(f"thing number {number}" for number in range(10))  # classes of the ViT, whose answers have no meaning


class Way(NamedTuple):
    """One way to compute a gradient.

    Attributes:
        dtype: precision of the tower.
        factor: factor of the loss.
        has_coarse_logits: compute the logits in that precision too.
    """

    dtype: torch.dtype
    factor: float = 1.0
    has_coarse_logits: bool = False


WAYS = {
    "bf16": Way(torch.bfloat16),
    "bf16, logits too": Way(torch.bfloat16, has_coarse_logits=True),
    "fp16": Way(torch.float16),
    "fp16, mean over a batch of 256": Way(torch.float16, factor=2.0**-8),
    "fp16, loss x 65536": Way(torch.float16, factor=2.0**16),
}


def coarse_logits(method: RobustMethod, images: Tensor) -> Tensor:
    """Computes the logits as plain autocast does."""
    return method.clip.logit_scale * F.normalize(method.clip.embed_image(images), dim=-1) @ method.head().T


def gradient(logits: Callable[[Tensor], Tensor], batch: Batch, way: Way | None) -> Tensor:
    """Computes the gradient (B, P) of the summed loss with respect to the pixels, in fp32 without a way."""
    images = batch.images.clone().requires_grad_()
    dtype, factor = (torch.bfloat16, 1.0) if way is None else way[:2]
    with torch.autocast(images.device.type, dtype, enabled=way is not None):
        loss = F.cross_entropy(logits(images).float(), batch.labels, reduction="sum")
    (gradients,) = torch.autograd.grad(factor * loss, images)
    return gradients.flatten(1) / factor


def compare(method: RobustMethod, batch: Batch) -> dict[str, Any]:
    """Compares every way with fp32; means over the images."""
    exact = gradient(method.logits, batch, None)
    rows = {}
    for name, way in WAYS.items():
        rounded = gradient(partial(coarse_logits, method) if way.has_coarse_logits else method.logits, batch, way)
        finite = rounded.isfinite().all(1)
        rounded, reference = rounded[finite].double(), exact[finite].double()
        rows[name] = {
            "cosine": float(F.cosine_similarity(rounded, reference).mean()),
            "lowest_cosine": float(F.cosine_similarity(rounded, reference).min()),
            "equal_signs": float((rounded.sign() == reference.sign()).double().mean()),
            "vanished": float(((rounded == 0) & (reference != 0)).double().mean()),
            "images_not_finite": int((~finite).sum()),
        }
    return rows


def on_shapes(count: int, device: str) -> tuple[RobustMethod, Batch]:
    """Makes the embedded model and drawn images of its source set."""
    method = ZeroShot().to(device).eval().requires_grad_(False)
    data = CLIPDataModule("shapes:source", batch_size=count, image_size=32)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()[0]))
    method.prepare_training(data.train_task)
    return method, batch._replace(images=batch.images.to(device), labels=batch.labels.to(device))


def on_vit(arch: str, count: int, device: str) -> tuple[RobustMethod, Batch]:
    """Makes a ViT with random weights and images of noise."""
    method = ZeroShot(arch=arch, pretrained=None).to(device).eval().requires_grad_(False)
    method.prepare_training(Task("train", NAMES))
    images = torch.rand(count, 3, method.image_size, method.image_size, device=device)
    index = torch.arange(count, device=device)
    return method, Batch(images, index % len(NAMES), index)


def main() -> None:
    """Runs the comparison on both towers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="ViT-S-32", help="open_clip architecture of the ViT")
    parser.add_argument("--images", type=int, default=64, help="images of the shapes model; the ViT has an eighth")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eps", type=float, default=4 / 255, help="radius of the random start")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    towers = {
        "shapes": on_shapes(arguments.images, arguments.device),
        arguments.arch: on_vit(arguments.arch, max(1, arguments.images // 8), arguments.device),
    }
    results: dict[str, Any] = {}
    for name, (method, batch) in towers.items():
        moved = batch._replace(images=start(batch.images, arguments.eps, "linf", batch.index, arguments.seed))
        with torch.no_grad():
            chance = F.cross_entropy(method.logits(moved.images), moved.labels)
        results[name] = {"images": len(batch.labels), "cross_entropy": float(chance), "ways": compare(method, moved)}
        for way, row in results[name]["ways"].items():
            sys.stdout.write(f"{name:10} {way:32} " + " ".join(f"{k} {v:.4f}" for k, v in row.items()) + "\n")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    write(arguments.out, results, seed=arguments.seed, device=device, torch=torch.__version__)


if __name__ == "__main__":
    main()
