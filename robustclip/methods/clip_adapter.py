"""CLIP-Adapter: a bottleneck behind the image tower."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.arguments import Count, Share
from robustclip.methods._shared.frozen_towers import FrozenFeatures


class CLIPAdapter(FrozenFeatures):
    """CLIP-Adapter (Gao et al., IJCV 2024, https://arxiv.org/abs/2110.04544), for images alone as in its code.

    Minimises cross-entropy of ``s cos(u, t)``, where embeddings ``x`` become::

        u = r max(0, W2 max(0, W1 x)) + (1 - r) x

    Without biases, so that the length of ``x`` does not matter; here it is 1.

    Args:
        ratio: ``r``.
        narrowing: width of embeddings over that of the bottleneck.
        kwargs: arguments of `FrozenFeatures`.

    Raises:
        ValueError: a ratio outside [0, 1], or a bottleneck without any width.
    """

    def __init__(self, ratio: Share = 0.2, narrowing: Count = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if narrowing > self.width:
            raise ValueError(f"narrowing must be in [1, {self.width}], the width of the embeddings, got {narrowing}")
        self.ratio, inner = ratio, self.width // narrowing
        down, up = nn.Linear(self.width, inner, bias=False), nn.Linear(inner, self.width, bias=False)
        self.adapter = nn.Sequential(down, nn.ReLU(), up, nn.ReLU())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The bottleneck."""
        return [{"params": list(self.adapter.parameters())}]

    def image_features(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1], or their embeddings ``(B, D)``, to unit features ``(B, D)``."""
        features = super().image_features(images)
        return F.normalize(self.ratio * self.adapter(features) + (1 - self.ratio) * features, dim=-1)
