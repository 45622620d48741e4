"""Image-text pairs in tar files: reading pools of any size from front to back, writing the chosen ones."""

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
    """One image as it lies in the shard, and its text.

    Attributes:
        image: encoded.
        kind: extension of the image.
        text: captions, one a line.
    """

    image: bytes
    kind: str
    text: bytes

    @property
    def captions(self) -> list[str]:
        """Stripped, without empty ones."""
        lines = self.text.decode(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]

    @property
    def stored_bytes(self) -> int:
        """In a tar file: a block of header before each, padded to whole blocks."""
        return sum((1 + -(-len(data) // tarfile.BLOCKSIZE)) * tarfile.BLOCKSIZE for data in (self.image, self.text))

    def open(self) -> Image.Image:
        """The image, not yet decoded."""
        return open_image(self.image)

    @property
    def digest(self) -> int:
        """64 bits that tell images apart, never 0; two of three million collide with probability 2e-7."""
        return int.from_bytes(hashlib.blake2b(self.image, digest_size=8).digest(), "big") or 1


class Shard(NamedTuple):
    """One tar file of a pool.

    Attributes:
        url: of the file, local ones too.
        size: in bytes; None for a remote one.
    """

    url: str
    size: int | None

    @property
    def stem(self) -> str:
        """A file name of its own, by place and size."""
        digest = hashlib.blake2b(f"{self.url} {self.size}".encode(), digest_size=8).hexdigest()
        return f"{Path(self.url).stem[:40]}-{digest}"

    def pairs(self) -> Iterator[Pair]:
        """Reads the pairs in their order.

        Raises:
            ValueError: as `read_samples`.
        """
        for sample in read_samples(self.url, needs=TEXT, loads=(*IMAGE_TYPES, LABEL, TEXT)):
            assert sample.text is not None
            yield Pair(sample.image.data, sample.image.kind, sample.text.data)


def pool_shards(pools: Iterable[str], root: str, split: str = "train") -> list[Shard]:
    """The shards of several pools.

    Args:
        pools: ``wds:FOLDER-or-URL`` with ``train/{0..N-1}.tar``, or ``wds:`` and the shards, as in
            ``wds:cc3m/{00000..00331}.tar``.
        root: relative paths start here.
        split: sub-folder of the shards.

    Raises:
        ValueError: no such pool, or a shard is missing.
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
        shards: of the pool.
        digests: of each shard's images.
        chosen: rising positions.

    Raises:
        ValueError: a shard holds other images than it did.
    """
    begin = 0
    for shard, known in zip(shards, digests, strict=True):
        wanted = set((chosen[(chosen >= begin) & (chosen < begin + len(known))] - begin).tolist())
        for position, pair in enumerate(islice(shard.pairs(), max(wanted, default=-1) + 1)):
            if position in wanted:
                if pair.digest != known[position]:
                    raise ValueError(f"shard {shard.url} has changed since its features were made; delete the cache")
                yield begin + position, pair
        begin += len(known)


def write_pairs(folder: Path, pairs: Iterable[tuple[int, Pair]]) -> int:
    """Writes shards, named by number, of samples named by theirs; returns how many samples.

    Keys are ours alone: those of a pool could lead out of the folder where the shards are unpacked.
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
