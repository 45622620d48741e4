"""The kinds of data sources, by their prefix in a configuration."""

from robustclip.data.sources.arrays import ArraySource
from robustclip.data.sources.folder import Folder
from robustclip.data.sources.list import ListSource
from robustclip.data.sources.shapes import Shapes
from robustclip.data.sources.source import LocatedSource
from robustclip.data.sources.torchvision import Torchvision
from robustclip.data.sources.wds import Shards

KINDS: dict[str, type[LocatedSource]] = {
    "wds": Shards,
    "torchvision": Torchvision,
    "folder": Folder,
    "list": ListSource,
    "npy": ArraySource,
    "shapes": Shapes,
}
