"""Images in a text file of paths and labels."""

from collections import Counter
from pathlib import Path

from robustclip.data.sources.folder import SPLITS, ImageFiles
from robustclip.data.sources.source import LocatedSource, Opened
from robustclip.data.sources.wds import texts_beside
from robustclip.textfiles import read_text


class ListSource(LocatedSource):
    """Images by a text file of lines ``PATH LABEL``, such as ``list:real_{split}.txt``."""

    def open(self, split: str) -> Opened:
        """Reads the list of the split, and class names beside it."""
        texts, (dataset, folders) = texts_beside(str(Path(self.path).parent)), read_list(self.path, split)
        return Opened(dataset, folders=folders, **texts)


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
