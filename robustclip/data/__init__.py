"""The shared data module and its data sets."""

from robustclip.data.module import CLIPDataModule
from robustclip.data.sources import DataSource

__all__ = ["CLIPDataModule", "DataSource"]
