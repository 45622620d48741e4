"""CLIP-Adapter, a bottleneck layer behind the image tower."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.arguments import Count, Share
from robustclip.methods._shared.frozen_towers import FrozenFeatures


class CLIPAdapter(FrozenFeatures):
    """CLIP-Adapter (Gao et al., IJCV 2024, https://arxiv.org/abs/2110.04544), on images alone as in its code.

    Minimises the cross-entropy of ``s cos(u, t)``, where ``u`` is computed from the embedding ``x``::

        u = r max(0, W2 max(0, W1 x)) + (1 - r) x

    There are no biases, so the length of ``x`` does not matter; here it is 1.

    Args:
        ratio: ``r``, the weight of the adapter's output.
        narrowing: width of the embeddings divided by the width of the bottleneck.
        kwargs: arguments of `FrozenFeatures`.

    Raises:
        ValueError: the ratio is outside [0, 1], or the bottleneck has width 0.
    """

    def __init__(self, ratio: Share = 0.2, narrowing: Count = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if narrowing > self.width:
            raise ValueError(f"narrowing must be in [1, {self.width}], the width of the embeddings, got {narrowing}")
        self.ratio, inner = ratio, self.width // narrowing
        down, up = nn.Linear(self.width, inner, bias=False), nn.Linear(inner, self.width, bias=False)
        self.adapter = nn.Sequential(down, nn.ReLU(), up, nn.ReLU())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the weights of the bottleneck."""
        return [{"params": list(self.adapter.parameters())}]

    def image_features(self, images: Tensor) -> Tensor:
        """Encodes images ``(B, 3, H, W)`` in [0, 1], or embeddings ``(B, D)``, as unit features ``(B, D)``."""
        features = super().image_features(images)
        return F.normalize(self.ratio * self.adapter(features) + (1 - self.ratio) * features, dim=-1)
