"""Reads image-text pairs from tar files in order, for pools of any size, and writes the chosen ones."""

import hashlib
import math
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.shardlists import expand_urls
from webdataset.writer import ShardWriter

from robustclip.data.decoding import open_image
from robustclip.data.sources.tar import IMAGE_TYPES, LABEL, TEXT, lines_of
from robustclip.data.sources.wds import REMOTE, list_shards, read_samples
from robustclip.paths import located

PAIRS_PER_SHARD = 10_000


class Pair(NamedTuple):
    """Image-text pair of a shard.

    Attributes:
        image: encoded image file.
        kind: file name extension of the image.
        text: captions, one per line.
    """

    image: bytes
    kind: str
    text: bytes

    @property
    def captions(self) -> list[str]:
        """Captions, stripped and without empty ones."""
        return lines_of(self.text)

    @property
    def stored_bytes(self) -> int:
        """Size in a tar file: both members have a header block and are padded to whole blocks."""
        return sum((1 + -(-len(data) // tarfile.BLOCKSIZE)) * tarfile.BLOCKSIZE for data in (self.image, self.text))

    def open(self) -> Image.Image:
        """Opens the image without decoding it."""
        return open_image(self.image)

    @property
    def digest(self) -> int:
        """64-bit hash of the image file, never 0; among three million images two collide with probability 2e-7."""
        return int.from_bytes(hashlib.blake2b(self.image, digest_size=8).digest(), "big") or 1


class Shard(NamedTuple):
    """Tar file of a pool.

    Attributes:
        url: URL of the file, also of a local one.
        size: size in bytes; None for a remote file.
    """

    url: str
    size: int | None

    @property
    def stem(self) -> str:
        """File name for the shard's features, unique to its URL and size."""
        digest = hashlib.blake2b(f"{self.url} {self.size}".encode(), digest_size=8).hexdigest()
        return f"{Path(self.url).stem[:40]}-{digest}"

    def pairs(self) -> Iterator[Pair]:
        """Reads the pairs in their order.

        Raises:
            ValueError: the archive is damaged or has another layout, see `read_samples`.
        """
        for sample in read_samples(self.url, needs=TEXT, loads=(*IMAGE_TYPES, LABEL, TEXT)):
            assert sample.text is not None
            yield Pair(sample.image.data, sample.image.kind, sample.text.data)


def pool_shards(pools: Iterable[str], root: str, split: str = "train") -> list[Shard]:
    """Lists the shards of several pools.

    Args:
        pools: ``wds:FOLDER-or-URL`` with ``train/{0..N-1}.tar``, or ``wds:`` and the shards, as in
            ``wds:cc3m/{00000..00331}.tar``.
        root: folder at which relative paths start.
        split: sub-folder of the shards.

    Raises:
        ValueError: there is no such pool, or a shard is missing.
    """
    shards = []
    for pool in pools:
        kind, _, location = pool.partition(":")
        if kind != "wds" or not location:
            raise ValueError(f"pool {pool!r} must be wds:FOLDER, wds:URL or wds:FOLDER/{{0..N}}.tar")
        location = located(location, root, "pool", REMOTE)
        urls = expand_urls(location) if location.endswith(".tar") else list_shards(location, split)
        shards += [_shard(url) for url in urls]
    return shards


def _shard(url: str) -> Shard:
    if url.startswith(REMOTE):
        return Shard(url, None)
    path = Path(url).absolute()
    if not path.is_file():
        raise ValueError(f"shard {url} of the pool is missing")
    return Shard(path.as_uri(), path.stat().st_size)


def read_chosen(
    shards: Sequence[Shard], digests: Sequence[NDArray[np.uint64]], chosen: NDArray[np.int64]
) -> Iterator[tuple[int, Pair]]:
    """Reads pairs by their position in the pool.

    Args:
        shards: shards of the pool.
        digests: digests of each shard's images, from when the features were computed.
        chosen: positions in ascending order.

    Yields:
        Position in the pool, and pair.

    Raises:
        ValueError: the images of a shard have changed since then.
    """
    begin = 0
    for shard, known in zip(shards, digests, strict=True):
        positions = set((chosen[(chosen >= begin) & (chosen < begin + len(known))] - begin).tolist())
        for position, pair in enumerate(islice(shard.pairs(), max(positions, default=-1) + 1)):
            if position in positions:
                if pair.digest != known[position]:
                    raise ValueError(
                        f"shard {shard.url} has changed since its features were computed; delete the cache"
                    )
                yield begin + position, pair
        begin += len(known)


def write_pairs(folder: Path, pairs: Iterable[tuple[int, Pair]]) -> None:
    """Writes numbered shards of pairs; equal pairs give equal files.

    Each key is made from the pair's number. A key of the pool could point outside the folder when shards are unpacked.

    Args:
        folder: folder to create.
        pairs: position in the pool, and pair.
    """
    folder.mkdir()
    pattern = f"{folder.absolute()}/".replace("%", "%%") + "%d.tar"
    plain: dict[str, Any] = {"encoder": False, "mtime": 0, "user": "", "group": "", "mode": 0o644}
    with ShardWriter(pattern, PAIRS_PER_SHARD, math.inf, verbose=0, **plain) as shards:
        for number, pair in pairs:
            shards.write({"__key__": f"c{number:09d}", pair.kind: pair.image, TEXT: pair.text})
        (folder / "nshards.txt").write_text(f"{shards.shard if shards.total else 0}\n", encoding="utf-8")
