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
        head, start = self._head(method, task), self._context_of(method).vectors.detach().requires_grad_()
        untuned, defended = head(start), []  # the same for all images
        for features in self._view_features(method, images, index, draw):
            vectors = self.tuned(start, self.classify(method, features.detach(), task, head=untuned))
            with torch.no_grad():
                tuned = head(vectors)
            defended.append(self._weighted(method, features, task, tuned))
        return torch.stack(defended)

    def surrogate(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the weighted logits of the views under the phrase."""
        with torch.no_grad():
            head = self._head(method, task)(self._context_of(method).vectors)
        features = self._view_features(method, images, index, draw)
        return torch.stack([self._weighted(method, of_views, task, head) for of_views in features])

    def tuned(self, start: Tensor, logits: Tensor) -> Tensor:
        """Takes the step for one image, and keeps the graph for others.

        Args:
            start: context ``(n, width)`` before the step.
            logits: ``(V, C)`` of all views under it, with the graph to it.
        """
        entropies = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        least = entropies.topk(max(1, math.floor(self.kept * self.views)), largest=False).values
        vectors = start.detach().clone().requires_grad_()
        (vectors.grad,) = torch.autograd.grad(least.mean(), start, retain_graph=True)
        torch.optim.AdamW([vectors], self.lr).step()
        return vectors.detach()

    def weights(self, features: Tensor) -> Tensor:
        """Computes the weights ``(V,)`` of the views of one image from their unit features ``(V, D)``."""
        count = len(features)
        others = ~torch.eye(count, dtype=torch.bool, device=features.device)
        cosines = (features @ features.T)[others].view(count, count - 1)
        nearest = cosines.topk(min(self.neighbours, count - 1), -1).values
        return torch.softmax(nearest.mean(-1) / self.temperature, 0)

    def _view_features(self, method: Model, images: Tensor, index: Tensor | None, draw: int) -> Tensor:
        """Encodes all views of ``B`` images as unit features ``(B, V, D)``."""
        change = partial(self._random_view.apply, images, self, index=index, draw=draw)
        views = [images, *(change(part=number) for number in range(self.views - 1))]
        return torch.stack([method.image_features(view) for view in views], 1)

    def _weighted(self, method: Model, features: Tensor, task: str, head: Tensor) -> Tensor:
        """Averages the logits of the views of one image, from features ``(V, D)``, as ``(C,)``."""
        return self.weights(features) @ self.classify(method, features, task, head=head)

    def _head(self, method: Model, task: str) -> Callable[[Tensor], Tensor]:
        """Returns the function from a context ``(n, width)`` to the classifier weights of a task."""
        context, classes = self._context_of(method), method.tasks[task]
        tokens = context.tokenize(method.clip, classes.class_names)
        return lambda vectors: encode_head(lambda _: context.encode(method.clip, tokens, vectors=vectors), classes)

    def _context_of(self, method: Model) -> LearnableContext:
        """Reads the phrase's word embeddings, once per text tower."""
        table = method.clip.token_embedding.weight
        if self._context is None or self._context[0] is not table:
            with torch.inference_mode(False):
                self._context = table, LearnableContext(method.clip, self.phrase)
        return self._context[1]
