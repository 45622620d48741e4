"""Features of images and texts by the zero-shot model, kept on the disk a part at a time."""

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
"""Records: in a retrieval of ``digest`` (of the image; 0: cannot be used) and unit ``feature`` ``(D,)`` in fp16."""

Load = Callable[[], Image.Image]
AHEAD = 2  # batches that are decoded while the model works


class Encoder:
    """The zero-shot model with its preprocessing.

    Args:
        clip: gives the features.
        batch_size: images per batch.
        num_workers: threads that decode.
        device: of the model.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, clip: CLIPModel, *, batch_size: int, num_workers: int, device: str, precision: str) -> None:
        self.clip = clip.to(device).eval()
        self.batch_size, self.num_workers, self.device, self.precision = batch_size, num_workers, device, precision
        self.transform = ToPixels(clip.image_size)
        self.width = self.texts([["a"]]).shape[1]

    @property
    def settings(self) -> dict[str, Any]:
        """What the features depend on."""
        return {
            "model": self.clip.fingerprint,
            "image_size": self.clip.image_size,
            "preprocessing": self.transform.description,
            "precision": self.precision,
        }

    def images(self, loads: Iterable[Load]) -> NDArray[np.float16]:
        """Unit features ``(N, D)``; zeros for an image that does not decode.

        Args:
            loads: each opens an image.
        """
        batches = [self._encode(batch) for batch in self._decoded(loads)]
        return np.concatenate(batches) if batches else np.zeros((0, self.width), np.float16)

    def texts(self, captions: Sequence[Sequence[str]]) -> NDArray[np.float16]:
        """Unit features ``(N, D)``, the normalised mean of each one's captions; zeros where there are none."""
        counts = torch.tensor([len(each) for each in captions])
        flat = [text for each in captions for text in each]
        if not flat:
            return np.zeros((len(captions), self.width), np.float16)
        with torch.inference_mode(), self._autocast():
            features = self.clip.encode_text(flat).float().cpu()
        owners = torch.repeat_interleave(torch.arange(len(captions)), counts)
        sums = torch.zeros(len(captions), features.shape[1]).index_add_(0, owners, features)
        return F.normalize(sums, dim=-1).half().numpy()

    def embeddings(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1] to embeddings ``(B, D)``, not normalised, on the model's device."""
        with torch.inference_mode(), self._autocast():
            return self.clip.embed_image(images.to(self.device, non_blocking=True)).float()

    def _encode(self, pixels: Sequence[Tensor | None]) -> NDArray[np.float16]:
        good = [number for number, each in enumerate(pixels) if each is not None]
        features = np.zeros((len(pixels), self.width), np.float16)
        if good:
            embeddings = self.embeddings(torch.stack([each for each in pixels if each is not None]))
            features[good] = F.normalize(embeddings, dim=-1).half().cpu().numpy()
        return features

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")

    def _decoded(self, loads: Iterable[Load]) -> Iterator[list[Tensor | None]]:
        """Batches, in order; PIL decodes without the interpreter's lock, so threads do."""
        with ThreadPoolExecutor(max(1, self.num_workers)) as threads:
            waiting: deque[list[Future[Tensor | None]]] = deque()
            rest = iter(loads)
            while batch := list(islice(rest, self.batch_size)):
                waiting.append([threads.submit(self._pixels, load) for load in batch])
                if len(waiting) > AHEAD:
                    yield [each.result() for each in waiting.popleft()]
            for last in waiting:
                yield [each.result() for each in last]

    def _pixels(self, load: Load) -> Tensor | None:
        try:
            return self.transform(load())
        except DECODING_ERRORS:
            return None


class Store:
    """Parts on the disk, each written whole or not at all.

    Args:
        folder: of the parts; may hold those of an earlier start.
        settings: of the encoder.

    Raises:
        ValueError: the folder belongs to another model or preprocessing.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        told = folder / "settings.json"
        if told.is_file():
            check_same(folder, json.loads(read_text(told)), settings)
        else:
            atomic_write(told, json.dumps(settings, indent=2) + "\n")

    def has(self, name: str) -> bool:
        """Whether a part is there."""
        return self._path(name).is_file()

    def part(self, name: str, make: Callable[[], Part]) -> Part:
        """A part, mapped into memory.

        Args:
            name: of the part.
            make: gives it, if it is not there yet.
        """
        if not self.has(name):
            content = io.BytesIO()
            np.save(content, make(), allow_pickle=False)
            atomic_write(self._path(name), content.getvalue())
        return self.read(name)

    def read(self, name: str) -> Part:
        """A part that is there, mapped into memory."""
        part: Part = np.load(self._path(name), mmap_mode="r", allow_pickle=False)
        return part

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def records(digests: Sequence[int], features: NDArray[np.float16]) -> Part:
    """A part of digests ``(N,)`` and features ``(N, D)``."""
    part = np.zeros(len(features), [("digest", "<u8"), ("feature", "<f2", (features.shape[1],))])
    part["digest"] = np.where(features.any(1), np.array(digests, np.uint64), 0)
    part["feature"] = features
    return part
