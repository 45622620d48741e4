"""Five tiny architectures with random weights, and what plain open_clip computes with them."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import quick_trainer
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.cli.lightning import main
from robustclip.data import CLIPDataModule
from robustclip.methods import TeCoA
from robustclip.types import Task

TASK = Task("animals", ("cat", "dog", "aeroplane"), ("a photo of a {}", "one {} alone"))
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-vit-quickgelu": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": TEXT,
    },
    "tiny-convnext": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "tiny-sigmoid": {  # SigLIP's kind: attention pooling by timm, no causal mask, last token, a bias of the logits
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            **TEXT,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    },
}
DEMO = Path(__file__).parents[1] / "robustclip" / "configs" / "demo.yaml"
SMALL = [
    "--config", str(DEMO), "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--data.batch_size", "4", "--data.test", "[shapes:colours]",
    "--trainer.logger", "false", "--evaluation.max_samples", "4", "--model.warmup_steps", "0",
]  # fmt: skip


def register(folder: Path) -> None:
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")


@contextmanager
def one_tokenizer() -> Iterator[None]:
    """Builds open_clip's tokenizer once: it takes half a second, as long as the rest of a test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(open_clip.factory, "SimpleTokenizer", functools.cache(open_clip.SimpleTokenizer))
        yield


def random_net(arch: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net: nn.Module = open_clip.create_model(arch)
        for parameter in net.parameters():  # zeros and ones would hide a tensor in the wrong place
            parameter.data += 0.02 * torch.randn_like(parameter)
    return net.eval()


def images(size: int) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def plain_logits(net: Any, arch: str) -> Tensor:
    """Zero-shot logits of `TASK` by open_clip alone: normalised mean of normalised prompts, times the logit scale."""
    visual = net.eval().visual
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (visual.image_mean, visual.image_std))
    with torch.no_grad():
        seen = net.encode_image((images(size) - mean) / std, normalize=True)
        rows = []
        for name in TASK.class_names:
            tokens = open_clip.get_tokenizer(arch)([template.replace("{}", name) for template in TASK.templates])
            rows.append(F.normalize(net.encode_text(tokens, normalize=True).mean(0), dim=0))
        logits: Tensor = net.logit_scale.exp() * seen @ torch.stack(rows).T
    return logits


def method_logits(method: TeCoA) -> Tensor:
    method.eval().prepare([TASK])
    with torch.no_grad():
        return method.logits(images(method.image_size), TASK.name)


def fitted(folder: Path, path: Path, **kwargs: Any) -> TeCoA:
    """Two large steps from the weights of a folder; every tensor moves."""
    method = TeCoA(pretrained=str(folder), warmup_steps=0, optimizer=lambda p: torch.optim.SGD(p, lr=0.05), **kwargs)
    trainer = quick_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(method, datamodule=CLIPDataModule(train="shapes:source", batch_size=4, image_size=method.image_size))
    trainer.save_checkpoint(path)
    return method


def trained_by_command(folder: Path) -> tuple[Path, Path]:
    """Checkpoint of a short ``fit`` of the demo, and the folder of its ``test``."""
    place = ["--trainer.default_root_dir", str(folder)]
    main(["fit", *SMALL, *place, "--trainer.max_steps", "2"])
    checkpoint = folder / "checkpoints" / "last.ckpt"
    results = ["--results.folder", str(folder), "--results.name", "run"]
    main(["test", *SMALL, *place, *results, "--ckpt_path", str(checkpoint)])
    return checkpoint, folder / "run"
