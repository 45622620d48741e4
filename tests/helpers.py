"""Makers that tests share: a quiet trainer on the CPU."""

from typing import Any

from lightning.pytorch import Callback, Trainer


def quick_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """A trainer of one CPU process that prints nothing and saves nothing.

    Args:
        callbacks: of the trainer.
        options: of the trainer; they replace these defaults.
    """
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **quiet | options)
