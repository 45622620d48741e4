"""Images in files of their own: in a sub-folder per class, or in a list of paths and labels."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from robustclip.data.decoding import open_file
from robustclip.data.sources.folders import SPLITS
from robustclip.textfiles import read_text


class ImageFiles(Dataset[Any]):
    """Images by their paths.

    Args:
        samples: path and label of each.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = samples
        self.labels = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        return open_file(path), label

    def relabelled(self, labels: Mapping[int, int]) -> "ImageFiles":
        """The images of some labels, under new labels."""
        return ImageFiles([(path, labels[label]) for path, label in self.samples if label in labels])

    def where(self, index: int) -> str:
        """Path of an image, for messages."""
        return self.samples[index][0]


def read_list(location: str, split: str) -> tuple[ImageFiles, dict[int, str]]:
    """Read a text file of lines ``PATH LABEL``, such as DomainNet's; the folder of an image is the name of its class.

    Args:
        location: path of the file, with ``{split}`` in the place of the split's name; image paths start at its folder.
        split: name of the split.

    Returns:
        The images; names of classes by label, of the lists of all splits.

    Raises:
        ValueError: no such file, other lines, images that are missing or listed twice, one label for two folders.
    """
    file = Path(location.replace("{split}", split))
    samples = _lines(file)
    names: dict[int, str] = {}
    others = {Path(location.replace("{split}", other)) for other in SPLITS} - {file}
    for each in (file, *sorted(other for other in others if other.is_file())):
        for path, label in samples if each == file else _lines(each):
            if (name := Path(path).parent.name) != names.setdefault(label, name):
                raise ValueError(f"list {each} has label {label} for {names[label]!r} and for {name!r}")
    absent = [path for path, _ in samples if not Path(path).is_file()]
    if absent:
        raise ValueError(f"list {file} names {len(absent)} images that do not exist, the first {absent[0]}")
    if repeated := [path for path, count in Counter(path for path, _ in samples).items() if count > 1]:
        raise ValueError(f"list {file} names {len(repeated)} images more than once, the first {repeated[0]}")
    return ImageFiles(samples), names


def _lines(file: Path) -> list[tuple[str, int]]:
    if not file.is_file():
        raise ValueError(f"list {file} is no file; it holds lines such as `real/zebra/1.jpg 344`")
    lines = [line.strip().rpartition(" ") for line in read_text(file).split("\n") if line.strip()]
    if bad := [line for line in lines if not line[0] or not line[2].isdecimal()]:
        raise ValueError(f"list {file} must hold lines `PATH LABEL`, found {''.join(bad[0])[:60]!r}")
    return [(str(file.parent / path.strip()), int(label)) for path, _, label in lines]
