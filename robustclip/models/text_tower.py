"""Text towers run on the tokens that matter; open_clip would run them on the whole context, padding included."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


def cut(net: Any, tokens: Tensor) -> Tensor:
    """Removes the columns of tokens ``(N, L)`` that no feature depends on.

    In a causal tower whose feature is taken at the end of the text, no later token matters; in a tower of Hugging Face,
    attention and pooling mask the padding. Other towers get the full length.

    Args:
        net: open_clip model.
        tokens: ``(N, L)``.
    """
    ends = _ends(net, tokens)
    return tokens if ends is None else tokens[:, : int(ends.max()) + 1]


def joined(net: Any, parts: Sequence[Tensor]) -> Tensor:
    """Concatenates tokens ``(N_i, L_i)`` as one ``(sum N_i, L)``, padded as the tower's own tokenizer does.

    Args:
        net: open_clip model.
        parts: the tokens.
    """
    longest = max(part.shape[1] for part in parts)
    padding = _tower(net).config.pad_token_id if isinstance(_tower(net), HFTextEncoder) else 0
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=padding) for part in parts])


def encode(net: Any, tokens: Tensor) -> Tensor:
    """Encodes tokens as unit features ``(N, D)``.

    Args:
        net: open_clip model.
        tokens: ``(N, L)``, cut or at full length.
    """
    length, tower = tokens.shape[1], _tower(net)
    if isinstance(tower, HFTextEncoder) or length == tower.context_length:
        return F.normalize(net.encode_text(tokens), dim=-1)
    # open_clip adds all positions and the whole mask, so both are replaced by parts as long as the tokens.
    shorter = {"attn_mask": tower.attn_mask[:length, :length]}
    if tower is net:
        shorter["positional_embedding"] = net.positional_embedding[:length]
    names = {name if tower is net else f"text.{name}": tensor for name, tensor in shorter.items()}
    features: Tensor = functional_call(net, names, kwargs={"text": tokens})[1]
    return features


def embedding(net: Any) -> nn.Embedding:
    """Returns the layer that embeds the tokens of the text tower."""
    tower = _tower(net)
    layer = tower.transformer.get_input_embeddings() if isinstance(tower, HFTextEncoder) else tower.token_embedding
    return cast(nn.Embedding, layer)


def blocks(net: Any) -> list[nn.Module]:
    """Lists the blocks of open_clip's own text tower; empty for towers of Hugging Face."""
    tower = _tower(net) if isinstance(net, CLIP | CustomTextCLIP) else None
    return list(getattr(getattr(tower, "transformer", None), "resblocks", ()))


def is_causal(net: Any) -> bool:
    """Checks whether the text tower is one of open_clip in which a token attends to earlier ones alone."""
    return isinstance(net, CLIP | CustomTextCLIP) and getattr(_tower(net), "attn_mask", None) is not None


def _tower(net: Any) -> Any:
    """Returns the module of the text tower: open_clip's CLIP contains its parts directly, other models as ``text``."""
    return net if isinstance(net, CLIP) else net.text


def _ends(net: Any, tokens: Tensor) -> Tensor | None:
    """Finds the position ``(N,)`` of the last token of each text that matters; None if it is unknown."""
    if not isinstance(net, CLIP | CustomTextCLIP):
        return None
    tower = _tower(net)
    ends: Tensor
    if isinstance(tower, HFTextEncoder):
        ends = ((tokens != tower.config.pad_token_id) * torch.arange(tokens.shape[1])).amax(1)
        return ends
    if tower.attn_mask is None or (isinstance(tower, TextTransformer) and tower.cls_emb is not None):
        return None
    pooling, end = (net.text_pool_type, net.text_eos_id) if tower is net else (tower.pool_type, tower.eos_id)
    if pooling == "argmax":
        return tokens.argmax(1)
    return (tokens == end).int().argmax(1) if pooling == "eos" else None
