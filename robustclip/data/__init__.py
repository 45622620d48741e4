"""The shared data module and its data sets."""

from robustclip.data.module import CLIPDataModule
from robustclip.data.sources.source import DataSource

__all__ = ["CLIPDataModule", "DataSource"]
