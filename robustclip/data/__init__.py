"""The shared data module, its data sets, and the contract of data sources."""

from robustclip.data.data_source import DataSource
from robustclip.data.module import CLIPDataModule
from robustclip.data.sources.source import Opened, Source

__all__ = ["CLIPDataModule", "DataSource", "Opened", "Source"]
