"""Images in a text file of paths and labels."""

from collections import Counter
from pathlib import Path

from robustclip.data.sources.folder import SPLITS, ImageFiles
from robustclip.data.sources.source import LocatedSource, Opened
from robustclip.data.sources.wds import texts_beside
from robustclip.textfiles import read_text


class ListSource(LocatedSource):
    """Images in a text file of lines ``PATH LABEL``, such as DomainNet's ``list:real_{split}.txt``.

    ``{split}`` stands for the name of the split. Image paths start at the folder of the file; the folder of an image is
    the name of its class.
    """

    def open(self, split: str) -> Opened:
        """Reads the list of the split, the folders of all splits' classes, and class names that come with the data.

        Raises:
            ValueError: the file is missing or malformed, an image is missing or listed twice, or one label has two
                folders.
        """
        texts, file = texts_beside(str(Path(self.path).parent)), Path(self.path.replace("{split}", split))
        samples = _lines(file)
        others = {Path(self.path.replace("{split}", other)) for other in SPLITS} - {file}
        lists = {file: samples} | {other: _lines(other) for other in sorted(others) if other.is_file()}
        folders: dict[int, str] = {}
        for path, lines in lists.items():
            for image, label in lines:
                if (name := Path(image).parent.name) != folders.setdefault(label, name):
                    raise ValueError(f"list {path} has label {label} for {folders[label]!r} and for {name!r}")
        absent = [image for image, _ in samples if not Path(image).is_file()]
        if absent:
            raise ValueError(f"list {file} names {len(absent)} images that do not exist, the first {absent[0]}")
        if repeated := [image for image, count in Counter(image for image, _ in samples).items() if count > 1]:
            raise ValueError(f"list {file} names {len(repeated)} images more than once, the first {repeated[0]}")
        return Opened(ImageFiles(samples), folders=folders, **texts)


def _lines(file: Path) -> list[tuple[str, int]]:
    """Reads paths and labels of a list."""
    if not file.is_file():
        raise ValueError(f"list {file} is no file; it holds lines such as `real/zebra/1.jpg 344`")
    lines = [line.strip().rpartition(" ") for line in read_text(file).split("\n") if line.strip()]
    if bad := [line for line in lines if not line[0] or not line[2].isdecimal()]:
        raise ValueError(f"list {file} must hold lines `PATH LABEL`, found {''.join(bad[0])[:60]!r}")
    return [(str(file.parent / path.strip()), int(label)) for path, _, label in lines]
