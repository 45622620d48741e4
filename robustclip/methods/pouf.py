"""POUF, prompt-oriented unsupervised fine-tuning."""

import math
from typing import Any

import torch
from torch import Tensor

from robustclip.arguments import NonNegative
from robustclip.methods._shared.context_and_norms import ContextAndNorms
from robustclip.methods._shared.distributed import all_gather_rows
from robustclip.objectives.losses import entropy
from robustclip.types import Batch


class POUF(ContextAndNorms):
    """POUF (Tanwisuth et al., ICML 2023, https://arxiv.org/abs/2305.00350), a baseline of UEO.

    Transports images to classes and classes to images, at a cost of 1 - cos. With cosines
    ``S_ic = cos(f(x_i), t_c)``, each image is distributed over the classes by ``p_ic = softmax_c(s S)_ic``, and each
    class over the images of the batch by ``r_ic = softmax_i(s S)_ic``. InfoMax is added:

        mean_i sum_c p_ic (1 - S_ic) + mean_c sum_i r_ic (1 - S_ic) + w (mean_i H(p_i) - H(mean_i p_i))

    The images are those of all processes' batches; gradient accumulation takes the mean over micro-batches instead,
    which is another loss. No labels are used.

    Departures from the authors' code: `ContextAndNorms` defines the trained parameters and learning rates, so that
    baselines differ by their loss alone; the code also trains the logit scale, by SGD with Nesterov momentum and weight
    decay. Entropies are exact, where the code adds 1e-5 or 1e-6 inside the logarithm.

    Args:
        infomax_weight: ``w``.
        kwargs: arguments of `ContextAndNorms`.
    """

    training_arguments: tuple[str, ...] = ("infomax_weight",)

    def __init__(self, infomax_weight: NonNegative = 0.3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.infomax_weight = infomax_weight

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cost of the transport and both entropies of InfoMax."""
        features, classes = self.features(batch.images)
        with torch.autocast(features.device.type, enabled=False):
            return self.transport_and_infomax(all_gather_rows(self, features @ classes.T))

    def transport_and_infomax(self, cosines: Tensor) -> dict[str, Tensor]:
        """Computes the terms of the loss from the cosines ``S`` ``(B, C)``."""
        cost, logits = 1 - cosines, self.clip.logit_scale * cosines
        to_classes, to_images = (cost * logits.softmax(1)).sum(1), (cost * logits.softmax(0)).sum(0)
        log_p = logits.log_softmax(1)
        marginal = log_p.logsumexp(0) - math.log(len(log_p))
        return {
            "transport": to_classes.mean() + to_images.mean(),
            "entropy": self.infomax_weight * entropy(log_p).mean(),
            "marginal_entropy": -self.infomax_weight * entropy(marginal),
        }
