"""Saves the position inside a training epoch in the checkpoint of a run, and restores it."""

import hashlib
import logging
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import IterableDataset

from robustclip.data.loader import ImageLoader

log = logging.getLogger(__name__)
SIZE, PROCESSES = "data.batch_size", "number of processes"


class ResumableDataModule(LightningDataModule):
    """A data module whose training loader resumes at the position in a checkpoint.

    Args:
        seed: seed of the order of training samples.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.train_positions: list[int] | None = None
        self._train_loader: ImageLoader | None = None
        self._resume_at: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the training epoch, and the settings on which its meaning depends."""
        if self._train_loader is None:
            return {}
        return {**self._train_loader.state_dict(), "order": self._order(self._train_loader)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moves the training loader to a saved position, at once or when the loader is made.

        Lightning does not restore a loader that exists before the checkpoint is read. A schedule that depends on the
        length of the loader makes it so early.
        """
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:  # not a test
            self._resume_at = state_dict
            if self._train_loader is not None:
                self.resumed(self._train_loader)

    def resumed(self, loader: ImageLoader) -> ImageLoader:
        """Returns the training loader, moved to the position in the checkpoint.

        Raises:
            ValueError: the position is inside an epoch, and this run has other batches or another order of samples.
        """
        if self.trainer is not None:
            limit = self.trainer.limit_train_batches
            loader.cut_after = limit if isinstance(limit, int) else int(limit * len(loader))
        if self._resume_at is not None:
            self._check_order(loader, self._resume_at)
            loader.load_state_dict(self._resume_at)
            self._resume_at = None
        self._train_loader = loader
        return loader

    def _check_order(self, loader: ImageLoader, state: dict[str, Any]) -> None:
        """Refuses another order inside an epoch, which would skip or repeat samples; warns at the end of an epoch."""
        own, saved = self._order(loader), state.get("order", {})
        keys = [key for key in own if key in saved and saved[key] != own[key]]
        if set(keys) == {SIZE, PROCESSES} and self._has_same_steps(loader, state, own):
            log.warning(
                "the images of each step are shared by %s processes, before by %s", own[PROCESSES], saved[PROCESSES]
            )
            return
        changes = [f"{key} {saved[key]} (here {own[key]})" for key in keys]
        if changes and state["batches"]:
            done = state["batches"] * saved[SIZE] * saved[PROCESSES]
            raise ValueError(
                f"ckpt_path stands after {done} of {saved['number of training samples']} samples of an epoch with"
                f" {', '.join(changes)}; give the same settings, or a checkpoint from the end of an epoch"
            )
        if changes:
            log.warning("from the next epoch on, settings differ from the checkpoint's: %s", ", ".join(changes))

    def _has_same_steps(self, loader: ImageLoader, state: dict[str, Any], own: dict[str, Any]) -> bool:
        """Says whether another number of processes sees the same images in each step that remains of the epoch."""
        saved = state["order"]
        is_same_size = saved[SIZE] * saved[PROCESSES] == own[SIZE] * own[PROCESSES]
        has_no_open_step = state["batches"] % own["trainer.accumulate_grad_batches"] == 0
        return is_same_size and has_no_open_step and not isinstance(loader.dataset, IterableDataset)

    def _order(self, loader: ImageLoader) -> dict[str, int | str | None]:
        """Collects the settings that determine the order of samples and the batches of an epoch."""
        is_stream = isinstance(loader.dataset, IterableDataset)
        chosen = hashlib.sha256(repr(self.train_positions).encode()).hexdigest()[:8]
        return {
            SIZE: loader.batch_size,
            PROCESSES: self.trainer.world_size if self.trainer else 1,
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches if self.trainer else 1,
            "number of training samples": len(loader.dataset),  # type: ignore[arg-type]
            "choice of training samples (by data.shots, data.shots_seed and data.holdout)": chosen,
            "seed_everything": self.seed,
            "data.num_workers": loader.num_workers if is_stream else None,  # workers batch a stream separately
        }
