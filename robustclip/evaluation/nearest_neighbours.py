"""Scores an image by the nearness of its features to those of the training images."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from robustclip.arguments import Count, checked
from robustclip.methods import RobustMethod
from robustclip.methods._shared.distributed import encode_training_images
from robustclip.objectives.scores import Model, Score
from robustclip.results.protocol import digest
from robustclip.types import UNKNOWN, Data, Task, data_of

BANK_PER_NEIGHBOUR = 100  # K is 1 % of the bank, https://arxiv.org/abs/2204.06507
PRODUCT = 2**26  # number of cosines in memory at once, 256 MiB


@checked
class Neighbours(Score):
    """The KNN score (Sun et al., ICML 2022, https://arxiv.org/abs/2204.06507).

    The score is minus the squared Euclidean distance, ``2 cos - 2``, of an image's unit feature to its K-th nearest
    feature in a bank, where K is 1 % of the bank and at least 1. The bank holds the training images of known classes,
    encoded by the evaluated method with its adapters.

    Departures from CRoFT's code (https://github.com/LinLLLL/CRoFT): the bank holds the few shots of the training, not
    the training split, and FPR95 is defined as for the other scores, not at the recall that is closest to 95 %.

    Args:
        curve: further values of K, whose AUROC and FPR95 are reported too; those above the bank's size are left out.
    """

    name = "knn"

    def __init__(self, curve: Sequence[Count] = (1, 5, 10, 25, 50, 100, 200, 300, 400, 500)) -> None:  # CRoFT's code
        self.curve = sorted({*curve})
        self._bank: Tensor | None = None
        self._origin: dict[str, Any] = {}

    def setup(self, data: Data, tasks: Sequence[Task]) -> None:
        """Checks the training set, and warns of tasks with other classes than the training set.

        Args:
            data: data module, set up.
            tasks: known tasks.

        Raises:
            ValueError: no training set, or one that has no bank.
        """
        self._bank, self._origin = None, {}
        if not getattr(data, "train_sources", True):
            needs = f"{self.name!r} needs training images, and data.train lists none"
            raise ValueError(f"{needs}; set it, or leave it out of scores")
        data.plain_train_dataloader()
        train = data.train_task
        others = [task.name for task in tasks if {*task.class_names} != {*train.class_names}]
        if others:
            bank = f"{self.name!r} compares with images of data.train, {train.name!r}"
            warnings.warn(f"{bank}, whose classes are not those of {', '.join(others)}", stacklevel=2)

    def prepare(self, model: Model, task: Task) -> None:
        """Encodes the training images of the method's data as the bank, once; all processes must call it."""
        if self._bank is not None:
            return
        if not isinstance(model, RobustMethod):
            raise TypeError(f"{self.name!r} needs a RobustMethod with a trainer, got {type(model).__name__}")
        index, features, labels = encode_training_images(model)
        is_known = labels != UNKNOWN
        self.take(features[is_known])
        train = data_of(model.trainer).train_task
        self._origin = {"set": train.name, "samples": digest(index[is_known].tolist())}

    def take(self, bank: Tensor) -> None:
        """Takes unit features ``(N, D)`` as the bank.

        Raises:
            ValueError: an empty bank.
        """
        if not len(bank):
            needs = f"no image of data.train shows a known class, and {self.name!r} needs some"
            raise ValueError(f"{needs}; leave it out of scores")
        self._bank = bank

    @property
    def bank(self) -> Tensor:
        """Unit features ``(N, D)`` of the training images."""
        if self._bank is None:
            raise RuntimeError(f"{self.name!r} has no bank; `prepare` encodes it")
        return self._bank

    @property
    def k(self) -> int:
        """Number of neighbours of the score."""
        return max(1, len(self.bank) // BANK_PER_NEIGHBOUR)

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the values of K, and the images of the bank once it is encoded."""
        bank = {} if self._bank is None else {"k": self.k, "bank": len(self._bank)}
        return {"curve": self.curve, **bank, **self._origin}

    @property
    def variants(self) -> list[str]:
        """Returns the values of K up to the size of the bank, or all while there is no bank."""
        return [str(k) for k in self.curve if self._bank is None or k <= len(self._bank)]

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

    def columns(self, outputs: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Computes the score and its curve."""
        names = [self.name, *(f"{self.name}/{k}" for k in self.variants)]
        return dict(zip(names, self.scores(outputs, [self.k, *map(int, self.variants)]).unbind(1), strict=True))

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
