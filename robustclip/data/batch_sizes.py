"""Sizes of batches per process, given as such or as a share of all images of an optimiser step."""

from dataclasses import dataclass
from typing import NamedTuple

DEFAULT = 64


class Pieces(NamedTuple):
    """Parts of an optimiser step that are computed separately.

    Attributes:
        processes: number of processes, over all devices and nodes.
        accumulated: number of batches of a process whose gradients are accumulated.
    """

    processes: int = 1
    accumulated: int = 1


@dataclass(frozen=True)
class BatchSizes:
    """Batch sizes of a configuration.

    Args:
        per_process: images per process and training step; None for the default, or the share of ``per_step``.
        per_step: images per optimiser step, over all processes and accumulated batches; None if not given.
        evaluated: images per process and evaluation step; None for the size in training.

    Raises:
        ValueError: sizes per process and per step are both given.
    """

    per_process: int | None
    per_step: int | None
    evaluated: int | None

    def __post_init__(self) -> None:
        if self.per_process is not None and self.per_step is not None:
            raise ValueError(
                f"data.batch_size is {self.per_process} and data.global_batch_size is {self.per_step}; give one of"
                " them, and null for the other"
            )

    def training(self, pieces: Pieces) -> int:
        """Returns the images per process and training step.

        Args:
            pieces: number of pieces of an optimiser step.

        Raises:
            ValueError: the images of an optimiser step are not divisible by the number of pieces.
        """
        if self.per_step is None:
            return self.per_process or DEFAULT
        count = pieces.processes * pieces.accumulated
        if self.per_step % count:
            nearest = (self.per_step // count or 1) * count
            raise ValueError(
                f"data.global_batch_size is {self.per_step}, which {pieces.processes} processes (trainer.devices x"
                f" trainer.num_nodes) x {pieces.accumulated} (trainer.accumulate_grad_batches) do not divide; change"
                f" one of these, or give a multiple of {count} such as {nearest}"
            )
        return self.per_step // count

    def evaluation(self, pieces: Pieces) -> int:
        """Returns the images per process and evaluation step; a share of an optimiser step is rounded up.

        Args:
            pieces: number of pieces of an optimiser step.
        """
        if self.evaluated is not None or self.per_step is None:
            return self.evaluated or self.per_process or DEFAULT
        return -(-self.per_step // (pieces.processes * pieces.accumulated))
