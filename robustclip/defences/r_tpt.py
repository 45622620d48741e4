"""R-TPT: tunes a text context for every image, and weights the logits of views by how much these agree."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from robustclip.arguments import Count, Positive, PositiveShare
from robustclip.defences.defence import Defence, Model
from robustclip.defences.random_views import RandomView
from robustclip.models.context import LearnableContext
from robustclip.models.heads import encode_head


class RTPT(Defence):
    """R-TPT, robust test-time prompt tuning (Sheng et al., CVPR 2025, arXiv:2504.11195).

    The views are the image and random changes of it, with unit features ``u_i`` and logits ``z_i(v)``, which depend on
    the context ``v`` before the class names. One step of AdamW on the views ``K`` of least entropy ``H``, per image:

        v <- v - lr (grad / |grad| + decay v),  grad of mean over i in K of H(softmax z_i(v))
        logits = sum_i w_i z_i(v),  w = softmax(s / temperature)
        s_i = mean of the ``neighbours`` largest cosines of u_i with other views

    The context replaces the task's templates. The gradient of the logits takes context and step as constants;
    `surrogate` leaves the step out. Departures: views are affine maps with jitter, blur and noise, while authors use
    AugMix or crops; every image has a context of its own, where their attack sees the context of the image before.

    Args:
        views: number of views, the image included.
        kept: share of the views, those of least entropy, that tune the context.
        lr: learning rate of the step; its weight decay is AdamW's, 0.01.
        neighbours: number of other views that a view is compared with.
        temperature: of the weights.
        phrase: text at which the context starts.

    Raises:
        ValueError: there is one view only.
    """

    is_random = True
    needs_gradients = True
    backward = "none"  # of the step alone

    def __init__(
        self,
        views: Count = 64,
        kept: PositiveShare = 0.1,
        lr: Positive = 5e-3,
        neighbours: Count = 20,
        temperature: Positive = 0.01,
        phrase: str = "a photo of a",
    ) -> None:
        super().__init__()
        if views < 2:
            raise ValueError(f"RTPT: views must be at least 2, got {views}")
        self.views, self.kept, self.lr, self.neighbours = views, kept, lr, neighbours
        self.temperature, self.phrase = temperature, phrase
        self._random_view = RandomView()
        self._context: tuple[Tensor, LearnableContext] | None = None  # the tower's embeddings and their phrase

    def forward(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the weighted logits of the views under the tuned contexts."""
        return self._weighted_logits(method, images, task, index, draw, is_tuned=True)

    def surrogate(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the weighted logits of the views under the phrase."""
        return self._weighted_logits(method, images, task, index, draw, is_tuned=False)

    def _weighted_logits(
        self, method: Model, images: Tensor, task: str, index: Tensor | None, draw: int, *, is_tuned: bool
    ) -> Tensor:
        change = partial(self._random_view.apply, images, self, index=index, draw=draw)
        views = [images, *(change(part=number) for number in range(self.views - 1))]
        features = torch.stack([method.image_features(view) for view in views], 1)
        defended = []
        for sample in features:
            logits = partial(self._view_logits, method, task, sample)
            vectors = self._context_of(method).vectors.detach()
            if is_tuned:
                vectors = self.tuned(vectors, partial(self._view_logits, method, task, sample.detach()))
            defended.append(self.weights(sample) @ logits(vectors))
        return torch.stack(defended)

    def tuned(self, vectors: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """Takes the step for one image.

        Args:
            vectors: context ``(n, width)``.
            logits: function from a context to the logits ``(V, C)`` of all views.
        """
        vectors = vectors.clone().requires_grad_()
        of_views = logits(vectors)
        entropies = -(of_views.softmax(-1) * of_views.log_softmax(-1)).sum(-1)
        least = entropies.topk(max(1, math.floor(self.kept * self.views)), largest=False).values
        (vectors.grad,) = torch.autograd.grad(least.mean(), vectors)
        torch.optim.AdamW([vectors], self.lr).step()
        return vectors.detach()

    def weights(self, features: Tensor) -> Tensor:
        """Computes the weights ``(V,)`` of the views of one image from their unit features ``(V, D)``."""
        count = len(features)
        others = ~torch.eye(count, dtype=torch.bool, device=features.device)
        cosines = (features @ features.T)[others].view(count, count - 1)
        nearest = cosines.topk(min(self.neighbours, count - 1), -1).values
        return torch.softmax(nearest.mean(-1) / self.temperature, 0)

    def _view_logits(self, method: Model, task: str, features: Tensor, vectors: Tensor) -> Tensor:
        """Computes the logits ``(V, C)`` of views with unit features ``(V, D)`` under a context ``(n, width)``."""
        context = self._context_of(method)
        tokens = context.tokenize(method.clip, method.tasks[task].class_names)
        head = encode_head(lambda _: context.encode(method.clip, tokens, vectors=vectors), method.tasks[task])
        return self.classify(method, features, task, head=head)

    def _context_of(self, method: Model) -> LearnableContext:
        """Reads the phrase's word embeddings, once per text tower."""
        table = method.clip.token_embedding.weight
        if self._context is None or self._context[0] is not table:
            with torch.inference_mode(False):
                self._context = table, LearnableContext(method.clip, self.phrase)
        return self._context[1]
