"""Images that lie in files of their own: in a sub-folder per class, or in a list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from robustclip.data.decoding import open_file


class ImageFiles(Dataset[Any]):
    """Images by their paths.

    Args:
        samples: path and label of each.
        classes: names in label order; None where the folders' names are no words.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], classes: Sequence[str] | None) -> None:
        self.samples = samples
        self.labels = [label for _, label in samples]
        self.classes = None if classes is None else [name.replace("_", " ") for name in classes]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        return open_file(path), label

    def where(self, index: int) -> str:
        """Path of an image, for messages."""
        return self.samples[index][0]


def open_folder(location: str, split: str, published: Sequence[str]) -> ImageFiles:
    """A folder of one sub-folder per class, in the order of their names, or in that of the set as published.

    Args:
        location: the folder, perhaps of one folder per split.
        split: which of them.
        published: sub-folders in the order of the labels, in lower case; if any is there, the rest is left out.

    Raises:
        ValueError: no such folder, or a sub-folder without images.
    """
    from torchvision.datasets import ImageFolder

    folder = Path(location) / split if (Path(location) / split).is_dir() else Path(location)
    try:
        images = ImageFolder(str(folder))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"folder {folder} needs one sub-folder of images per class: {error}") from error
    labels = {name: label for label, name in enumerate(published)}
    if not labels.keys() & {name.lower() for name in images.classes}:
        return ImageFiles(images.samples, images.classes)
    named = ((path, images.classes[number].lower()) for path, number in images.samples)
    return ImageFiles([(path, labels[name]) for path, name in named if name in labels], None)


def open_list(location: str, split: str) -> ImageFiles:
    """A text file of lines ``PATH LABEL``, as of DomainNet; the folder of an image is the name of its class.

    Args:
        location: of the file, with ``{split}`` in the place of the split's name; paths start where it lies.
        split: which.

    Raises:
        ValueError: no such file, another kind of line, or one label for two folders.
    """
    file = Path(location.replace("{split}", split))
    if not file.is_file():
        raise ValueError(f"list {file} is no file; it holds lines such as `real/zebra/1.jpg 344`")
    lines = [line.rpartition(" ") for line in file.read_text().splitlines() if line.strip()]
    if bad := [line for line in lines if not line[0] or not line[2].isdecimal()]:
        raise ValueError(f"list {file} must hold lines `PATH LABEL`, found {''.join(bad[0])[:60]!r}")
    samples = [(str(file.parent / path), int(label)) for path, _, label in lines]
    names: dict[int, str] = {}
    for path, label in samples:
        if (name := Path(path).parent.name) != names.setdefault(label, name):
            raise ValueError(f"list {file} has label {label} for {names[label]!r} and for {name!r}")
    return ImageFiles(samples, [names.get(label, f"class {label}") for label in range(max(names, default=-1) + 1)])
