"""Evaluation of a model on test and validation tasks, and the files that a test writes."""

from robustclip.evaluation.detection import OODDetection
from robustclip.evaluation.geometry import FeatureGeometry
from robustclip.evaluation.hessians import HessianDifference
from robustclip.evaluation.progress import TaskProgress
from robustclip.evaluation.progress_lines import ProgressLines
from robustclip.evaluation.robust import RobustEvaluation
from robustclip.evaluation.writer import ResultsWriter

__all__ = [
    "FeatureGeometry",
    "HessianDifference",
    "OODDetection",
    "ProgressLines",
    "ResultsWriter",
    "RobustEvaluation",
    "TaskProgress",
]
