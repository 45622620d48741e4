"""Where a training epoch stands, in the checkpoint of a run."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from robustclip.data.sampling import ImageLoader


class ResumableDataModule(LightningDataModule):
    """A data module whose training loader continues where another run's stood."""

    def __init__(self) -> None:
        super().__init__()
        self._train_loader: ImageLoader | None = None
        self._resume_at: dict[str, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Where the training epoch stands."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues there.

        Lightning restores loaders too, but not one that exists before the checkpoint is read, as it does where the
        length of the schedule is asked for.
        """
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:  # a test has nothing to continue
            self._resume_at = state_dict

    def continued(self, loader: ImageLoader) -> ImageLoader:
        """The training loader, moved to where the checkpoint stood."""
        if self.trainer is not None:
            limit = self.trainer.limit_train_batches
            loader.cut_after = limit if isinstance(limit, int) else int(limit * len(loader))
        if self._resume_at is not None:
            loader.load_state_dict(self._resume_at)
            self._resume_at = None
        self._train_loader = loader
        return loader
