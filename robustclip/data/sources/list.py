"""Images in a text file of paths and labels, or in a table of paths, classes and captions."""

import csv
import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustclip.data.sources.folder import SPLITS, ImageFiles
from robustclip.data.sources.source import LocatedSource, Opened
from robustclip.data.sources.wds import texts_beside
from robustclip.names import excerpt
from robustclip.textfiles import read_text

log = logging.getLogger(__name__)
TABLES = (".csv", ".tsv")
COLUMNS = ("path", "label", "class", "caption")
Row = Mapping[str, str]


class CaptionedFiles(ImageFiles):
    """A data set of image files with captions.

    Args:
        samples: path and label of each image.
        captions: captions of each image by its path.
    """

    has_captions = True

    def __init__(self, samples: Sequence[tuple[str, int]], captions: Mapping[str, Sequence[str]]) -> None:
        super().__init__(samples)
        self._captions = captions

    def captions(self, index: int) -> Sequence[str]:
        """Returns the captions of one image; empty if it has none."""
        return self._captions[self.samples[index][0]]


class ListSource(LocatedSource):
    """Images in a text file of lines ``PATH LABEL``, such as DomainNet's ``list:real_{split}.txt``, or in a CSV file.

    ``{split}`` stands for the name of the split, and image paths start at the folder of the file. In a text file the
    folder of an image is the name of its class. A ``.csv`` or ``.tsv`` file begins with a line of column names:
    ``path``, ``class`` (a name) or ``label`` (a number from 0) or both, and perhaps ``caption``. An image with several
    captions has a line for each.
    """

    def open(self, split: str) -> Opened:
        """Reads the list of the split, the names of all splits' classes, and class names that come with the data.

        Raises:
            ValueError: the file is missing or malformed, an image is missing or listed twice, or one label has two
                names.
        """
        texts, file = texts_beside(str(Path(self.path).parent)), self._file(split)
        others = [self._file(other) for other in sorted(SPLITS) if self._file(other) != file]
        others = [path for path in dict.fromkeys(others) if path.is_file()]
        return _open_table(file, others, texts) if file.suffix.lower() in TABLES else _open_lines(file, others, texts)

    def _file(self, split: str) -> Path:
        return Path(self.path.replace("{split}", split))


def _open_lines(file: Path, others: Sequence[Path], texts: dict[str, Any]) -> Opened:
    samples = _lines(file)
    folders: dict[int, str] = {}
    for path, lines in {file: samples, **{other: _lines(other) for other in others}}.items():
        for image, label in lines:
            if (name := Path(image).parent.name) != folders.setdefault(label, name):
                raise ValueError(f"list {path} has label {label} for {folders[label]!r} and for {name!r}")
    _check_files(file, [(image, None) for image, _ in samples])
    return Opened(ImageFiles(samples), folders=folders, **texts)


def _lines(file: Path) -> list[tuple[str, int]]:
    """Reads paths and labels of a list."""
    if not file.is_file():
        raise ValueError(f"list {file} is no file; it holds lines such as `real/zebra/1.jpg 344`")
    lines = [line.strip().rpartition(" ") for line in read_text(file).split("\n") if line.strip()]
    if bad := [line for line in lines if not line[0] or not line[2].isdecimal()]:
        raise ValueError(
            f"list {file} must hold lines `PATH LABEL` with numbers from 0, found {''.join(bad[0])[:60]!r}; "
            "class names and captions need a .csv file with the first line `path,class,caption`"
        )
    return [(str(file.parent / path.strip()), int(label)) for path, _, label in lines]


def _open_table(file: Path, others: Sequence[Path], texts: dict[str, Any]) -> Opened:
    """Opens a CSV file; a class without an image in this split keeps its place if the list of another split has it."""
    rows = _rows(file)
    every = [*rows, *(row for other in others for row in _rows(other))]
    if unlike := [row for row in every if row.keys() != rows[0].keys()]:
        raise ValueError(
            f"lists {file} and {unlike[0]['list']} must have the same columns of {', '.join(COLUMNS)}; "
            f"they have {excerpt([*rows[0]][1:])} and {excerpt([*unlike[0]][1:])}"
        )
    if "label" not in rows[0]:
        keys = sorted({row["class"] for row in every})
        places = {key: place for place, key in enumerate(keys)}
        return Opened(_images(file, rows, [places[row["class"]] for row in rows]), keys=keys, **texts)
    names: dict[int, str] = {}
    for row in every:
        label, name = int(row["label"]), row.get("class", "")
        if name != names.setdefault(label, name):
            raise ValueError(f"list {row['list']} has label {label} for {names[label]!r} and for {name!r}")
    images = _images(file, rows, [int(row["label"]) for row in rows])
    return Opened(images, folders=dict(sorted(names.items())) if "class" in rows[0] else None, **texts)


def _images(file: Path, rows: Sequence[Row], labels: Sequence[int]) -> ImageFiles:
    """Makes the data set of a CSV file, in which an image with several captions has several lines."""
    of_image: dict[str, int] = {}
    for row, label in zip(rows, labels, strict=True):
        if label != of_image.setdefault(row["path"], label):
            raise ValueError(f"list {file} has {row['path']} in two classes; keep one of the lines")
    samples = [*of_image.items()]
    _check_files(file, [(row["path"], row.get("caption")) for row in rows])
    if "caption" not in rows[0]:
        return ImageFiles(samples)
    captions: dict[str, list[str]] = {path: [] for path in of_image}
    for row in rows:
        captions[row["path"]] += [row["caption"]] if row["caption"] else []
    return CaptionedFiles(samples, captions)


def _rows(file: Path) -> list[Row]:
    """Reads the lines of a CSV file, separated by commas, semicolons or tabs, as values by column.

    Each row begins with the name of its ``list``, for messages.
    """
    if not file.is_file():
        raise ValueError(
            f"list {file} is no file; it holds the line `path,class`, then lines such as `photos/1.jpg,cat`"
        )
    text = read_text(file)
    separator = next((character for character in ";\t" if character in text.partition("\n")[0]), ",")
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as error:
        raise ValueError(f"list {file} is no CSV file: {error} in line {reader.line_num}") from error
    header = [cell.casefold() for cell in lines[0][1]] if lines else []
    if "path" not in header or not {"label", "class"} & {*header} or len({*header}) < len(header):
        raise ValueError(
            f"list {file} must begin with a line of column names: `path`, `class` (a name) or `label` (a number), "
            f"and perhaps `caption`, found {excerpt(lines[0][1]) if lines else 'an empty file'}"
        )
    if len(lines) == 1:
        raise ValueError(f"list {file} has a line of column names and no image")
    if ignored := [name for name in header if name not in COLUMNS]:
        log.warning("list %s has columns that are not read: %s", file, excerpt(ignored))
    return [_row(file, line, header, cells) for line, cells in lines[1:]]


def _row(file: Path, line: int, header: Sequence[str], cells: Sequence[str]) -> Row:
    where = f"line {line} of list {file}"
    if len(cells) != len(header):
        raise ValueError(
            f"{where} has {len(cells)} values for {len(header)} columns; put texts that hold a separator in quotes"
        )
    row = {name: cell for name, cell in zip(header, cells, strict=True) if name in COLUMNS}
    if empty := [name for name, cell in row.items() if not cell and name != "caption"]:
        raise ValueError(f"{where} has no {empty[0]}")
    if not row.get("label", "0").isdecimal():
        raise ValueError(f"{where} must have a number from 0 as `label`, found {row['label']!r}; names are a `class`")
    return {"list": str(file), **row, "path": str(file.parent / row["path"])}


def _check_files(file: Path, images: Sequence[tuple[str, str | None]]) -> None:
    """Refuses a list with a missing image, or with an image and caption that occur twice."""
    if absent := [path for path, _ in images if not Path(path).is_file()]:
        remedy = "; paths have / and no \\" if "\\" in absent[0] else ""
        raise ValueError(f"list {file} names {len(absent)} images that do not exist, the first {absent[0]}{remedy}")
    if repeated := [path for (path, _), count in Counter(images).items() if count > 1]:
        raise ValueError(f"list {file} names {len(repeated)} images more than once, the first {repeated[0]}")
