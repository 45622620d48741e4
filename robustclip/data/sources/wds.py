"""Image sets in the WebDataset layout of clip_benchmark, read from tar files that are never unpacked."""

from collections.abc import Container, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import unquote

from PIL import Image
from torch.utils.data import Dataset

from robustclip import textfiles
from robustclip.data.decoding import open_image
from robustclip.data.sources import tar
from robustclip.data.sources._remote import HttpFile
from robustclip.data.sources.source import LocatedSource, Opened
from robustclip.data.sources.tar import LABEL, MAX_TEXT_BYTES, TEXT, Sample
from robustclip.textfiles import check_printable

HTTP = ("http://", "https://")
REMOTE = (*HTTP, "file://")
MAX_SHARDS = 2_000_000  # DataComp's pool of 12.8 billion pairs has 1.28 million


class Shards(LocatedSource):
    """Tar files in the WebDataset layout, local or remote, such as ``wds:/my/shards`` or ``wds:https://host/set``."""

    schemes = REMOTE

    def open(self, split: str) -> Opened:
        """Indexes local shards, lists remote ones, and reads class names that come with them."""
        texts, urls = texts_beside(self.path), list_shards(self.path, split)
        if self.path.startswith(REMOTE):
            return Opened(None, tuple(urls), **texts)
        return Opened(IndexedShards([Path(url) for url in urls]), **texts)


class Place(NamedTuple):
    """The place of one sample in a set of shards; it is flat, since ImageNet has 1.3 million samples.

    Attributes:
        shard: number of the shard.
        key: key of the sample.
        offset: offset of the image in the shard, in bytes.
        size: size of the image in bytes.
        text: offset and size of the captions; None without captions.
    """

    shard: int
    key: str
    offset: int
    size: int
    text: tuple[int, int] | None


class IndexedShards(Dataset[tuple[Image.Image, int]]):
    """Images of local tar files with labels or captions, read at random by offset.

    Args:
        shards: tar files with ``KEY.(jpg|png|webp|...)`` and ``KEY.cls``, or with ``KEY.txt``, one caption a line;
            samples are numbered in this order.
        is_labelled: whether every image must have a label, or else captions.

    Raises:
        ValueError: as `read_samples`.
    """

    def __init__(self, shards: list[Path], *, is_labelled: bool = True) -> None:
        self.shards = shards
        needs = LABEL if is_labelled else TEXT
        self._places: list[Place] = []
        self.labels: list[int] = []
        for number, shard in enumerate(shards):
            for key, image, label, text in read_samples(str(shard), needs=needs, loads=(LABEL,)):
                captions = None if text is None else (text.offset, text.size)
                self._places.append(Place(number, key, image.offset, image.size, captions))
                self.labels.append(label)
        self.has_captions = any(place.text is not None for place in self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.encoded(index)), self.labels[index]

    def encoded(self, index: int) -> bytes:
        """Returns the bytes of one image file."""
        place = self._places[index]
        return self._read(place.shard, place.offset, place.size)

    def captions(self, index: int) -> list[str]:
        """Returns the captions of one image; empty without a ``.txt``."""
        place = self._places[index]
        return [] if place.text is None else tar.lines_of(self._read(place.shard, *place.text))

    def where(self, index: int) -> str:
        """Returns shard and key of a sample, for messages."""
        place = self._places[index]
        return f"{self.shards[place.shard]} key {place.key!r}"

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        with self.shards[shard].open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ValueError(f"shard {self.shards[shard]} has changed since it was opened; start again")
        return data


def read_samples(shard: str, *, needs: str, loads: Container[str]) -> Iterator[Sample]:
    """Reads the samples of a shard in their order, whether it is local or remote.

    Args:
        shard: path or URL.
        needs: extension that every sample has in addition to its image, `tar.LABEL` or `tar.TEXT`.
        loads: extensions of the members whose data are loaded; labels must be among them.

    Raises:
        ValueError: the shard is missing, cannot be read, is damaged or cut short, or has anything but files of complete
            samples.
    """
    try:
        with _opened(shard) as file:
            yield from tar.read_samples(file, shard, needs=needs, loads=loads)
    except OSError as error:
        raise ValueError(f"shard {shard} cannot be read: {error}") from error


def _opened(place: str) -> AbstractContextManager[tar.Readable]:
    if place.startswith(HTTP):
        return HttpFile(place)
    path = _local(place)
    if not path.is_file():
        raise ValueError(f"shard {place} is missing, or is no file; see how many nshards.txt counts")
    return path.open("rb")


def _local(place: str) -> Path:
    """Converts a local path, which may be written as a URL."""
    if not place.startswith("file://"):
        return Path(place)
    path = unquote(place.removeprefix("file://").removeprefix("localhost"))
    if not path.startswith("/"):
        raise ValueError(f"{place!r} names a host or a relative path; a local URL is written file:///PATH")
    return Path(path)


def list_shards(location: str, split: str) -> list[str]:
    """Lists paths or URLs of a split's shards: ``LOCATION/SPLIT/{0..N-1}.tar`` with N from ``nshards.txt``.

    Args:
        location: folder or URL of the data set.
        split: name of the split.

    Raises:
        ValueError: the folder or the split does not exist, ``nshards.txt`` is not a count, or a local folder has other
            tar files.
    """
    base = f"{location.rstrip('/')}/{split}"
    if not location.startswith(REMOTE) and not Path(base).is_dir():
        splits = sorted({path.parent.name for path in Path(location).glob("*/*.tar")})
        remedy = f"its splits are {splits}" if splits else "no such data set; check the path and `root`"
        raise ValueError(f"no shards in {base}: {remedy}")
    count = read_text(f"{base}/nshards.txt")
    if count is None:
        raise ValueError(f"{base} has no nshards.txt, which holds the number of shards")
    digits = count.strip()
    if not digits.isdecimal() or len(digits) > 8 or not 0 < int(digits) <= MAX_SHARDS:
        raise ValueError(f"{base}/nshards.txt must hold the number of shards, found {digits[:20]!r}")
    names = [f"{number}.tar" for number in range(int(digits))]
    if not base.startswith(HTTP) and (others := {path.name for path in _local(base).glob("*.tar")} - set(names)):
        raise ValueError(f"{base} has tar files that its nshards.txt, {digits}, does not count: {sorted(others)[:3]}")
    return [f"{base}/{name}" for name in names]


def read_lines(location: str, name: str) -> list[str] | None:
    """Reads the lines of a text file that comes with the data, such as ``classnames.txt``; None without such a file.

    Args:
        location: folder or URL of the data set.
        name: name of the file in it.

    Raises:
        ValueError: the file has another encoding, an empty line between others, or a control character.
    """
    path = f"{location.rstrip('/')}/{name}"
    text = read_text(path)
    if text is None:
        return None
    lines = [line.strip(" \t\xa0") for line in text.rstrip().split("\n")]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(f"{path} line {number} is empty; every line must hold a name, since labels count lines")
        check_printable(line, f"{path} line {number}")
    return lines


def texts_beside(location: str) -> dict[str, Any]:
    """Reads class names and templates that come with the data, as arguments of `Opened`; None without such a file."""
    names = read_lines(location, "classnames.txt")
    templates = read_lines(location, "zeroshot_classification_templates.txt")
    return {"names": names, "templates": templates and [template.replace("{c}", "{}") for template in templates]}


def read_text(path: str) -> str | None:
    """Reads a small local or remote text file; None if there is no such file.

    Raises:
        ValueError: the file has another encoding, cannot be read, or is too large for text.
    """
    if not path.startswith(HTTP):
        local = _local(path)
        return textfiles.read_text(local) if local.is_file() else None
    try:
        with HttpFile(path, is_first_contact=True) as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except ValueError as error:
        if isinstance(error.__cause__, HTTPError) and error.__cause__.code == 404:
            return None
        raise
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{path} has more than {MAX_TEXT_BYTES} bytes; expected a small text file")
    return textfiles.decode_text(content, path)
