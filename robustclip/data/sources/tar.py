"""Reads the samples of tar files in the WebDataset layout, and refuses damaged files.

Members are named ``KEY.EXTENSION``. The key is the path up to the first dot of the file name, without a leading ``./``;
the extension is the rest, in lower case. Neighbouring members of one key form a sample.
"""

import io
import mimetypes
import posixpath
import re
import tarfile
from collections.abc import Container, Iterator
from functools import cache
from itertools import groupby
from tarfile import BLOCKSIZE, RECORDSIZE, TarInfo
from typing import NamedTuple, Protocol

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
LABEL, TEXT = "cls", "txt"
MAX_MEMBER_BYTES = 1 << 30  # the largest image that Pillow decodes, 2 * 89 million pixels, takes 0.7 GB as a bitmap
MAX_TEXT_BYTES = 1 << 24  # the 21,843 class names of ImageNet-21k take 0.6 MB
MAX_EXTENSIONS = 8  # extension headers before a member; GNU tar writes two, for a long name and a long link
CHUNK = 1 << 20
NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
EXTENSIONS = (*NAMES, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
TYPE_NAMES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a fifo",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
SPARSE, NAMING = re.compile(rb"\d (GNU\.sparse\.[a-z.]+)="), re.compile(rb"\d (path|size)=")
METADATA = re.compile(r"__[^/]*__(/|$)")  # WebDataset's names for the description of a whole shard


class Readable(Protocol):
    """A file that is read from front to back."""

    def read(self, size: int, /) -> bytes:
        """Reads this number of bytes, or fewer if the file ends before."""

    def seek(self, offset: int, /) -> int:
        """Moves forward to an offset from the file's start, which may be beyond its end."""


class Member(NamedTuple):
    """A regular file in an archive.

    Attributes:
        kind: extension in lower case.
        offset: offset of the content in the archive, in bytes.
        size: size of the content in bytes.
        data: content if it was loaded, else empty.
    """

    kind: str
    offset: int
    size: int
    data: bytes


class Sample(NamedTuple):
    """The members of one key.

    Attributes:
        key: path of the members up to the first dot of the file name.
        image: encoded image.
        label: class number; -1 without a label.
        text: captions; None without captions.
    """

    key: str
    image: Member
    label: int
    text: Member | None


def read_samples(file: Readable, shard: str, *, needs: str, loads: Container[str]) -> Iterator[Sample]:
    """Reads the samples of an archive in their order.

    Args:
        file: the archive, at its first byte.
        shard: path or URL, for messages.
        needs: extension that every sample has in addition to its image, `LABEL` or `TEXT`.
        loads: extensions of the members whose data are loaded; labels must be among them.

    Raises:
        ValueError: the archive is damaged, cut short, or has anything but files of complete samples.
    """
    seen: set[str] = set()
    for key, members in groupby(_members(file, shard, loads), key=lambda named: named[0]):
        if key in seen:
            apart = "has members in two places; write them one after the other, as `tar --sort=name` does"
            raise ValueError(f"shard {shard} key {key!r} {apart}")
        seen.add(key)
        sample: dict[str, Member] = {}
        for _, member in members:
            if member.kind in sample:
                raise ValueError(f"shard {shard} key {key!r} has two members .{member.kind}; remove one")
            sample[member.kind] = member
        yield _sample(key, sample, shard, needs)


def parse_label(data: bytes, where: str) -> int:
    """Parses the class number in a ``.cls`` file.

    Args:
        data: content of the file.
        where: shard and key, for messages.

    Raises:
        ValueError: the content is not a non-negative integer.
    """
    text = data.decode("ascii", errors="replace").strip()
    if not text.isdecimal() or len(text) > 9:
        raise ValueError(f"{where} has the label {text[:20]!r}; expected a class number")
    return int(text)


def lines_of(data: bytes) -> list[str]:
    """Returns the captions in a ``.txt`` file, one a line, stripped and without empty ones."""
    lines = data.decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _sample(key: str, members: dict[str, Member], shard: str, needs: str) -> Sample:
    images = [kind for kind in members if kind in IMAGE_TYPES]
    if len(images) != 1 or needs not in members or any(_is_ambiguous(kind) for kind in members):
        beside = "a .cls label" if needs == LABEL else "a .txt caption"
        rule = f"needs an image (one of {', '.join(IMAGE_TYPES)}) and {beside}, it has {sorted(members)}"
        raise ValueError(f"shard {shard} key {key!r} {rule}; a key is a member's name up to its first dot")
    where = f"shard {shard} key {key!r}"
    label = parse_label(members[LABEL].data, where) if LABEL in members else -1
    return Sample(key, members[images[0]], label, members.get(TEXT))


@cache
def _is_ambiguous(kind: str) -> bool:
    """Checks whether a member may belong to another sample, as ``a.1.png`` next to ``a.png``, or is a second image."""
    last = kind.rpartition(".")[2]
    if kind in (*IMAGE_TYPES, LABEL, TEXT):
        return False
    is_image = (mimetypes.guess_type(f"image.{last}")[0] or "").startswith("image/")
    return is_image or last in (*IMAGE_TYPES, LABEL, TEXT)


def _members(file: Readable, shard: str, loads: Container[str]) -> Iterator[tuple[str, Member]]:
    """Yields the key and the content of each regular file."""
    for info in _files(file, shard):
        if METADATA.match(info.name):
            continue
        folder, base = posixpath.split(posixpath.normpath(info.name))
        stem, _, kind = base.partition(".")
        kind = kind.lower()
        if not stem or not kind:
            raise ValueError(f"shard {shard} holds {info.name!r}, which is no KEY.EXTENSION; remove it from the shard")
        if info.size > (MAX_TEXT_BYTES if kind in (LABEL, TEXT) else MAX_MEMBER_BYTES):
            raise ValueError(f"shard {shard} member {info.name!r} is too large: its size is {info.size} bytes")
        data = _read(file, info.size) if kind in loads else b""
        if kind in loads and len(data) < info.size:
            raise _cut(shard, info)
        yield posixpath.join(folder, stem), Member(kind, info.offset_data, info.size, data)


def _files(file: Readable, shard: str) -> Iterator[TarInfo]:
    """Yields the headers of the regular files; ``file`` is then at the first byte of the content."""
    offset = 0
    while (info := _header(file, shard, offset)) is not None:
        offset = info.offset_data
        if info.isdir():
            continue
        if info.type not in REGULAR:
            kind = TYPE_NAMES.get(info.type, f"of the tar type {info.type!r}")
            raise ValueError(f"shard {shard} member {info.name!r} is {kind}; a shard must hold regular files only")
        if not 0 <= info.size <= MAX_MEMBER_BYTES:
            limit = f"a member must have between 0 and {MAX_MEMBER_BYTES} bytes"
            raise ValueError(f"shard {shard} member {info.name!r} declares {info.size} bytes; {limit}")
        yield info
        if info.size:
            offset += _padded(info.size)
            file.seek(offset - 1)
            if not file.read(1):
                raise _cut(shard, info)


def _header(file: Readable, shard: str, offset: int) -> TarInfo | None:
    """Reads the header of the next member with its extensions; None at the end of the archive, which is checked."""
    begin, blocks = offset, b""
    for _ in range(MAX_EXTENSIONS + 1):
        block = _read(file, BLOCKSIZE)
        if begin == offset and block == bytes(BLOCKSIZE):
            _check_end(file, shard, offset)
            return None
        try:
            info = TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            reason = str(error) if len(block) == BLOCKSIZE else "it is cut short, without an end-of-archive block"
            raise _damaged(shard, begin, reason) from error
        if info.type not in EXTENSIONS:
            is_extended = bool(blocks) and info.type in (*REGULAR, tarfile.DIRTYPE)
            info = _extended(blocks + block, shard, offset) if is_extended else info
            info.offset_data = begin + BLOCKSIZE
            return info
        if not 0 <= info.size <= MAX_TEXT_BYTES:
            raise _damaged(shard, begin, f"an extension header declares {info.size} bytes")
        payload = _read(file, _padded(info.size))
        if not _is_whole(info, payload):
            raise _damaged(shard, begin, "an extension header is cut short or longer than its content")
        named = NAMING.search(payload)
        if match := SPARSE.search(payload) or (info.type == tarfile.XGLTYPE and named):
            refused = f"the pax header {match[1].decode()} at byte {begin}"
            raise ValueError(f"shard {shard} has {refused}; a shard must hold regular files only")
        if info.type == tarfile.GNUTYPE_LONGNAME or named:  # the others state times, owners and targets of links
            blocks += block + payload
        begin += BLOCKSIZE + len(payload)
    raise _damaged(shard, offset, f"a member has more than {MAX_EXTENSIONS} extension headers")


def _is_whole(info: TarInfo, payload: bytes) -> bool:
    """Checks that an extension header has one name or pax records up to its declared size, and then zeros."""
    if info.type in NAMES:
        return len(payload) == _padded(info.size) and b"\0" not in payload.rstrip(b"\0")
    position = 0
    while position < info.size and (length := re.compile(rb"\d{1,9}(?= )").match(payload, position)):
        position += max(1, int(length[0]))
        if payload[position - 1 : position] != b"\n":
            return False
    return position == info.size and payload[position:] == bytes(_padded(info.size) - position)


def _extended(blocks: bytes, shard: str, offset: int) -> TarInfo:
    """Parses the header of a member with a long name or with attributes in pax format."""
    try:
        info = tarfile.TarFile(fileobj=io.BytesIO(blocks), encoding="utf-8", errors="surrogateescape").next()
    except (tarfile.TarError, ValueError, OSError) as error:
        raise _damaged(shard, offset, str(error)) from error
    if info is None:
        raise _damaged(shard, offset, "an extension header has no member")
    return info


def _check_end(file: Readable, shard: str, offset: int) -> None:
    """Checks that only zeros follow the first empty block, up to the end of the last record.

    One empty block suffices, since some writers omit the second.
    """
    end = _padded(offset + 2 * BLOCKSIZE, RECORDSIZE)
    rest = _read(file, end - offset - BLOCKSIZE + 1)
    if rest.strip(b"\0"):
        raise _damaged(shard, offset, "an empty block is followed by more data")
    if offset + BLOCKSIZE + len(rest) > end:
        reason = f"zeros follow beyond the record that ends at byte {end}, so that members may be lost"
        raise _damaged(shard, offset, reason)


def _read(file: Readable, size: int) -> bytes:
    """Reads up to ``size`` bytes in pieces, so that a wrong size in a header costs no memory."""
    parts = []
    while size and (part := file.read(min(size, CHUNK))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _padded(size: int, unit: int = BLOCKSIZE) -> int:
    return -(-size // unit) * unit


def _cut(shard: str, info: TarInfo) -> ValueError:
    return _damaged(shard, info.offset_data, f"it is cut short within {info.name!r}")


def _damaged(shard: str, offset: int, reason: str) -> ValueError:
    return ValueError(f"shard {shard} is damaged at byte {offset}: {reason}; fetch it again")
