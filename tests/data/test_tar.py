"""Archives in every state: both readers give the same samples, all of them, or both refuse in one line."""

import io
import signal
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tarfile import BLOCKSIZE, RECORDSIZE
from types import FrameType
from typing import Any, NamedTuple

import pytest
from helpers import ShardWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from robustclip.data.anchors import CaptionedImages
from robustclip.data.sources.streams import read_shard
from robustclip.data.sources.wds import IndexedShards, list_shards
from robustclip.data.transforms import ToPixels
from robustclip.tools.retrieval.pairs import pool_shards

SECONDS_PER_CASE = 5
Members = Sequence[tuple[str, bytes]]
Samples = list[tuple[str, bytes, int]]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "png")
    return buffer.getvalue()


RED, GREEN, BLUE = png((255, 0, 0)), png((0, 255, 0)), png((0, 0, 255))


def three(prefix: str = "", kind: str = "png") -> list[tuple[str, bytes]]:
    """Three samples, each an image and its label."""
    images = zip((RED, GREEN, BLUE), range(3), strict=True)
    return [
        each
        for data, label in images
        for each in ((f"{prefix}s{label}.{kind}", data), (f"{prefix}s{label}.cls", str(label).encode()))
    ]


def archive(members: Members, *, layout: int = tarfile.GNU_FORMAT, mtime: float = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime  # type: ignore[assignment]  # a float makes a pax header
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(kind: bytes, name: str = "s1.png", *, size: int = 0, target: str = "s0.png") -> bytes:
    """Three samples, of whose second the image is no regular file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as file:
        for member, data in three():
            info = tarfile.TarInfo(name if member == "s1.png" else member)
            if member == "s1.png":
                info.type, info.size, info.linkname = kind, size, target
                file.addfile(info)
            else:
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@contextmanager
def time_limit() -> Iterator[None]:
    """Ends a reader that hangs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {SECONDS_PER_CASE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_place(path: Path) -> Samples:
    shards = IndexedShards([path])
    keys = [shards.where(index).split("key ")[1].strip("'") for index in range(len(shards))]
    return [(key, shards.encoded(index), shards.labels[index]) for index, key in enumerate(keys)]


def streamed(path: Path) -> Samples:
    return [
        (sample.where.split("key ")[1].strip("'"), sample.data, sample.label) for sample in read_shard(path.as_uri(), 0)
    ]


def outcome(read: Callable[[Path], Samples], path: Path) -> Samples | str:
    try:
        with time_limit():
            return read(path)
    except ValueError as error:
        line = str(error)
    assert str(path) in line
    assert "\n" not in line
    return line.replace("file://", "")


def both(folder: Path, content: bytes) -> Samples | str:
    """Samples, or the line with which both readers refuse."""
    path = folder / "0.tar"
    path.write_bytes(content)
    first, second = outcome(in_place, path), outcome(streamed, path)
    assert first == second
    return first


def samples(members: Members) -> Samples:
    """Each image with the label behind it; keys are names up to the first dot of their last part."""
    pairs = zip(members[::2], members[1::2], strict=True)
    return [(name.removeprefix("./").rsplit(".", 1)[0], data, int(label)) for (name, data), (_, label) in pairs]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "members",
    [
        three("./"),
        three("v1.0/"),
        [*three("a/"), *three("b.1/")],
        [*three("./"), *three("v1.0/"), *three("deep/er/")],
        three(kind="PNG"),
        three("é" * 40 + "/" + "x" * 90),
        [],
    ],
    ids=["dot", "folder_with_dot", "two_folders", "mixture", "capitals", "long", "empty"],
)
def test_every_member_is_read_whatever_its_folder(tmp_path: Path, members: Members, layout: str) -> None:
    if layout == "ustar" and members and len(members[0][0]) > 100:
        pytest.skip("ustar has no such names")
    assert both(tmp_path, archive(members, layout=FORMATS[layout])) == samples(members)


def test_names_and_times_in_pax_headers_are_read(tmp_path: Path) -> None:
    members = three("y" * 120 + "/")
    assert both(tmp_path, archive(members, layout=tarfile.PAX_FORMAT, mtime=1.5)) == samples(members)


def test_folders_metadata_and_other_members_of_a_sample_are_no_samples(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        extra = [("__shard__", b"{}"), *three("a/")[:2], ("a/s0.json", b"{}"), ("a/s0.mp4", bytes(3000))]
        for name, data in [*extra, *three("a/")[2:]]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    assert both(tmp_path, buffer.getvalue()) == samples(three("a/"))


def test_a_key_may_come_again_in_another_shard(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / f"{number}.tar").write_bytes(archive(three()))
    assert IndexedShards([tmp_path / "0.tar", tmp_path / "1.tar"]).labels == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([*three(), ("s9.gif", b"GIF"), ("s9.cls", b"0")], ["'s9'", "gif", "jpg, jpeg, png"]),
        ([*three(), ("s9.tiff", b"II"), ("s9.cls", b"0")], ["'s9'", "tiff"]),
        ([*three(), ("s9.seg.png", RED), ("s9.cls", b"0")], ["'s9'", "seg.png"]),
        ([("a.png", RED), ("a.cls", b"0"), ("a.1.png", RED), ("a.1.cls", b"1")], ["'a'", "1.png"]),
        ([("v1.0.a.png", RED), ("v1.0.a.cls", b"0")], ["'v1'", "0.a.png"]),
        ([*three(), ("s9.cls", b"0")], ["'s9'", "cls"]),
        ([("s9.cls", b"0"), *three()], ["'s9'", "cls"]),
        ([*three(), ("s9.png", RED)], ["'s9'", ".cls label", "png"]),
        ([*three(), ("s9.png", RED), ("s9.jpg", RED), ("s9.cls", b"0")], ["'s9'", "jpg", "png"]),
        ([*three(), ("s9.png", RED), ("s9.avif", RED), ("s9.cls", b"0")], ["'s9'", "avif", "png"]),
        ([*three(), ("s9.json", b"{}")], ["'s9'", "json"]),
        ([*three(), *three()[:2]], ["'s0'", "two places"]),
        ([*three(), *three("./")], ["'s0'", "two places"]),
        ([*three(), ("s9.png", RED), ("s9.png", BLUE), ("s9.cls", b"0")], ["'s9'", "two members .png"]),
        ([*three(), ("s9.png", RED), ("./s9.PNG", BLUE), ("s9.cls", b"0")], ["'s9'", "two members .png"]),
        ([*three(), ("s9.png", RED), ("s9.cls", b"0"), ("s9.cls", b"1")], ["'s9'", "two members .cls"]),
        ([*three()[::2], *three()[1::2]], ["'s0'", "needs"]),
        ([*three(), ("README", b"")], ["'README'", "KEY.EXTENSION"]),
        ([*three(), ("s9.", b"")], ["'s9.'", "KEY.EXTENSION"]),
        ([("._s0.png", b"Mac"), *three()], ["'._s0.png'", "KEY.EXTENSION"]),
        ([*three(), ("s9.png", RED), ("s9.cls", b"")], ["'s9'", "label"]),
        ([*three(), ("s9.png", RED), ("s9.cls", b"9" * 5000)], ["'s9'", "label"]),
    ],
    ids=str,
)
def test_members_that_are_no_sample_are_refused_by_name(tmp_path: Path, members: Members, words: list[str]) -> None:
    line = both(tmp_path, archive(members))
    assert isinstance(line, str)
    assert all(word in line for word in words)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "fifo"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"V", "tar type"),
    ],
)
@pytest.mark.parametrize("name", ["s1.png", "n" * 150 + ".png"])
def test_a_member_that_is_no_regular_file_is_refused_by_name(tmp_path: Path, kind: bytes, word: str, name: str) -> None:
    line = both(tmp_path, special(kind, name))
    assert word in line
    assert name[:90] in line


def test_a_sparse_member_in_pax_format_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("s0.png")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
        file.addfile(info)
    assert "GNU.sparse.major" in both(tmp_path, buffer.getvalue())


@pytest.mark.parametrize("keyword", ["path", "size"])
def test_a_pax_header_that_renames_all_members_is_refused(tmp_path: Path, keyword: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={keyword: "7"}) as file:
        file.addfile(tarfile.TarInfo("s0.png"))
    assert keyword in both(tmp_path, buffer.getvalue())


@pytest.mark.parametrize("size", [1 << 20, 1 << 29, (1 << 33) - 1, 1 << 40, 1 << 62, 1 << 64, (1 << 88) - 1, -1, -512])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_declared_size_beyond_the_file_is_refused(tmp_path: Path, size: int, kind: bytes) -> None:
    content = bytearray(archive(three()))
    declare(content, 0, size=size, kind=kind)
    assert isinstance(both(tmp_path, bytes(content)), str)


def declare(content: bytearray, offset: int, *, size: int, kind: bytes) -> None:
    """Writes size and type into a header, with the checksum that belongs to them."""
    octal = 0 <= size < 1 << 33
    content[offset + 124 : offset + 136] = b"%011o\0" % size if octal else coded(size)
    content[offset + 156 : offset + 157] = kind
    content[offset + 148 : offset + 156] = b" " * 8
    total = sum(content[offset : offset + BLOCKSIZE])
    content[offset + 148 : offset + 156] = b"%06o\0 " % total


def coded(number: int) -> bytes:
    """A number in GNU's format for those that octal digits cannot hold."""
    return (b"\x80" if number >= 0 else b"\xff") + number.to_bytes(11, "big", signed=number < 0)


def test_a_declared_size_takes_no_memory(tmp_path: Path) -> None:
    import tracemalloc

    content = bytearray(archive(three()))
    declare(content, 0, size=1 << 30, kind=tarfile.REGTYPE)
    tracemalloc.start()
    both(tmp_path, bytes(content))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_extension_headers_do_not_go_on_for_ever(tmp_path: Path) -> None:
    header = bytearray(archive([("././@LongLink", b"s0.png\0")])[: 2 * BLOCKSIZE])
    declare(header, 0, size=7, kind=tarfile.GNUTYPE_LONGNAME)
    assert "extension headers" in both(tmp_path, bytes(header) * 2000 + archive(three()))


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_an_archive_ends_with_one_empty_block_or_more(tmp_path: Path, blocks: int) -> None:
    content = archive(three()).rstrip(b"\0")
    content += bytes(-len(content) % BLOCKSIZE)
    assert both(tmp_path, content + bytes(blocks * BLOCKSIZE)) == samples(three())


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "byte 0"),
        (b"\x1f\x8b" + bytes(range(250)) * 4, "byte 0"),
        (archive(three())[:-RECORDSIZE], "damaged"),
        (archive(three()).rstrip(b"\0"), "damaged"),
        (archive(three()) + archive(three()), "followed by more data"),
        (archive(three()) + bytes(RECORDSIZE), "zeros follow"),
        (archive(three()[:2]) + bytes(1 << 24), "zeros follow"),
    ],
    ids=["nothing", "compressed", "no_record", "no_block", "two_archives", "one_more_record", "zeros"],
)
def test_an_end_that_may_hide_samples_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    line = both(tmp_path, content)
    assert isinstance(line, str)
    assert word in line


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_a_shard_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    import os

    (tmp_path / "0.tar").mkdir() if kind == "folder" else os.mkfifo(tmp_path / "0.tar")
    with time_limit(), pytest.raises(ValueError, match=r"0\.tar is missing, or is no file"):
        IndexedShards([tmp_path / "0.tar"])


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_shard_that_nobody_counts_is_refused(tmp_path: Path, write_shards: ShardWriter, prefix: str) -> None:
    base = write_shards(tmp_path, "set", "test", [1, 1])
    (base / "test" / "nshards.txt").write_text("1")
    with pytest.raises(ValueError, match=r"1, does not count: \['1\.tar'\]"):
        list_shards(f"{prefix}{base}", "test")


def test_a_folder_whose_name_needs_escapes_is_read(tmp_path: Path, write_shards: ShardWriter) -> None:
    base = write_shards(tmp_path, "a set #1 of 50%", "test", [2])
    for location in (str(base), base.as_uri()):
        (url,) = list_shards(location, "test")
        assert len(list(read_shard(url, 0))) == 2


PAIRS = [each for n in range(3) for each in ((f"p{n}.png", RED), (f"p{n}.txt", f"text {n}\n".encode()))]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([*PAIRS, ("p9.png", RED)], ["'p9'", ".txt caption"]),
        ([*PAIRS, ("p9.txt", b"a")], ["'p9'"]),
        ([*PAIRS, ("p9.gif", b"a"), ("p9.txt", b"a")], ["'p9'", "gif"]),
        ([*PAIRS, *PAIRS[:2]], ["'p0'", "two places"]),
        ([*PAIRS, ("p9.1.png", RED), ("p9.txt", b"a")], ["'p9'", "1.png"]),
    ],
)
def test_pairs_follow_the_same_rules_everywhere(tmp_path: Path, members: Members, words: list[str]) -> None:
    for split in ("train", "test"):
        (tmp_path / "pairs" / split).mkdir(parents=True)
        (tmp_path / "pairs" / split / "nshards.txt").write_text("1")
        (tmp_path / "pairs" / split / "0.tar").write_bytes(archive(members))
    readers: list[Callable[[], Any]] = [
        lambda: IndexedShards([tmp_path / "pairs" / "train" / "0.tar"], is_labelled=False),
        lambda: CaptionedImages(tmp_path / "pairs", ToPixels(4), batch_size=2),
        lambda: list(pool_shards(["wds:pairs"], str(tmp_path))[0].pairs()),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=r"0\.tar") as refused:
            read()
        assert all(word in str(refused.value) for word in words)


def test_pairs_are_the_same_in_place_and_streamed(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(archive(PAIRS))
    indexed = IndexedShards([tmp_path / "0.tar"], is_labelled=False)
    pairs = list(pool_shards([f"wds:{tmp_path}/0.tar"], ".")[0].pairs())
    assert (
        [pair.captions for pair in pairs]
        == [indexed.captions(n) for n in range(3)]
        == [["text 0"], ["text 1"], ["text 2"]]
    )


# Mutations of an archive. Tar has no checksum of data: there, a flipped bit may change an image or a digit, but neither
# the number of samples nor their keys.
ORIGINALS = {
    "ustar": archive(three(), layout=tarfile.USTAR_FORMAT),
    "gnu": archive(three("g" * 120 + "/"), layout=tarfile.GNU_FORMAT),
    "pax": archive(three("p" * 120 + "/"), layout=tarfile.PAX_FORMAT, mtime=1.5),
}
TRUTH = {"ustar": samples(three()), "gnu": samples(three("g" * 120 + "/")), "pax": samples(three("p" * 120 + "/"))}


def last_used(content: bytes) -> int:
    """Number of blocks up to the last that is not empty."""
    return -(-len(content.rstrip(b"\0")) // BLOCKSIZE)


def header_offsets(content: bytes) -> list[int]:
    """Offsets of blocks with a valid checksum, extension headers among them."""
    found = []
    for offset in range(0, len(content), BLOCKSIZE):
        try:
            tarfile.TarInfo.frombuf(content[offset : offset + BLOCKSIZE], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            continue
        found.append(offset)
    return found


class Case(NamedTuple):
    """Name of an original, kind of a mutation, and the content that it left."""

    name: str
    kind: str
    content: bytes

    def __repr__(self) -> str:
        return f"{self.name} {self.kind}, {len(self.content)} bytes of CRC {zlib.crc32(self.content)}"


@st.composite
def mutated(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(sorted(ORIGINALS)))
    content = bytearray(ORIGINALS[name])
    headers, used = header_offsets(content), last_used(content)
    kind = draw(st.sampled_from(["flip", "data", "cut", "hole", "repeat", "remove", "swap", "size", "type", "grow"]))
    block = st.integers(0, used - 1)
    if kind == "flip":
        bit = draw(st.sampled_from(headers)) * 8 + draw(st.integers(0, 8 * BLOCKSIZE - 1))
        content[bit // 8] ^= 1 << bit % 8
    elif kind == "data":
        position = draw(st.integers(0, used * BLOCKSIZE - 1))
        content[position] = draw(st.integers(0, 255))
    elif kind == "cut":
        del content[draw(st.integers(0, len(content) - 1)) :]
    elif kind == "hole":  # something is left behind it: zeros up to the end look like an end
        last = len(content.rstrip(b"\0")) - 1
        begin = draw(st.integers(0, last - 1))
        end = draw(st.integers(begin + 1, last))
        content[begin:end] = bytes(end - begin)
    elif kind in ("repeat", "remove"):
        begin, count = draw(block), draw(st.integers(1, 3))  # a sample has four blocks
        piece = content[begin * BLOCKSIZE : (begin + count) * BLOCKSIZE]
        content[begin * BLOCKSIZE : (begin + count) * BLOCKSIZE] = piece * 2 if kind == "repeat" else b""
    elif kind == "swap":
        first, second = draw(block) * BLOCKSIZE, draw(block) * BLOCKSIZE
        a, b = content[first : first + BLOCKSIZE], content[second : second + BLOCKSIZE]
        content[first : first + BLOCKSIZE], content[second : second + BLOCKSIZE] = b, a
    elif kind in ("size", "type"):
        sizes = st.one_of(st.integers(0, 1 << 33), st.integers(-(1 << 70), 1 << 87))
        types = st.sampled_from([bytes([value]) for value in b"\x001234567LKxgXSDMNV"])
        offset = draw(st.sampled_from(headers))
        size = int.from_bytes(content[offset + 124 : offset + 136]) if kind == "size" else 0
        size = draw(sizes) if kind == "size" else int(bytes(content[offset + 124 : offset + 135]), 8)
        declare(
            content, offset, size=size, kind=draw(types) if kind == "type" else content[offset + 156 : offset + 157]
        )
    else:
        content += draw(st.binary(max_size=3000)) + bytes(draw(st.integers(0, 30_000)))
    return Case(name, kind, bytes(content))


def check_mutated(folder: Path, case: Case) -> None:
    name, kind, content = case
    found, truth = both(folder, content), TRUTH[name]
    if isinstance(found, str):
        return
    # Bytes of an image or a digit may have changed, and samples their places.
    if kind in ("data", "swap", "hole", "size"):
        assert sorted(key for key, _, _ in found) == sorted(key for key, _, _ in truth)
    else:
        assert found == truth


RULES: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **RULES)
@given(case=mutated())
def test_a_mutated_archive_is_read_whole_by_both_readers_or_by_none(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    check_mutated(tmp_path_factory.getbasetemp(), case)


@pytest.mark.slow
@settings(max_examples=3000, **RULES)
@given(case=mutated())
def test_thousands_of_mutated_archives_are_read_whole_or_refused(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    check_mutated(tmp_path_factory.getbasetemp(), case)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_every_flipped_bit_in_a_header_is_noticed_or_harmless(tmp_path: Path, name: str) -> None:
    """All bits that one member has in its headers."""
    offsets = header_offsets(ORIGINALS[name])
    for offset in offsets[: len(offsets) // 6]:
        for bit in range(8 * BLOCKSIZE):
            content = bytearray(ORIGINALS[name])
            content[offset + bit // 8] ^= 1 << bit % 8
            found = both(tmp_path, bytes(content))
            assert isinstance(found, str) or found == TRUTH[name]


@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_every_cut_at_a_block_is_noticed_or_harmless(tmp_path: Path, name: str) -> None:
    for length in range(0, len(ORIGINALS[name]), 128):
        found = both(tmp_path, ORIGINALS[name][:length])
        is_whole = length >= last_used(ORIGINALS[name]) * BLOCKSIZE + BLOCKSIZE
        assert found == TRUTH[name] if is_whole else isinstance(found, str)
