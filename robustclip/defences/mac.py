"""MAC: counterattacks several views of an image, and averages their logits."""

from functools import partial

import torch
from torch import Tensor

from robustclip.arguments import Count, CountOrZero, NonNegative, Positive
from robustclip.attacks import Radius, pixels
from robustclip.defences.defence import Defence, Model
from robustclip.defences.random_views import RandomView
from robustclip.defences.ttc import counterattack


class MAC(Defence):
    """MAC, multi-view adaptive counterattack (CVPR 2026).

    The views ``v`` are the image and random changes of it. Each moves away from its own embedding ``f(v)``, as far as
    a further random change ``a`` moves the embedding:

        c = |f(a(v)) - f(v)| / |f(v)|,  w = sigmoid((c - tau) / width)
        logits = mean over v of z(v + w d),  d by the counterattack of `TTC`, from a random start

    The counterattacks have no gradient, as in the authors' code.

    Args:
        eps: radius of the counterattack.
        alpha: step size; null for a quarter of the radius.
        steps: number of steps.
        views: number of random views beside the image.
        tau: ``c`` of an image that is counterattacked by half.
        width: range of ``c`` over which the counterattack sets in.
    """

    is_random = True
    needs_gradients = True
    backward = "none"

    def __init__(
        self,
        eps: Radius = "8/255",
        alpha: Radius | None = None,
        steps: Count = 4,
        views: CountOrZero = 1,
        tau: NonNegative = 0.7,
        width: Positive = 0.01,
    ) -> None:
        super().__init__()
        self.eps = pixels(eps, name="eps")
        self.alpha = self.eps / 4 if alpha is None else pixels(alpha, name="alpha")
        self.steps, self.views, self.tau, self.width = steps, views, tau, width
        self._random_view = RandomView()

    def forward(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the mean logits of the counterattacked views, which have no gradient."""
        return self._mean_logits(method, images.detach(), task, index, draw)

    def surrogate(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the same logits, with the gradients of the views; the counterattacks are constants."""
        return self._mean_logits(method, images, task, index, draw)

    def _mean_logits(self, method: Model, images: Tensor, task: str, index: Tensor | None, draw: int) -> Tensor:
        change = partial(self._random_view.apply, defence=self, index=index, draw=draw)
        views = [images, *(change(images, part=number) for number in range(self.views))]
        logits = []
        for number, view in enumerate(views):
            x = view.detach()
            with torch.no_grad():
                embedded, other = method.clip.embed_image(x), change(x, part=self.views + number)
                moved = (method.clip.embed_image(other) - embedded).norm(dim=-1) / embedded.norm(dim=-1)
            weight = torch.sigmoid((moved - self.tau) / self.width).view(-1, 1, 1, 1)
            noise = self.uniform(index, tuple(x.shape[1:]), draw=draw, part=2 * self.views + 1 + number)
            start = self.eps * (2 * noise - 1)
            moves, _ = counterattack(method, x, start, eps=self.eps, alpha=self.alpha, steps=self.steps)
            logits.append(method.logits(view + weight * moves[-1], task))
        return torch.stack(logits).mean(0)
