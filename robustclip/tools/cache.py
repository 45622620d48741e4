"""``robustclip cache`` writes the frozen model's image embeddings, which training then reads in place of images."""

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
    """Settings of the feature cache.

    Args:
        views: number of augmented views of each training image, one per epoch; null takes the number of epochs of the
            run. The view without augmentation is always added.
        with_test: also caches the test sets and the sets of unknown classes.
        device: device of the model; ``auto`` takes a GPU if there is one.
        precision: precision of the model, ``fp32`` or ``bf16``; embeddings are stored in fp16.
        shard: number of the share of images that this process encodes, from 0.
        shards: number of shares. Processes with shares only encode; the command without shares then joins the parts.

    Raises:
        ValueError: a value is out of range.
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
    """A range of samples in one view of a set; it is encoded and stored as one part.

    Args:
        images: image set.
        view: number of the augmented view; None for the view without augmentation.
        begin: start of the range among the set's samples.
        positions: positions of the samples in the data set.
        pixels: transform of the view.
    """

    images: ImageSet
    view: int | None
    begin: int
    positions: Sequence[int]
    pixels: ToPixels

    @property
    def name(self) -> str:
        """Name of the part in the store."""
        return f"{self.images.name.replace('/', '-')}-{Path(file_name(self.view)).stem}-{self.begin}"


def cache(clip: CLIPModel, data: CLIPDataModule, settings: Settings, *, epochs: int | None, seed: int) -> None:
    """Writes the feature cache to the folder ``data.features``; the same command resumes an interrupted run.

    The files do not depend on interruptions or on the number of processes.

    Args:
        clip: the model before fine-tuning.
        data: data of the run.
        settings: settings of the cache.
        epochs: number of epochs of the run; None if the run has no fixed number.
        seed: seed of the run, which determines the augmentation.

    Raises:
        ValueError: ``data.features`` is null or exists, the unfinished work belongs to another model or other data, the
            data is remote, or the number of views is unknown.
    """
    out = _new_folder(data.features)
    data.features = None  # otherwise the data module would read features that do not exist yet
    for stage in ("fit", "test") if settings.with_test else ("fit",):
        data.setup(stage)
    views = _number_of_views(settings, epochs) if data.augmentation else 0
    encoder = Encoder(
        clip,
        batch_size=data.eval_batch_size,
        num_workers=data.num_workers,
        device=settings.device,
        precision=settings.precision,
    )
    origin = _origin(encoder, data, views, seed)
    pieces = [piece for images in data.image_sets for piece in _pieces(images, data.augmentation, views, seed)]
    own = pieces[settings.shard :: settings.shards]
    work = out.with_name(f"{out.name}.work")
    store = Store(work, origin | _identities(data.image_sets))
    label = f"{sum(len(piece.positions) for piece in own):,} images"
    for piece in display.progress(own, label):
        store.part(piece.name, partial(_encode, piece, encoder))
    if settings.shards > 1:
        sys.stdout.write(f"features of share {settings.shard} of {settings.shards} are in {work}\n")
        return
    _publish(store, pieces, out, origin, {images.name: images.identity for images in data.image_sets})
    shutil.rmtree(work)


def _new_folder(path: Path | None) -> Path:
    """Checks that ``data.features`` names a folder that does not exist yet."""
    if path is None:
        raise ValueError("data.features must name the folder to write, got null; give the same folder to fit")
    if path.exists():
        raise ValueError(f"data.features {str(path)!r} exists and is never overwritten; choose another folder")
    return path


def _number_of_views(settings: Settings, epochs: int | None) -> int:
    """Returns the number of augmented views of each training image, by default that of the epochs."""
    views = settings.views or epochs or 0
    if views < 1:
        raise ValueError(
            "views must be set because trainer.max_epochs is not; give one view per epoch, such as --views 30"
        )
    return views


def _origin(encoder: Encoder, data: CLIPDataModule, views: int, seed: int) -> dict[str, Any]:
    """Collects the settings that determine the embeddings."""
    clip, augmentation = encoder.clip, data.augmentation
    model = {name: getattr(clip, name) for name in ("arch", "pretrained", "fingerprint", "image_size")}
    return {
        "model": {**model, "width": encoder.width},
        "precision": encoder.precision,
        "augmentation": None if augmentation is None else asdict(augmentation),
        "augmentation_seed": seed,
        "views": views,
    }


def _identities(sets: Sequence[ImageSet]) -> dict[str, Any]:
    """Collects the identities and sample choices of the sets, under unique names."""
    by_set = {images.name: images.identity | {"choice of samples": digest(images.positions)} for images in sets}
    return {f"{key} of {name}": value for name, values in by_set.items() for key, value in values.items()}


def _pieces(images: ImageSet, augmentation: Augmentation | None, views: int, seed: int) -> Iterator[Piece]:
    """Yields the parts to encode: all views of a training set, only the plain view of other sets."""
    positions = images.positions
    for view in (None, *range(views if images.name == "train" else 0)):
        is_plain = view is None
        plain = images.transform
        pixels = plain if is_plain else training_pixels(plain, augmentation, seed)
        for begin in range(0, len(positions), IMAGES_PER_PART):
            yield Piece(images, view, begin, positions[begin : begin + IMAGES_PER_PART], pixels)


def _encode(piece: Piece, encoder: Encoder) -> Part:
    """Encodes records of ``id``, ``label`` and ``embedding``; samples that cannot be decoded are left out."""
    loader = ImageLoader(
        Images(piece.images.dataset, piece.pixels, piece.positions),
        skips_bad_samples=True,
        first_epoch=piece.view or 0,
        batch_size=encoder.batch_size,
        num_workers=encoder.num_workers,
        pin_memory=encoder.device != "cpu",
    )
    rows = np.zeros(len(piece.positions), [("id", "<i8"), ("label", "<i8"), ("embedding", "<f2", (encoder.width,))])
    end = 0
    for batch in loader:
        begin, end = end, end + len(batch.labels)
        rows["id"][begin:end], rows["label"][begin:end] = batch.index, batch.labels
        rows["embedding"][begin:end] = encoder.embeddings(batch.images).half().cpu()
    if not np.isfinite(rows["embedding"][:end]).all():
        raise ValueError(
            f"embeddings of {piece.images.name!r} exceed the range of fp16; train this model without a cache"
        )
    return rows[:end]


def _publish(
    store: Store, pieces: Sequence[Piece], out: Path, origin: dict[str, Any], identities: dict[str, dict[str, Any]]
) -> None:
    """Joins the parts to one file per set and view, and writes the manifest."""
    with atomic_folder(out) as aside:
        for name, identity in identities.items():
            own = [piece for piece in pieces if piece.images.name == name]
            identity |= _join(store, own, aside / name)
        versions = {name: version(name) for name in ("torch", "open_clip_torch", "numpy")}
        files = {str(path.relative_to(aside)): file_digest(path) for path in sorted(aside.rglob("*.npy"))}
        manifest = {**origin, "dtype": "float16", "sets": identities, "files": files, "versions": versions}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in out.rglob("*.npy"))
    count = sum(identity["samples"] for identity in identities.values())
    sys.stdout.write(f"embeddings of {count:,} images of {len(identities)} sets, {size / 1e6:,.1f} MB\n{out}\n")


def _join(store: Store, pieces: Sequence[Piece], folder: Path) -> dict[str, Any]:
    """Writes the files of a set; returns its number of samples and the ids of those that could not be decoded."""
    folder.mkdir(parents=True)
    for view in dict.fromkeys(piece.view for piece in pieces):
        parts = [store.read(piece.name) for piece in pieces if piece.view == view]
        ids = np.concatenate([part["id"] for part in parts])
        if not len(ids):
            raise ValueError(f"no image of {pieces[0].images.name!r} can be decoded, so it has no features")
        shape = (len(ids), *parts[0]["embedding"].shape[1:])
        joined = open_memmap(folder / file_name(view), "w+", np.float16, shape)
        np.concatenate([part["embedding"] for part in parts], out=joined)
        joined.flush()
        if view is None:
            np.save(folder / IDS, ids)
            np.save(folder / LABELS, np.concatenate([part["label"] for part in parts]))
    chosen = {position for piece in pieces for position in piece.positions}
    return {"samples": len(ids), "bad_samples": sorted(chosen - set(ids.tolist()))}
