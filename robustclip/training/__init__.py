"""Callbacks of a fit: checkpoints, signals, and a warning if the loss remains at the chance level."""

from robustclip.training.chance_level import ChanceLevelWarning
from robustclip.training.interruption import Interruption
from robustclip.training.model_checkpoint import Checkpoints

__all__ = ["ChanceLevelWarning", "Checkpoints", "Interruption"]
