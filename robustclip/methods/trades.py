"""TRADES, a trade-off between clean accuracy and robustness with a separate loss term for each."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from robustclip.arguments import NonNegative
from robustclip.methods._shared.tecoa_recipe import TeCoARecipe
from robustclip.objectives.losses import kl
from robustclip.types import Batch


class TRADES(TeCoARecipe):
    """TRADES over class prompts (Zhang et al., ICML 2019, https://arxiv.org/abs/1901.08573).

    Minimises ``CE(z(x), y) + beta KL(softmax z(x) || softmax z(x'))``, where ``z(x) = s cos(f(x), t)`` are zero-shot
    logits over the class prompts of the training set. ``x'`` maximises the KL term in the perturbation set (PGD, last
    iterate) from a random start, since the KL term has no gradient at clean images. Both of its sides get gradients.

    The paper trains classifiers from scratch on small images. To make the method comparable with TeCoA, its classifier
    is replaced by text prompts, its attack budget and optimiser by TeCoA's, and its Gaussian random start by a uniform
    one.

    Args:
        beta: weight of the KL term, the paper's ``1 / lambda``.
        kwargs: arguments of `TeCoARecipe`.

    Raises:
        ValueError: the weight is negative.
    """

    training_arguments: tuple[str, ...] = ("beta",)

    def __init__(self, beta: NonNegative = 6.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = beta

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy on clean images and the KL divergence between clean and adversarial predictions."""
        clean = self.logits(batch.images)
        attacked = self.perturb(batch, loss=kl, targets=clean)
        return {
            "clean_ce": F.cross_entropy(clean, batch.labels),
            "adversarial_kl": self.beta * kl(self.logits(attacked), clean).mean(),
        }
