"""Image sets in the WebDataset layout of clip_benchmark, read where they lie: nothing is unpacked or held in memory."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast
from urllib.error import HTTPError
from urllib.request import urlopen

from PIL import Image
from torch.utils.data import Dataset

from robustclip.data.decoding import open_image

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
REMOTE = ("http://", "https://", "file://")
TIMEOUT_SECONDS = 60


class Member(NamedTuple):
    """Where one sample lies in a tar file."""

    shard: int
    key: str
    offset: int
    size: int
    label: int  # -1 for none
    text: tuple[int, int] | None  # offset and size of the captions


class IndexedShards(Dataset[tuple[Image.Image, int]]):
    """Labelled images of local tar files, or images with captions, read at random by offset.

    Args:
        shards: tar files with ``KEY.(jpg|png|webp|...)`` and ``KEY.cls``, or with ``KEY.txt``, one caption a line;
            samples are numbered in this order.
        is_labelled: every image must have a label; otherwise, captions.

    Raises:
        ValueError: a shard that is missing, cut short or no tar file, a sample without its label or captions.
    """

    def __init__(self, shards: list[Path], *, is_labelled: bool = True) -> None:
        self.shards = shards
        members = (member for number, shard in enumerate(shards) for member in _scan(number, shard))
        self._members = [_checked(member, shards, is_labelled) for member in members]
        self.labels = [member.label for member in self._members]
        self.has_captions = any(member.text is not None for member in self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        member = self._members[index]
        return open_image(self._read(member.shard, member.offset, member.size)), member.label

    def captions(self, index: int) -> list[str]:
        """Captions of one image; none where there is no ``.txt``."""
        member = self._members[index]
        if member.text is None:
            return []
        lines = self._read(member.shard, *member.text).decode("utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]

    def where(self, index: int) -> str:
        """Shard and key, for messages."""
        return f"{self.shards[self._members[index].shard]} key {self._members[index].key!r}"

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        with self.shards[shard].open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)


def _checked(member: Member, shards: list[Path], is_labelled: bool) -> Member:
    lacks = ".cls label" if is_labelled and member.label < 0 else ".txt captions"
    if (is_labelled and member.label < 0) or (not is_labelled and member.text is None):
        raise ValueError(f"shard {shards[member.shard]} key {member.key!r} has an image but no {lacks}")
    return member


def _scan(number: int, shard: Path) -> Iterator[Member]:
    if not shard.is_file():
        raise ValueError(f"shard {shard} is missing; the nshards.txt beside it counts it")
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                key, _, kind = entry.name.partition(".")
                end = entry.offset_data + entry.size
                if kind == "cls":
                    labels[key] = parse_label(
                        cast(IO[bytes], archive.extractfile(entry)).read(), f"{shard} key {key!r}"
                    )
                elif kind.lower() in IMAGE_TYPES:
                    images[key] = (entry.offset_data, entry.size)
                elif kind == "txt":
                    texts[key] = (entry.offset_data, entry.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"shard {shard} is no complete tar file: {error}; fetch it again") from error
    if end + tarfile.BLOCKSIZE > shard.stat().st_size:
        raise ValueError(f"shard {shard} is cut short: it has no end-of-archive block; fetch it again")
    for key, (offset, size) in images.items():
        yield Member(number, key, offset, size, labels.get(key, -1), texts.get(key))


def parse_label(data: bytes, where: str) -> int:
    """The number in a ``.cls`` file.

    Raises:
        ValueError: anything but a non-negative integer.
    """
    text = data.decode("ascii", errors="replace").strip()
    if not text.isdecimal():
        raise ValueError(f"{where} has the label {text[:20]!r}; expected a class number")
    return int(text)


def list_shards(location: str, split: str) -> list[str]:
    """Paths or URLs of a split's shards: ``LOCATION/SPLIT/{0..N-1}.tar`` with N from ``nshards.txt``.

    Raises:
        ValueError: no such folder or split, or an ``nshards.txt`` that is no count.
    """
    base = f"{location.rstrip('/')}/{split}"
    if not location.startswith(REMOTE) and not Path(base).is_dir():
        splits = sorted({path.parent.name for path in Path(location).glob("*/*.tar")})
        remedy = f"its splits are {splits}" if splits else "no such data set; check the path and `root`"
        raise ValueError(f"no shards in {base}: {remedy}")
    count = read_text(f"{base}/nshards.txt")
    if count is None:
        raise ValueError(f"{base} has no nshards.txt, which holds the number of shards")
    if not count.strip().isdecimal() or int(count) == 0:
        raise ValueError(f"{base}/nshards.txt must hold the number of shards, found {count.strip()[:20]!r}")
    return [f"{base}/{number}.tar" for number in range(int(count))]


def read_lines(location: str, name: str) -> list[str] | None:
    """Non-empty lines of a text file beside the shards, such as ``classnames.txt``; None where there is none."""
    text = read_text(f"{location.rstrip('/')}/{name}")
    return None if text is None else [line.strip() for line in text.splitlines() if line.strip()]


def read_text(path: str) -> str | None:
    """Content of a small local or remote file; None where there is none.

    Raises:
        ValueError: a remote file that cannot be asked for.
    """
    local = path.removeprefix("file://")
    if not local.startswith(REMOTE):
        return Path(local).read_text() if Path(local).is_file() else None
    try:
        with urlopen(path, timeout=TIMEOUT_SECONDS) as response:
            return cast(bytes, response.read()).decode()
    except HTTPError as error:
        if error.code == 404:
            return None
        raise ValueError(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}; check the address and the network") from error
