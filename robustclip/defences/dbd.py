"""DBD: moves the image feature in the direction in which random views move it."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import Count, NonNegative
from robustclip.defences.defence import Defence, Model
from robustclip.defences.random_views import RandomView


class DBD(Defence):
    """DBD, directional-bias defence (ICLR 2026).

    Of random views with unit features ``u_i``, those with the predictions of least entropy are kept:

        m = mean_i (u_i - u_0),  q = mean_i cos(u_i - u_0, m)
        logits = z(normalise(u_0 + s m)),  s = factor if q > coherence else 1

    ``u_0`` is the feature of the image. Departures: classes have the task's templates, without descriptions by a
    language model; views are affine maps with jitter, blur and noise.

    Args:
        views: number of random views.
        kept: number of views that are kept.
        factor: length of the move where the views agree.
        coherence: least mean cosine of views that agree.

    Raises:
        ValueError: more views are kept than made.
    """

    is_random = True

    def __init__(
        self, views: Count = 31, kept: Count = 16, factor: NonNegative = 2.5, coherence: NonNegative = 0.8
    ) -> None:
        super().__init__()
        if kept > views:
            raise ValueError(f"DBD: kept must be at most views, {views}, got {kept}")
        self.views, self.kept, self.factor, self.coherence = views, kept, factor, coherence
        self._random_view = RandomView(degrees=10.0, shift=0.1, scale=0.2, blur=(0.5, 1.5), noise=0.05)

    def forward(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the logits of the moved features."""
        change = partial(self._random_view.apply, images, self, index=index, draw=draw)
        views = [change(part=number) for number in range(self.views)]
        features = torch.stack([method.image_features(view) for view in (images, *views)])
        entropies = torch.stack([_entropy(self.classify(method, part, task)) for part in features[1:]])
        return self.classify(method, self.moved(features[0], features[1:], entropies), task)

    def moved(self, feature: Tensor, views: Tensor, entropies: Tensor) -> Tensor:
        """Moves the features of images.

        Args:
            feature: unit features ``(B, D)`` of the images.
            views: unit features ``(V, B, D)`` of the views.
            entropies: entropies ``(V, B)`` of the predictions for the views.
        """
        places = entropies.topk(self.kept, dim=0, largest=False).indices
        moves = views.gather(0, places[:, :, None].expand(-1, -1, views.shape[2])) - feature
        mean = moves.mean(0)
        agreement = F.cosine_similarity(moves, mean[None], dim=-1).mean(0)
        length = torch.where(agreement > self.coherence, self.factor, 1.0)[:, None]
        return F.normalize(feature + length * mean, dim=-1)


def _entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
