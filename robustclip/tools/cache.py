"""``robustclip cache``: embeddings of a run's images by the frozen model, which training reads in their place."""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap

from robustclip import display
from robustclip.arguments import Count, CountOrZero, checked
from robustclip.data import CLIPDataModule
from robustclip.data.feature_cache import IDS, LABELS, MANIFEST, ImageSet, digest, file_digest, file_name
from robustclip.data.loader import ImageLoader
from robustclip.data.samples import Images
from robustclip.data.transforms import Augmentation, ToPixels, training_pixels
from robustclip.models.clip import CLIPModel
from robustclip.persistence import atomic_folder
from robustclip.tools.retrieval.encoder import Encoder, Part, Store

IMAGES_PER_PART = 4096


@checked
@dataclass(frozen=True)
class Settings:
    """What is kept, and how it is made.

    Args:
        views: augmented views of each training image, one for each epoch; null for as many as the run has epochs. The
            plain view comes beside them.
        with_test: keep the test sets and those of unknown classes too.
        device: of the model; ``auto`` takes a GPU if there is one.
        precision: of the model: ``fp32`` or ``bf16``; the disk has fp16 in either case.
        shard: which share of the images this process encodes, from 0.
        shards: number of shares; several only encode, and the command without them joins what they made.

    Raises:
        ValueError: a value that is none of these.
    """

    views: Count | None = None
    with_test: bool = False
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    shard: CountOrZero = 0
    shards: Count = 1

    def __post_init__(self) -> None:
        if self.shard >= self.shards:
            raise ValueError(f"shard must be in [0, {self.shards}), got {self.shard}; shards are numbered from 0")


@dataclass(frozen=True)
class Piece:
    """A stretch of one view of a set, which is made in one go.

    Args:
        images: of the set.
        view: number; None for the plain one.
        begin: of the stretch among the set's samples.
        positions: its samples.
        pixels: transform of the view.
    """

    images: ImageSet
    view: int | None
    begin: int
    positions: Sequence[int]
    pixels: ToPixels

    @property
    def name(self) -> str:
        """Of its part in the store."""
        return f"{self.images.name.replace('/', '-')}-{Path(file_name(self.view)).stem}-{self.begin}"


def cache(clip: CLIPModel, data: CLIPDataModule, settings: Settings, *, epochs: int | None, seed: int) -> None:
    """Writes the folder that ``data.features`` names; started again, it takes what is there.

    Batches are the same however the work is dealt out or interrupted, and so are the files.

    Args:
        clip: the model, before it is fine-tuned.
        data: of the run.
        settings: what, and how.
        epochs: of the run.
        seed: of the run, on which the augmentation depends.

    Raises:
        ValueError: no folder, one that exists or was begun for another model or other data, remote data, or no number
            of views.
    """
    out, data.features = data.features, None  # or the data would look for what is not there yet
    if out is None:
        raise ValueError("data.features must name the folder to write, got null; the run then reads it there")
    if out.exists():
        raise ValueError(f"features {str(out)!r} exist and are never overwritten; name another folder")
    for stage in ("fit", "test") if settings.with_test else ("fit",):
        data.setup(stage)
    views = (settings.views or epochs or 0) if data.augmentation else 0
    if data.augmentation and views < 1:
        raise ValueError("views must be set where `trainer.max_epochs` tells no number of epochs")
    encoder = _encoder(clip, data, settings)
    made = _made(encoder, data, views, seed)
    pieces = [piece for each in data.image_sets for piece in _pieces(each, data.augmentation, views, seed)]
    own = [piece for number, piece in enumerate(pieces) if number % settings.shards == settings.shard]
    work = out.with_name(f"{out.name}.work")
    store = Store(work, made | _told(data.image_sets))
    label = f"{sum(len(piece.positions) for piece in own):,} images"
    for piece in display.progress(own, label):
        store.part(piece.name, partial(_encode, piece, encoder))
    if settings.shards > 1:
        sys.stdout.write(f"features of share {settings.shard} of {settings.shards} are in {work}\n")
        return
    _publish(store, pieces, out, made, {each.name: each.identity for each in data.image_sets})
    shutil.rmtree(work)


def _encoder(clip: CLIPModel, data: CLIPDataModule, settings: Settings) -> Encoder:
    has_gpu = settings.device == "auto" and torch.cuda.is_available()
    return Encoder(
        clip,
        batch_size=data.eval_batch_size,
        num_workers=data.num_workers,
        device="cuda" if has_gpu else settings.device.replace("auto", "cpu"),
        precision=settings.precision,
    )


def _made(encoder: Encoder, data: CLIPDataModule, views: int, seed: int) -> dict[str, Any]:
    """How embeddings are made."""
    clip, augmentation = encoder.clip, data.augmentation
    model = {"arch": clip.arch, "pretrained": clip.pretrained, "fingerprint": clip.fingerprint}
    return {
        "model": {**model, "image_size": clip.image_size, "width": encoder.width},
        "precision": encoder.precision,
        "augmentation": None if augmentation is None else asdict(augmentation),
        "augmentation_seed": seed,
        "views": views,
    }


def _told(sets: Sequence[ImageSet]) -> dict[str, Any]:
    """What parts of the sets depend on, each with a name of its own."""
    told = {each.name: each.identity | {"choice of samples": digest(each.positions)} for each in sets}
    return {f"{key} of {name}": value for name, values in told.items() for key, value in values.items()}


def _pieces(images: ImageSet, augmentation: Augmentation | None, views: int, seed: int) -> Iterator[Piece]:
    """All views of a training set, the plain view of any other."""
    positions = images.positions
    for view in (None, *range(views if images.name == "train" else 0)):
        is_plain = view is None
        pixels = images.transform if is_plain else training_pixels(images.transform.size, augmentation, seed)
        for begin in range(0, len(positions), IMAGES_PER_PART):
            yield Piece(images, view, begin, positions[begin : begin + IMAGES_PER_PART], pixels)


def _encode(piece: Piece, encoder: Encoder) -> Part:
    """Records of ``id``, ``label`` and ``embedding``; samples that do not decode are left out."""
    loader = ImageLoader(
        Images(piece.images.dataset, piece.pixels, piece.positions),
        skips_bad_samples=True,
        first_epoch=piece.view or 0,
        batch_size=encoder.batch_size,
        num_workers=encoder.num_workers,
        pin_memory=encoder.device != "cpu",
    )
    found = np.zeros(len(piece.positions), [("id", "<i8"), ("label", "<i8"), ("embedding", "<f2", (encoder.width,))])
    end = 0
    for batch in loader:
        begin, end = end, end + len(batch.labels)
        found["id"][begin:end], found["label"][begin:end] = batch.index, batch.labels
        found["embedding"][begin:end] = encoder.embeddings(batch.images).half().cpu()
    if not np.isfinite(found["embedding"][:end]).all():
        raise ValueError(f"embeddings of {piece.images.name!r} exceed what fp16 holds, so this model has no cache")
    return found[:end]


def _publish(
    store: Store, pieces: Sequence[Piece], out: Path, made: dict[str, Any], identities: dict[str, dict[str, Any]]
) -> None:
    """Joins the parts to one file per set and view, and tells what is in them."""
    with atomic_folder(out) as aside:
        for name, identity in identities.items():
            own = [piece for piece in pieces if piece.images.name == name]
            identity |= _join(store, own, aside / name)
        versions = {name: version(name) for name in ("torch", "open_clip_torch", "numpy")}
        files = {str(path.relative_to(aside)): file_digest(path) for path in sorted(aside.rglob("*.npy"))}
        manifest = {**made, "dtype": "float16", "sets": identities, "files": files, "versions": versions}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*.npy"))
    count = sum(identity["samples"] for identity in identities.values())
    sys.stdout.write(f"embeddings of {count:,} images of {len(identities)} sets, {size / 1e6:,.1f} MB\n{out}\n")


def _join(store: Store, pieces: Sequence[Piece], folder: Path) -> dict[str, Any]:
    """Writes the files of a set; returns the number of its samples, and the ids of those that did not decode."""
    folder.mkdir(parents=True)
    for view in dict.fromkeys(piece.view for piece in pieces):
        parts = [store.read(piece.name) for piece in pieces if piece.view == view]
        ids = np.concatenate([part["id"] for part in parts])
        if not len(ids):
            raise ValueError(f"no image of {pieces[0].images.name!r} decodes, so it has no features")
        shape = (len(ids), *parts[0]["embedding"].shape[1:])
        joined = open_memmap(folder / file_name(view), "w+", np.float16, shape)
        np.concatenate([part["embedding"] for part in parts], out=joined)
        joined.flush()
        if view is None:
            np.save(folder / IDS, ids)
            np.save(folder / LABELS, np.concatenate([part["label"] for part in parts]))
    wanted = {position for piece in pieces for position in piece.positions}
    return {"samples": len(ids), "bad_samples": sorted(wanted - set(ids.tolist()))}
