"""Fine-tune CLIP-like models so that they stay robust, and measure whether they did.

Public names are imported at their first use, since PyTorch Lightning takes seconds to load.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustclip.api import evaluate, load
    from robustclip.attacks import APGD, PGD, Attack, Square, TorchAttack
    from robustclip.attacks.recipes import Recipe
    from robustclip.data import CLIPDataModule, DataSource
    from robustclip.evaluation import (
        FeatureGeometry,
        HessianDifference,
        OODDetection,
        ResultsWriter,
        RobustEvaluation,
    )
    from robustclip.methods import ARF, FARE, FLYP, PMGAFT, UEO, CRoFT, RobustMethod, TeCoA, ZeroShot
    from robustclip.types import Batch, Task

__version__ = "0.2.0"
__all__ = [
    "APGD",
    "ARF",
    "FARE",
    "FLYP",
    "PGD",
    "PMGAFT",
    "UEO",
    "Attack",
    "Batch",
    "CLIPDataModule",
    "CRoFT",
    "DataSource",
    "FeatureGeometry",
    "HessianDifference",
    "OODDetection",
    "Recipe",
    "ResultsWriter",
    "RobustEvaluation",
    "RobustMethod",
    "Square",
    "Task",
    "TeCoA",
    "TorchAttack",
    "ZeroShot",
    "__version__",
    "evaluate",
    "load",
]

_HOMES = {
    "robustclip.api": ("evaluate", "load"),
    "robustclip.attacks": ("APGD", "PGD", "Attack", "Square", "TorchAttack"),
    "robustclip.attacks.recipes": ("Recipe",),
    "robustclip.data": ("CLIPDataModule", "DataSource"),
    "robustclip.evaluation": (
        "FeatureGeometry",
        "HessianDifference",
        "OODDetection",
        "ResultsWriter",
        "RobustEvaluation",
    ),
    "robustclip.methods": ("ARF", "FARE", "FLYP", "PMGAFT", "UEO", "CRoFT", "RobustMethod", "TeCoA", "ZeroShot"),
    "robustclip.types": ("Batch", "Task"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
