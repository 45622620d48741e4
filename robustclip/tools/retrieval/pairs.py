"""Reads image-text pairs from tar files in order, for pools of any size, and writes the chosen ones."""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.shardlists import expand_urls

from robustclip.data.decoding import open_image
from robustclip.data.sources.tar import IMAGE_TYPES, LABEL, TEXT
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
        lines = self.text.decode(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]

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
    return [_shard(url) for pool in pools for url in _urls(pool, root, split)]


def _urls(pool: str, root: str, split: str) -> list[str]:
    kind, _, location = pool.partition(":")
    if kind != "wds" or not location:
        raise ValueError(f"pool {pool!r} must be wds:FOLDER, wds:URL or wds:FOLDER/{{0..N}}.tar")
    location = located(location, root, "pool", REMOTE)
    return list(expand_urls(location)) if location.endswith(".tar") else list_shards(location, split)


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


def write_pairs(folder: Path, pairs: Iterable[tuple[int, Pair]]) -> int:
    """Writes numbered shards of pairs, and returns the number of pairs.

    Each key is made from the pair's number. A key of the pool could point outside the folder when shards are unpacked.

    Args:
        folder: folder to create.
        pairs: position in the pool, and pair.
    """
    folder.mkdir()
    shards, archive = 0, None
    count = 0
    for number, pair in pairs:
        if count % PAIRS_PER_SHARD == 0:
            if archive is not None:
                archive.close()
            archive, shards = tarfile.open(folder / f"{shards}.tar", "w"), shards + 1  # noqa: SIM115
        assert archive is not None
        for kind, data in ((pair.kind, pair.image), ("txt", pair.text)):
            entry = tarfile.TarInfo(f"c{number:09d}.{kind}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        count += 1
    if archive is not None:
        archive.close()
    (folder / "nshards.txt").write_text(f"{shards}\n", encoding="utf-8")
    return count
