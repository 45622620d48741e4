"""Computes features of images and texts by the zero-shot model, and stores them on disk in parts."""

import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from robustclip.data.decoding import DECODING_ERRORS
from robustclip.data.transforms import ToPixels
from robustclip.models.clip import CLIPModel
from robustclip.persistence import atomic_write
from robustclip.textfiles import read_text
from robustclip.tools.progress_log import check_same

Part = NDArray[np.void]
"""Array of records. A retrieval stores ``digest`` (of the image; 0 if unusable) and unit ``feature`` ``(D,)``, fp16."""

Load = Callable[[], Image.Image]
AHEAD = 2  # number of batches that are decoded in advance


class Encoder:
    """Zero-shot model with its preprocessing.

    Args:
        clip: model that computes the features; it is moved to ``device``.
        batch_size: number of images per batch.
        num_workers: number of threads that decode images.
        device: device of the model; ``auto`` takes a GPU if there is one.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, clip: CLIPModel, *, batch_size: int, num_workers: int, device: str, precision: str) -> None:
        has_gpu = device == "auto" and torch.cuda.is_available()
        self.device = "cuda" if has_gpu else device.replace("auto", "cpu")
        self.clip = clip.to(self.device).eval()
        self.batch_size, self.num_workers, self.precision = batch_size, num_workers, precision
        self.transform = ToPixels(clip.image_size)
        self.width = self.texts([["a"]]).shape[1]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the features."""
        return {
            "model": self.clip.fingerprint,
            "image_size": self.clip.image_size,
            "preprocessing": self.transform.description,
            "precision": self.precision,
        }

    def images(self, loads: Iterable[Load]) -> NDArray[np.float16]:
        """Computes unit features ``(N, D)``; an image that cannot be decoded gets zeros.

        Args:
            loads: functions that open one image each.
        """
        batches = [self._encode(batch) for batch in self._decoded(loads)]
        return np.concatenate(batches) if batches else np.zeros((0, self.width), np.float16)

    def texts(self, captions: Sequence[Sequence[str]]) -> NDArray[np.float16]:
        """Computes unit features ``(N, D)``: the normalised mean over each item's captions, zeros without captions.

        Args:
            captions: captions of each of N items.
        """
        counts = torch.tensor([len(texts) for texts in captions])
        flat = [text for texts in captions for text in texts]
        if not flat:
            return np.zeros((len(captions), self.width), np.float16)
        with torch.inference_mode(), self._autocast():
            features = self.clip.encode_text(flat).float().cpu()
        owners = torch.repeat_interleave(torch.arange(len(captions)), counts)
        sums = torch.zeros(len(captions), features.shape[1]).index_add_(0, owners, features)
        return F.normalize(sums, dim=-1).half().numpy()

    def embeddings(self, images: Tensor) -> Tensor:
        """Computes embeddings ``(B, D)``, not normalised, of images ``(B, 3, H, W)`` in [0, 1]."""
        with torch.inference_mode(), self._autocast():
            return self.clip.embed_image(images.to(self.device, non_blocking=True)).float()

    def _encode(self, pixels: Sequence[Tensor | None]) -> NDArray[np.float16]:
        good = {number: image for number, image in enumerate(pixels) if image is not None}
        features = np.zeros((len(pixels), self.width), np.float16)
        if good:
            embeddings = self.embeddings(torch.stack([*good.values()]))
            features[[*good]] = F.normalize(embeddings, dim=-1).half().cpu().numpy()
        return features

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")

    def _decoded(self, loads: Iterable[Load]) -> Iterator[list[Tensor | None]]:
        """Yields decoded batches in order. Threads suffice, since PIL releases the interpreter's lock."""
        with ThreadPoolExecutor(max(1, self.num_workers)) as threads:
            waiting: deque[list[Future[Tensor | None]]] = deque()
            rest = iter(loads)
            while batch := list(islice(rest, self.batch_size)):
                waiting.append([threads.submit(self._pixels, load) for load in batch])
                if len(waiting) > AHEAD:
                    yield [image.result() for image in waiting.popleft()]
            for last in waiting:
                yield [image.result() for image in last]

    def _pixels(self, load: Load) -> Tensor | None:
        try:
            return self.transform(load())
        except DECODING_ERRORS:
            return None


class Store:
    """Folder of parts, each of which is written as a whole or not at all.

    Args:
        folder: folder of the parts; parts of an interrupted run are reused.
        settings: settings that determine the parts.

    Raises:
        ValueError: the folder was written with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if path.is_file():
            check_same(folder, json.loads(read_text(path)), settings)
        else:
            atomic_write(path, json.dumps(settings, indent=2) + "\n")

    def part(self, name: str, make: Callable[[], Part]) -> Part:
        """Returns a part of the features, mapped into memory.

        Args:
            name: name of the part.
            make: computes the part if it does not exist yet.
        """
        if not self._path(name).is_file():
            content = io.BytesIO()
            np.save(content, make(), allow_pickle=False)
            atomic_write(self._path(name), content.getvalue())
        return self.read(name)

    def read(self, name: str) -> Part:
        """Reads a stored part of the features, mapped into memory."""
        part: Part = np.load(self._path(name), mmap_mode="r", allow_pickle=False)
        return part

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def records(digests: Sequence[int], features: NDArray[np.float16]) -> Part:
    """Builds a part from digests and features.

    Args:
        digests: ``(N,)`` digests of the images; an item with zero features gets digest 0.
        features: ``(N, D)`` unit features.
    """
    part = np.zeros(len(features), [("digest", "<u8"), ("feature", "<f2", (features.shape[1],))])
    part["digest"] = np.where(features.any(1), np.array(digests, np.uint64), 0)
    part["feature"] = features
    return part
