"""The shared data module and its data sets."""

from robustclip.data.data_sets import DataSource
from robustclip.data.module import CLIPDataModule
from robustclip.data.sources.source import Opened, Source

__all__ = ["CLIPDataModule", "DataSource", "Opened", "Source"]
