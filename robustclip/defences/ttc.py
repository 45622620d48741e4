"""TTC, test-time counterattack: moves the embedding away from its place before the image is classified."""

import torch
from torch import Tensor

from robustclip.arguments import Count, NonNegative
from robustclip.attacks import Radius, pixels
from robustclip.defences.defence import Defence, Model


class TTC(Defence):
    """TTC (Xing et al., CVPR 2025, arXiv:2503.03613).

    An attacked image is said to be falsely stable: noise moves its embedding ``f`` little. With ``d_0`` uniform in
    ``[-eps, eps]`` and ``rho = |f(x + d_0) - f(x)| / |f(x)|``, the image becomes ``x + d``::

        d_{k+1} = clip(d_k + alpha sign grad |f(x + d_k) - f(x)|^2)
        d = sum_k w_k d_k with w_k proportional to exp(beta k), k = 0..steps, if rho < tau, else d = d_0

    The result has no gradient, as in the authors' code. Departure: ``rho`` always comes from the evaluated tower; the
    authors take the original one where it was fine-tuned.

    Args:
        eps: radius of the counterattack.
        alpha: step size.
        steps: number of steps.
        tau: largest ``rho`` of an image that is counterattacked.
        beta: growth of the weights of later steps.
    """

    is_random = True
    needs_gradients = True
    backward = "none"

    def __init__(
        self,
        eps: Radius = "4/255",
        alpha: Radius = "1/255",
        steps: Count = 2,
        tau: NonNegative = 0.2,
        beta: NonNegative = 2.0,
    ) -> None:
        super().__init__()
        self.eps, self.alpha = pixels(eps, name="eps"), pixels(alpha, name="alpha")
        self.steps, self.tau, self.beta = steps, tau, beta

    def purify(self, method: Model, images: Tensor, task: str, *, index: Tensor | None, draw: int) -> Tensor:
        """Returns the counterattacked images, or images with noise where the noise moves the embedding enough."""
        x = images.detach()
        start = self.eps * (2 * self.uniform(index, tuple(x.shape[1:]), draw=draw) - 1)
        moves, moved = counterattack(method, x, start, eps=self.eps, alpha=self.alpha, steps=self.steps)
        weights = torch.softmax(self.beta * torch.arange(len(moves), device=x.device, dtype=x.dtype), 0)
        mean = (weights.view(-1, 1, 1, 1, 1) * moves).sum(0)
        return x + torch.where((moved < self.tau).view(-1, 1, 1, 1), mean, moves[0])


def counterattack(
    method: Model, x: Tensor, start: Tensor, *, eps: float, alpha: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Moves embeddings away from those of the given images by sign steps.

    Args:
        method: method with the image tower.
        x: images ``(B, 3, H, W)`` in [0, 1], without gradient.
        start: first perturbation ``(B, 3, H, W)``.
        eps: L-infinity radius.
        alpha: step size.
        steps: number of steps.

    Returns:
        Perturbations ``(steps + 1, B, 3, H, W)``, and the relative change ``(B,)`` of the embedding by the first one.
    """
    with torch.no_grad():
        embedded = method.clip.embed_image(x)
    moves, rho = [(x + start).clamp(0, 1) - x], torch.zeros(len(x), device=x.device)
    for step in range(steps):
        delta = moves[-1].requires_grad_()
        squares = (method.clip.embed_image(x + delta) - embedded).square().sum(-1)
        gradient = torch.autograd.grad(squares.sum(), delta)[0]
        delta = delta.detach()
        if step == 0:
            rho = squares.detach().sqrt() / embedded.norm(dim=-1)
            moves[0] = delta
        moves.append((x + (delta + alpha * gradient.sign()).clamp(-eps, eps)).clamp(0, 1) - x)
    return torch.stack(moves).detach(), rho
