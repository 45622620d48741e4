"""Evaluation, results and what a run tells while it runs."""

from robustclip.callbacks.checkpoint import Checkpoints
from robustclip.callbacks.collapse import ChanceLevelWarning
from robustclip.callbacks.detection import OODDetection
from robustclip.callbacks.evaluation import RobustEvaluation
from robustclip.callbacks.geometry import FeatureGeometry
from robustclip.callbacks.hessians import HessianDifference
from robustclip.callbacks.interruption import Interruption
from robustclip.callbacks.progress import TaskProgress
from robustclip.callbacks.results import ResultsWriter

__all__ = [
    "ChanceLevelWarning",
    "Checkpoints",
    "FeatureGeometry",
    "HessianDifference",
    "Interruption",
    "OODDetection",
    "ResultsWriter",
    "RobustEvaluation",
    "TaskProgress",
]
