"""The kinds of sources, each in a file of its own, by the prefix that a configuration writes."""

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
    "shapes": Shapes,
}
