"""Scale and shift of a tower's normalisation layers."""

from typing import Literal

from torch import nn

from robustclip.clip import BatchNorm

NormFilter = Literal["official", "all"]
NORMS = (nn.LayerNorm, BatchNorm, nn.GroupNorm, nn.RMSNorm)  # timm's own are subclasses


def norm_parameters(visual: nn.Module, norm_filter: NormFilter) -> list[nn.Parameter]:
    """Those of an image tower, in its order.

    Args:
        visual: the tower.
        norm_filter: ``official`` takes what has "bn" or "ln" in its name, as in OpenAI's towers, but for the norms of a
            ResNet's shortcuts; ``all`` takes every layer of a kind that is known.

    Raises:
        ValueError: a filter that lets nothing through.
    """
    if norm_filter == "official":
        found = [each for name, each in visual.named_parameters() if "bn" in name or "ln" in name]
    else:
        norms = (module for module in visual.modules() if isinstance(module, NORMS))
        found = [parameter for norm in norms for parameter in norm.parameters(recurse=False)]
    if not found:
        raise ValueError(f"norm_filter {norm_filter!r} finds no norm in a {type(visual).__name__}; take 'all'")
    return found
