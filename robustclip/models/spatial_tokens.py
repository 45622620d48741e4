"""Features of the positions of an image, read from the last block of an image tower."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def recorded(visual: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the inputs of the tower's last block, or of its attention pool, in all passes inside.

    Raises:
        ValueError: the tower has no features of positions.
    """
    inputs: list[Tensor] = []
    handle = _last(visual).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def local_embeddings(visual: Any, inputs: Tensor) -> Tensor:
    """Embeds the P positions of images as ``(B, P, D)``, not normalised, as GL-MCM does.

    In a transformer, the attention of the last block is replaced by the identity map: every patch attends to itself
    alone. Tokens behind the patches, such as those of a visual prompt, are no positions. In CLIP's ResNets, the
    projections of the attention pool are applied to every position, without positional embedding.

    Args:
        visual: image tower.
        inputs: result of `recorded`: tokens ``(B, L, W)`` with the class token first, or maps ``(B, W, H, W)``.
    """
    if isinstance(visual, ModifiedResNet):
        pool: Any = visual.attnpool
        return cast(Tensor, pool.c_proj(pool.v_proj(inputs.flatten(2).transpose(1, 2))))
    count = visual.grid_size[0] * visual.grid_size[1]
    tokens: Tensor = visual.ln_post(self_attended(visual.transformer.resblocks[-1], inputs[:, 1 : 1 + count]))
    return tokens if visual.proj is None else tokens @ visual.proj


def self_attended(block: Any, tokens: Tensor) -> Tensor:
    """Applies a block of a transformer to tokens of which each attends to itself alone.

    Args:
        block: residual attention block of open_clip.
        tokens: ``(B, L, W)``.
    """
    attention, width = block.attn, tokens.shape[-1]
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[-width:]
    values = F.linear(block.ln_1(tokens), attention.in_proj_weight[-width:], bias)
    tokens = tokens + block.ls_1(F.linear(values, attention.out_proj.weight, attention.out_proj.bias))
    output: Tensor = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
    return output


def returns_class_token(visual: Any) -> bool:
    """Checks whether an image tower is an open_clip VisionTransformer whose output is its class token."""
    return isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"


def _last(visual: Any) -> nn.Module:
    """Returns the module whose input holds the positions."""
    if isinstance(visual, ModifiedResNet):
        return cast(nn.Module, visual.attnpool)
    if returns_class_token(visual):
        blocks: Any = visual.transformer.resblocks
        if isinstance(blocks[-1], ResidualAttentionBlock):
            return cast(nn.Module, blocks[-1])
    raise ValueError(
        "features of positions need an open_clip VisionTransformer whose output is its class token, or CLIP's ResNet;"
        f" this tower is a {type(visual).__name__} with another output or block"
    )
