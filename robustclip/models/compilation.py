"""Compilation of the towers by `torch.compile`, in place."""

import os
import shutil
from inspect import signature
from typing import Any

import torch
from torch import nn

from robustclip.models import text_tower
from robustclip.models.clip import CLIPModel

VARIANTS = 64  # of one block: with and without gradients, frozen, in each precision, of fixed and of any batch size
# Older versions of PyTorch have one limit for all code, and run further variants without compilation.
LIMIT: dict[str, Any] = (
    {"recompile_limit": VARIANTS} if "recompile_limit" in signature(torch.compile).parameters else {}
)
COMPILERS = ("g++", "clang++", "c++")


def compile_towers(clip: CLIPModel, *, backend: str = "inductor") -> None:
    """Compiles the blocks of both towers in place; names of parameters, and thus checkpoints, stay as they are.

    A block is compiled at its first pass, and again for other modes, shapes and precisions. Blocks of one kind share
    their code. Everything between blocks, such as visual prompts, text contexts and activation checkpointing, runs as
    without compilation. Text towers of Hugging Face are not compiled.

    Args:
        clip: model to compile.
        backend: backend of `torch.compile`.

    Raises:
        ValueError: there is no C++ compiler, or the blocks of the image tower are not known.
    """
    if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        raise ValueError(
            f"compile needs a C++ compiler, found none of {', '.join(COMPILERS)}; install one, or unset it"
        )
    compile_image_tower(clip, backend=backend)
    for block in text_tower.blocks(clip.net):
        block.compile(backend=backend, **LIMIT)


def compile_image_tower(clip: CLIPModel, *, backend: str = "inductor") -> None:
    """Compiles the blocks of the image tower in place, see `compile_towers`.

    Args:
        clip: model to compile.
        backend: backend of `torch.compile`.
    """
    for block in clip.image_blocks():
        # The last block is listed with the closing norm.
        alone = block[0] if isinstance(block, nn.ModuleList) else block
        alone.compile(backend=backend, **LIMIT)
    clip.compiled_by = backend
