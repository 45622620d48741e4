"""UEO, unsupervised fine-tuning in the presence of unknown classes."""

from typing import Any, Literal

import torch
from torch import Tensor

from robustclip.arguments import NonNegative, Positive
from robustclip.methods._shared.context_and_norms import ContextAndNorms
from robustclip.methods._shared.distributed import all_gather_rows
from robustclip.objectives.losses import entropy
from robustclip.types import UNKNOWN, Batch

TEMPERATURES = {"official": 1.0, "msp": 0.01}
ENTROPY_EPS = 1e-5  # inside the logarithm, in the authors' code
ORACLE_FLOOR = 1e-3  # weight of an unknown image; not 0, since inverses of weights are computed


class UEO(ContextAndNorms):
    """UEO, universal entropy optimisation (Liang et al., ICML 2024, https://arxiv.org/abs/2308.12919).

    Trains on images without labels, some of which may show none of the named classes. Each image has one confidence of
    the zero-shot model, under the test transform: ``w_i = max_c softmax(cos(f_0(x_i), t_0) / tau)_c``. With
    ``p_i = softmax(s cos(f(x_i), t))`` and ``H(p) = -sum_c p_c log(p_c + 1e-5)``, UEO minimises:

        sum_i v_i H(p_i) - m H(sum_i u_i p_i),   v_i = w_i / sum_j w_j,   u_i = (1 / w_i) / sum_j (1 / w_j)

    so that confident predictions become more confident, and uncertain images spread over the classes. `ContextAndNorms`
    defines the trained parameters.

    Sums are over the batches of all processes; gradient accumulation takes the mean over micro-batches instead, which
    is another loss. No labels are used, except by the oracle.

    Departures from the authors' code: trained parameters, weights and losses are in fp32, where half precision loses
    most updates; texts are truncated after the longest prompt.

    Args:
        weights: ``confidence`` as above; ``uniform`` is InfoMax (SHOT-IM), and EntMin with ``marginal_weight`` 0;
            ``oracle`` uses the labels as an upper bound: 1 + 1e-3 for images of a class, 1e-3 for the others.
        weight_temperature: ``tau``; ``official`` is 1 as in the authors' code, where weights are almost uniform;
            ``msp`` is 0.01, the softmax of OpenAI's models, which the paper describes.
        marginal_weight: ``m``.
        exact_entropy: leave out the 1e-5.
        kwargs: arguments of `ContextAndNorms`.

    Raises:
        ValueError: the kind of weights is unknown, or a temperature is not positive.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from robustclip import UEO, CLIPDataModule
        >>> data = CLIPDataModule("shapes:source", shots=1, batch_size=8, image_size=32)  # labels are not used
        >>> options = {"limit_val_batches": 0, "enable_progress_bar": False, "enable_checkpointing": False}
        >>> trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_model_summary=False, **options)
        >>> trainer.fit(UEO(weights="confidence"), data)
        >>> sorted(trainer.callback_metrics)
        ['train/entropy', 'train/loss', 'train/marginal_entropy']
    """

    training_arguments: tuple[str, ...] = ("weights", "weight_temperature", "marginal_weight", "exact_entropy")

    def __init__(
        self,
        weights: Literal["confidence", "uniform", "oracle"] = "confidence",
        weight_temperature: Positive | Literal["official", "msp"] = "official",
        marginal_weight: NonNegative = 1.0,
        exact_entropy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        temperature = TEMPERATURES[weight_temperature] if isinstance(weight_temperature, str) else weight_temperature
        self.weighting, self.temperature = weights, temperature
        self.marginal_weight, self.eps = marginal_weight, 0.0 if exact_entropy else ENTROPY_EPS
        self.sample_weights = torch.empty(0)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the weighted entropy of the predictions, and minus the entropy of their weighted mean."""
        rows = torch.cat([self.log_probabilities(batch.images), self.weights_of(batch)[:, None]], dim=1)
        rows = all_gather_rows(self, rows)
        with torch.autocast(rows.device.type, enabled=False):
            return self.universal_entropy(rows[:, :-1], rows[:, -1])

    def universal_entropy(self, log_p: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Computes both terms of the loss.

        Args:
            log_p: log-probabilities ``(B, C)``.
            weights: ``(B,)``, positive.
        """
        v, u = weights / weights.sum(), (1 / weights) / (1 / weights).sum()  # names of the class docstring
        marginal = (log_p + u.log()[:, None]).logsumexp(0)
        return {
            "entropy": v @ entropy(log_p, self.eps),
            "marginal_entropy": -self.marginal_weight * entropy(marginal, self.eps),
        }

    def weights_of(self, batch: Batch) -> Tensor:
        """Returns the positive weights ``(B,)`` of a batch's images."""
        if self.weighting == "uniform":
            return torch.ones(len(batch.labels), device=self.device)
        if self.weighting == "oracle":
            return (batch.labels != UNKNOWN).float() + ORACLE_FLOOR
        return self.sample_weights[batch.index]

    def on_fit_start(self) -> None:
        """Computes the confidence weights of the training images."""
        super().on_fit_start()
        if self.weighting == "confidence":
            self.sample_weights = self.summarise_training_images(
                lambda images, classes: (images @ classes.T / self.temperature).softmax(1).amax(1)
            )
