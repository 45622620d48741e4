"""Callbacks of a run: checkpoints, signals, processes, and a warning if the loss remains at the chance level."""

from robustclip.training.chance_level import ChanceLevelWarning
from robustclip.training.interruption import Interruption
from robustclip.training.model_checkpoint import Checkpoints
from robustclip.training.processes import ConnectedProcesses

__all__ = ["ChanceLevelWarning", "Checkpoints", "ConnectedProcesses", "Interruption"]
