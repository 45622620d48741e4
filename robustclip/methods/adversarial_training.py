"""Adversarial training without text, through a classifier that is discarded after training."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.arguments import NonNegative
from robustclip.methods._shared.tecoa_recipe import TeCoARecipe
from robustclip.models.layers import frozen
from robustclip.types import Batch, data_of


class AdversarialTraining(TeCoARecipe):
    """Adversarial training without text: Adv. and CoAdv. (Mao et al., ICLR 2023, https://arxiv.org/abs/2212.07016).

    These are baselines of TeCoA. They minimise ``-log softmax(z(x'))_y``, where ``x'`` maximises the same loss in the
    perturbation set (PGD, last iterate). With the embedding ``f`` before normalisation, the logits ``z`` do not depend
    on text:

    - ``linear``, standard adversarial training (Madry et al., https://arxiv.org/abs/1706.06083): ``z = W f(x') + b``;
    - ``cosine``, CoAdv.: ``z_c = s cos(W f(x'), e_c)``, orthogonal one-hot vectors ``e_c`` in the place of TeCoA's text
      features, and the frozen logit scale ``s``.

    The classifier ``W, b`` is discarded after training: evaluation uses zero-shot classifiers.

    The authors' code has neither. The map ``W`` of ``cosine``, the embedding before normalisation and the classifier's
    learning rate are this project's interpretation.

    Args:
        head: kind of the classifier that is trained on the embeddings.
        head_lr: learning rate of the classifier, whose start is random; the image tower has the optimiser's.
        kwargs: arguments of `TeCoARecipe`.

    Raises:
        ValueError: there is no classifier of that name.
    """

    training_arguments: tuple[str, ...] = ("head", "head_lr")

    def __init__(
        self, head: Literal["linear", "cosine"] = "linear", head_lr: NonNegative = 1e-2, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.kind, self.head_lr = head, head_lr
        self.classifier: nn.Module = nn.Identity()  # until a fit defines the number of classes

    def setup(self, stage: str) -> None:
        """Adds the classifier for the training classes."""
        if stage == "fit" and isinstance(self.classifier, nn.Identity):
            self.add_classifier(len(data_of(self.trainer).train_task.class_names))
        super().setup(stage)

    def add_classifier(self, classes: int) -> None:
        """Creates a classifier with random weights, ``D`` to ``C``, on the image embeddings."""
        with torch.no_grad(), frozen(self):
            image = torch.zeros(1, 3, self.image_size, self.image_size, device=self.clip.mean.device)
            width = self.clip.embed_image(image).shape[1]
        self.classifier = nn.Linear(width, classes, bias=self.kind == "linear", device=image.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the image tower and the classifier."""
        return [*super().parameter_groups(), {"params": list(self.classifier.parameters()), "lr": self.head_lr}]

    def training_logits(self, images: Tensor) -> Tensor:
        """Computes the classifier's logits ``(B, C)`` of images ``(B, 3, H, W)`` in [0, 1]."""
        embeddings = self.clip.embed_image(images)
        with torch.autocast(images.device.type, enabled=False):  # see `head_logits`
            outputs: Tensor = self.classifier(embeddings.to(self.clip.mean.dtype))
            return outputs if self.kind == "linear" else self.clip.logit_scale * F.normalize(outputs, dim=-1)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy of the classifier, on images that are attacked through it."""
        attacked = self.perturb(batch, forward=self.training_logits)
        return {"adversarial_ce": F.cross_entropy(self.training_logits(attacked), batch.labels)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Discards the checkpoint's classifier, unless training is resumed."""
        if isinstance(self.classifier, nn.Identity):
            state = checkpoint["state_dict"]
            kept = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
            checkpoint["state_dict"] = kept
        super().on_load_checkpoint(checkpoint)
