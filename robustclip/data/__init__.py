"""The shared data module, its data sets, and the contract of data sources.

Public names are imported at their first use: the catalogue alone needs none of the slow libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustclip.data.data_source import DataSource
    from robustclip.data.module import CLIPDataModule
    from robustclip.data.sources.source import Opened, Source

__all__ = ["CLIPDataModule", "DataSource", "Opened", "Source"]

_HOMES = {
    "CLIPDataModule": "module",
    "DataSource": "data_source",
    "Opened": "sources.source",
    "Source": "sources.source",
}


def __getattr__(name: str) -> Any:
    """Imports a public name.

    Raises:
        AttributeError: the folder has no such public name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
