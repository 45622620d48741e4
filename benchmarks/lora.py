"""Size of LoRA against the whole image tower: trained parameters, checkpoint, and memory of a pass.

usage: python benchmarks/lora.py FOLDER; needs 2 GB in FOLDER.
"""

import sys
from pathlib import Path

import open_clip
import torch
from lightning.pytorch import Trainer

from robustclip.data import CLIPDataModule
from robustclip.methods import TeCoA
from robustclip.models.lora import LoRA

ARCH = "ViT-B-32"


def kept(method: TeCoA, images: int) -> int:
    """Counts the bytes that autograd keeps for the backward pass of the image tower, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    tensors: list[torch.Tensor] = []  # alive, so that no storage is used twice
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method.image_features(torch.rand(images, 3, 224, 224))
    return sum(sizes.values())


def main(folder: Path) -> None:
    """Makes random weights, measures both ways of training them, and prints the figures."""
    torch.manual_seed(0)
    weights = folder / "weights.pt"
    torch.save(open_clip.create_model(ARCH, pretrained=None).state_dict(), weights)
    for name, lora in (("whole tower", None), ("rank 8", LoRA(rank=8))):
        method = TeCoA(arch=ARCH, pretrained=str(weights), lora=lora, warmup_steps=0)
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False
        )
        data = CLIPDataModule("shapes:source", batch_size=2, shots=1, image_size=224)
        trainer.fit(method, datamodule=data)
        trainer.save_checkpoint(path := folder / "a.ckpt")
        count = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
        one, two = kept(method.train(), 1), kept(method, 2)
        growth, once = (two - one) / 2**20, (2 * one - two) / 2**20
        megabytes = path.stat().st_size / 1e6
        print(f"{name}: {count} parameters, {megabytes:.1f} MB, {growth:.1f} MiB per image, {once:.0f} MiB once")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
