"""Captions images by an image-to-text model of the Hugging Face library."""

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
    """Settings of the caption search. The defaults are common values; the ARF paper states none.

    Args:
        captions_per_image: number of captions: the best beams, or random samples with ``top_p``.
        num_beams: number of beams of the beam search.
        max_new_tokens: largest length of a caption.
        min_new_tokens: smallest length of a caption.
        top_p: samples tokens from the smallest set with this probability, in (0, 1]; null runs the beam search.
        precision: ``fp32`` or ``bf16``.
        batch_size: number of images per batch; sampled captions depend on it.
        seed: seed of the sampled captions.

    Raises:
        ValueError: ``min_new_tokens`` exceeds ``max_new_tokens``, or there are fewer beams than captions.
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
            raise ValueError(f"each caption needs a beam, got {counts}; raise num_beams or set top_p")

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
    """An image-to-text model of the Hugging Face library. Only weights as safetensors are loaded, which hold no code.

    Args:
        name: folder, or id on the hub.
        decoding: settings of the captions.
        device: device of the model; ``auto`` takes a GPU if there is one.

    Raises:
        ValueError: there is no such model, or it has no weights as safetensors.
    """

    def __init__(self, name: str, decoding: Decoding, device: str) -> None:
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise ValueError("captions need transformers: pip install 'robustclip[captions]'") from error
        processors: Any = AutoProcessor  # transformers types these classes in part
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
        """Captions a batch of images; captions are stripped, and empty ones are left out.

        Args:
            pixels: ``(B, 3, H, W)``, preprocessed by the processor.
            seed: seed of sampled captions.
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
