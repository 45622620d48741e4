"""Captions of images by an image-to-text model of the Hugging Face library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robustclip.arguments import Count, CountOrZero, PositiveShare, checked
from robustclip.models.clip import fingerprint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@checked
@dataclass(frozen=True)
class Decoding:
    """How captions are made from an image; the defaults are common ones, the ARF paper tells none.

    Args:
        captions_per_image: the best beams, or as many draws.
        num_beams: of the beam search.
        max_new_tokens: of a caption.
        min_new_tokens: of a caption.
        top_p: draws from the smallest set of tokens with this probability, in place of the beam search.
        precision: ``fp32`` or ``bf16``.
        batch_size: of the captioner; the draws depend on it.
        seed: of the draws.

    Raises:
        ValueError: numbers that do not fit together.
    """

    captions_per_image: Count = 1
    num_beams: Count = 5
    max_new_tokens: Count = 30
    min_new_tokens: CountOrZero = 5
    top_p: PositiveShare | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: Count = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens must be in [0, {self.max_new_tokens}], got {self.min_new_tokens}")
        if self.top_p is None and self.captions_per_image > self.num_beams:
            counts = f"{self.captions_per_image} captions_per_image but {self.num_beams} num_beams"
            raise ValueError(f"a beam gives one caption, got {counts}; raise num_beams or set top_p")

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of transformers' ``generate``."""
        is_drawn = self.top_p is not None
        way = {"do_sample": True, "top_p": self.top_p, "top_k": 0} if is_drawn else {"do_sample": False}
        return way | {
            "num_beams": 1 if is_drawn else self.num_beams,
            "num_return_sequences": self.captions_per_image,
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "repetition_penalty": 1.0,
        }


class Captioner:
    """An image-to-text model of the Hugging Face library.

    Args:
        name: folder, or id on the hub.
        decoding: of the captions.
        device: of the model.

    Raises:
        ValueError: no such model, or none with its weights as safetensors; nothing that may hold code is loaded.
    """

    def __init__(self, name: str, decoding: Decoding, device: str) -> None:
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise ValueError("captions need transformers: pip install 'robustclip[captions]'") from error
        processors: Any = AutoProcessor  # typed in part only
        models: Any = AutoModelForImageTextToText
        is_local = Path(name).is_dir()
        has_gpu = device == "auto" and torch.cuda.is_available()
        self.decoding, self.device = decoding, "cuda" if has_gpu else device.replace("auto", "cpu")
        try:
            self.processor = processors.from_pretrained(name, local_files_only=is_local)
            self.model = models.from_pretrained(
                name, local_files_only=is_local, use_safetensors=True, dtype=DTYPES[decoding.precision]
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"captioner {name!r} does not load: {' '.join(str(error).split())}") from error
        self.model.to(self.device).eval()
        self.fingerprint = fingerprint(self.model)

    def __call__(self, pixels: Tensor, seed: int) -> list[list[str]]:
        """Captions of each image, stripped, without empty ones.

        Args:
            pixels: ``(B, 3, H, W)`` as the processor makes them.
            seed: of the draws.
        """
        devices = [self.device] if self.device.startswith("cuda") else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            tokens = self.model.generate(
                pixel_values=pixels.to(self.device, DTYPES[self.decoding.precision]), **self.decoding.options
            )
        texts = [" ".join(text.split()) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
        per_image = self.decoding.captions_per_image
        return [[text for text in texts[at : at + per_image] if text] for at in range(0, len(texts), per_image)]
