"""Scores an image by the nearness of its features to those of the training images."""

import warnings
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from robustclip.evaluation.detection_summary import column
from robustclip.methods import RobustMethod
from robustclip.methods._shared.distributed import of_training_images
from robustclip.objectives.scores import KNN, Model, Score
from robustclip.results.protocol import digest
from robustclip.types import UNKNOWN, Task, data_of

BANK_PER_NEIGHBOUR = 100  # K is 1 % of the bank, https://arxiv.org/abs/2204.06507
PRODUCT = 2**26  # number of cosines in memory at once, 256 MiB


class Neighbours(Score):
    """The KNN score (Sun et al., ICML 2022, https://arxiv.org/abs/2204.06507).

    The score is minus the squared Euclidean distance, ``2 cos - 2``, of an image's unit feature to its K-th nearest
    feature in a bank. The bank holds the training images of known classes, encoded by the evaluated method with its
    adapters.

    Departures from CRoFT's code (https://github.com/LinLLLL/CRoFT): the bank holds the few shots of the training, not
    the training split, and FPR95 is defined as for the other scores, not at the recall that is closest to 95 %.

    Args:
        bank: ``(N, D)``, of unit length.
        curve: further values of K; those above N are left out.

    Attributes:
        k: number of neighbours of the score, 1 % of the bank and at least 1.
        curve: values of K up to N.

    Raises:
        ValueError: an empty bank.
    """

    name = KNN

    def __init__(self, bank: Tensor, curve: Sequence[int]) -> None:
        if not len(bank):
            raise ValueError(
                f"no image of data.train shows a known class, and {KNN!r} needs some; leave it out of scores"
            )
        self.bank, self.k = bank, max(1, len(bank) // BANK_PER_NEIGHBOUR)
        self.curve = [k for k in curve if k <= len(bank)]
        self._settings: dict[str, Any] = {"k": self.k, "bank": len(bank)}

    @classmethod
    def of_training(cls, method: RobustMethod, curve: Sequence[int]) -> Self:
        """Encodes the training images of the method's data as the bank; all processes must call it.

        Args:
            method: method with a trainer.
            curve: see `Neighbours`.
        """
        with torch.inference_mode(False):  # tensors of inference mode cannot be part of an attack's graph
            index, features, labels = of_training_images(method)
            is_known = labels != UNKNOWN
            score = cls(features[is_known], curve)
        task = data_of(method.trainer).train_task
        score._settings |= {"set": task.name, "samples": digest(index[is_known].tolist())}
        return score

    @property
    def settings(self) -> dict[str, Any]:
        """Returns K and the images of the bank."""
        return self._settings

    def forward(self, model: Model, images: Tensor, task: str) -> Tensor:
        """Computes unit features ``(B, D)``, for every task."""
        return model.image_features(images)

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        """Computes the score ``(B,)``.

        Args:
            outputs: unit features ``(B, D)``.
            scale: not used.
        """
        return self.scores(outputs, [self.k])[:, 0]

    def columns(self, features: Tensor) -> dict[str, Tensor]:
        """Computes the score and its curve, by the names of `Columns`."""
        names = [KNN, *(column(KNN, str(k)) for k in self.curve)]
        return dict(zip(names, self.scores(features, [self.k, *self.curve]).unbind(1), strict=True))

    def scores(self, features: Tensor, ks: Sequence[int]) -> Tensor:
        """Computes the score for several K, as ``(B, len(ks))`` in fp64.

        Args:
            features: ``(B, D)``, of unit length.
            ks: numbers of neighbours.
        """
        places = torch.tensor(ks, device=features.device) - 1
        pieces = torch.split(features.to(self.bank.dtype), max(1, PRODUCT // len(self.bank)))
        nearest = [(piece @ self.bank.T).topk(max(ks)).values[:, places] for piece in pieces]
        return 2 * torch.cat(nearest).double() - 2


def check_bank(data: Any, tasks: Sequence[Task]) -> None:
    """Checks the training set before a test, and warns of tasks with other classes than the training set.

    Args:
        data: data module, set up.
        tasks: known tasks.

    Raises:
        ValueError: no training set, or one that has no bank.
    """
    if not data.train_sources:
        raise ValueError(f"{KNN!r} needs training images, and data.train lists none; set it, or leave it out of scores")
    data.plain_train_dataloader()
    train = data.train_task
    others = [task.name for task in tasks if {*task.class_names} != {*train.class_names}]
    if others:
        bank = f"{KNN!r} compares with images of data.train, {train.name!r}"
        warnings.warn(f"{bank}, whose classes are not those of {', '.join(others)}", stacklevel=2)
