"""Image sets in the WebDataset layout of clip_benchmark, read where they lie: nothing is unpacked or held in memory."""

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
from robustclip.data.sources.remote import HttpFile
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
        """Indexes local shards, lists remote ones, and reads class names beside them."""
        texts, urls = texts_beside(self.path), list_shards(self.path, split)
        if self.path.startswith(REMOTE):
            return Opened(None, tuple(urls), **texts)
        return Opened(IndexedShards([Path(url) for url in urls]), **texts)


class Place(NamedTuple):
    """Where one sample lies: number of the shard, key, and offset and size of image and captions.

    Flat, since ImageNet has 1.3 million of them.
    """

    shard: int
    key: str
    offset: int
    size: int
    text: tuple[int, int] | None

    @classmethod
    def of(cls, shard: int, sample: Sample) -> "Place":
        """The place of a sample in a shard of this number."""
        image, text = sample.image, sample.text
        return cls(shard, sample.key, image.offset, image.size, None if text is None else (text.offset, text.size))


class IndexedShards(Dataset[tuple[Image.Image, int]]):
    """Labelled images of local tar files, or images with captions, read at random by offset.

    Args:
        shards: tar files with ``KEY.(jpg|png|webp|...)`` and ``KEY.cls``, or with ``KEY.txt``, one caption a line;
            samples are numbered in this order.
        is_labelled: every image must have a label; otherwise, captions.

    Raises:
        ValueError: as `read_samples`.
    """

    def __init__(self, shards: list[Path], *, is_labelled: bool = True) -> None:
        self.shards = shards
        needs = LABEL if is_labelled else TEXT
        self._places: list[Place] = []
        self.labels: list[int] = []
        for number, shard in enumerate(shards):
            for sample in read_samples(str(shard), needs=needs, loads=(LABEL,)):
                self._places.append(Place.of(number, sample))
                self.labels.append(sample.label)
        self.has_captions = any(place.text is not None for place in self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.encoded(index)), self.labels[index]

    def encoded(self, index: int) -> bytes:
        """Bytes of one image as they lie in the shard."""
        place = self._places[index]
        return self._read(place.shard, place.offset, place.size)

    def captions(self, index: int) -> list[str]:
        """Captions of one image; none where there is no ``.txt``."""
        place = self._places[index]
        if place.text is None:
            return []
        lines = self._read(place.shard, *place.text).decode("utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]

    def where(self, index: int) -> str:
        """Shard and key, for messages."""
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
        needs: extension that every sample has beside its image, `tar.LABEL` or `tar.TEXT`.
        loads: extensions of the members whose data are loaded; labels must be among them.

    Raises:
        ValueError: the shard is missing, cannot be read, is damaged or cut short, or holds anything but files of whole
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
    """A local path, perhaps written as a URL."""
    if not place.startswith("file://"):
        return Path(place)
    path = unquote(place.removeprefix("file://").removeprefix("localhost"))
    if not path.startswith("/"):
        raise ValueError(f"{place!r} names a host or a relative path; a local URL is written file:///PATH")
    return Path(path)


def list_shards(location: str, split: str) -> list[str]:
    """Paths or URLs of a split's shards: ``LOCATION/SPLIT/{0..N-1}.tar`` with N from ``nshards.txt``.

    Raises:
        ValueError: no such folder or split, an ``nshards.txt`` that is no count, or, in a local folder, tar files that
            it does not count.
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
    """Lines of a text file beside the data, such as ``classnames.txt``; None if there is no such file.

    Args:
        location: folder or URL of the data set.
        name: name of the file in it.

    Raises:
        ValueError: another encoding, an empty line between others, or a line with a control character.
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
    """Class names and templates in text files beside the data, as `Opened` takes them; None without such a file."""
    names = read_lines(location, "classnames.txt")
    templates = read_lines(location, "zeroshot_classification_templates.txt")
    return {"names": names, "templates": templates and [each.replace("{c}", "{}") for each in templates]}


def read_text(path: str) -> str | None:
    """Content of a small local or remote file; None if there is no such file.

    Raises:
        ValueError: another encoding, or a remote file that cannot be read, or that is too large for text.
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
