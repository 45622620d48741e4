"""ET3, energy-guided test-time transformation: lowers the energy of an image before it is classified."""

import torch
from torch import Tensor

from robustclip.arguments import Count, Positive
from robustclip.attacks import Radius, pixels
from robustclip.attacks.perturbation_set import project, unit
from robustclip.defences.defence import Defence, Model

PAPERS_SIDE = 224  # of the authors' images, for which they give the step size


class ET3(Defence):
    """ET3 (CVPR 2026), for adversarially fine-tuned towers.

    The image becomes ``x + t``, where ``t`` takes steps down the energy ``E(x) = -T log sum_c exp(z_c(x) / T)``::

        t <- clip(t - a g / |g|_2),  g = grad E(x + t),  a = alpha H / 224

    The result has no gradient, as in the authors' code. Departure: the step size is an L2 length, which is scaled by
    the side ``H`` of the image; at 224 pixels it is the authors'.

    Args:
        eps: radius of the transformation.
        alpha: step size for images of 224 pixels; the authors take 2.5 for TeCoA and 2.0 (``eps`` 4/255) for FARE.
        steps: number of steps.
        temperature: ``T``.
    """

    needs_gradients = True
    backward = "none"

    def __init__(
        self, eps: Radius = "5/255", alpha: Positive = 2.5, steps: Count = 2, temperature: Positive = 1.0
    ) -> None:
        super().__init__()
        self.eps = pixels(eps, name="eps")
        self.alpha, self.steps, self.temperature = alpha, steps, temperature

    def purify(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the images of lower energy."""
        x = images.detach()
        length, changed = self.alpha * x.shape[-1] / PAPERS_SIDE, x
        for _ in range(self.steps):
            changed = changed.detach().requires_grad_()
            energy = -self.temperature * (method.logits(changed, task) / self.temperature).logsumexp(-1)
            gradient = torch.autograd.grad(energy.sum(), changed)[0]
            changed = project(changed.detach() - length * unit(gradient), x, self.eps, "linf")
        return changed
