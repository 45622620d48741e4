"""The vision-language model: open_clip towers that take images in [0, 1] and return unit features."""

import difflib
import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip import text
from robustclip.arguments import Count, checked
from robustclip.textfiles import read_text
from robustclip.types import Task

SHAPES_MODEL = Path(__file__).parent / "data" / "assets" / "shapes"
INTERPOLATION = "bicubic"  # of the resize inside the model, without antialiasing
PROMPTS_PER_CHUNK = 256  # bounds the text tower's activations for class lists of any length
# What torch, safetensors and open_clip raise for files that are cut short, or that belong to another model.
LOADING_ERRORS = (
    *(RuntimeError, ValueError, TypeError, KeyError, AssertionError),
    *(pickle.UnpicklingError, EOFError, OSError, SafetensorError),
)
BatchNorm = nn.modules.batchnorm._BatchNorm


@checked
class CLIPModel(nn.Module):
    """Image and text tower of an open_clip model.

    Resizing (bicubic, without antialiasing, as TeCoA does) and the model's own normalisation are inside, so that
    images, and with them attacks, live in [0, 1] at their native resolution.

    Args:
        arch: open_clip architecture such as ``ViT-B-32-quickgelu``; null when ``pretrained`` is a folder.
        pretrained: open_clip tag (downloaded on first use), ``.safetensors`` or ``.pt`` file, folder in open_clip's
            "local-dir" layout, ``shapes`` for the embedded model, or null for random weights.
        image_size: side of the square images that the tower sees, in pixels; null for the model's own.
        has_fixed_batch_norm: keep BatchNorm statistics as pre-trained, also in training.

    Raises:
        ValueError: weights and architecture do not belong together, or a file that cannot be read safely.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch: str | None = None,
        pretrained: str | None = "shapes",
        image_size: Count | None = None,
        has_fixed_batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.net, self.tokenizer = _load(arch, pretrained, image_size)
        self.arch, self.pretrained = arch, pretrained
        visual = self.net.visual
        native_size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        self.image_size = int(image_size or native_size)
        self.register_buffer("mean", torch.tensor(visual.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(visual.image_std).view(3, 1, 1), persistent=False)
        # Convolutional towers run 1.5 to 2 times faster in channels-last memory, on CPUs too.
        is_convolutional = sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 1
        self.memory_format = torch.channels_last if is_convolutional else torch.contiguous_format
        visual.to(memory_format=self.memory_format)
        self._fixed_modules = [m for m in self.net.modules() if has_fixed_batch_norm and isinstance(m, BatchNorm)]
        self.fingerprint = fingerprint(self.net)  # of the initial weights, wherever their files lie
        self.train()  # Lightning leaves modes as they are, so BatchNorm must be fixed from the start

    def encode_image(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to unit features ``(B, D)``."""
        return F.normalize(self.embed_image(images), dim=-1)

    def embed_image(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` in [0, 1] to embeddings ``(B, D)``, as long as the tower makes them."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, (self.image_size, self.image_size), mode=INTERPOLATION, align_corners=False)
        normalised = ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        embeddings: Tensor = self.net.encode_image(normalised, normalize=False)
        return embeddings

    def encode_text(self, prompts: list[str]) -> Tensor:
        """``N`` prompts to unit features ``(N, D)``."""
        chunks = (prompts[start : start + PROMPTS_PER_CHUNK] for start in range(0, len(prompts), PROMPTS_PER_CHUNK))
        return torch.cat([self.encode_tokens(self.join_tokens(self.tokenize(chunk))) for chunk in chunks])

    def tokenize(self, prompts: list[str]) -> Tensor:
        """``N`` prompts to tokens ``(N, L)`` on the CPU, cut behind the longest where that changes no feature.

        What exceeds the context is left out, but for the end of the text.
        """
        return text.cut(self.net, self.tokenizer(prompts))

    def join_tokens(self, *tokens: Tensor) -> Tensor:
        """Tokens ``(N_i, L_i)`` of `tokenize` as one ``(sum N_i, L)`` on the model's device."""
        return text.joined(self.net, [part.to(self.mean.device, non_blocking=True) for part in tokens])

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens ``(N, L)`` on the model's device to unit features ``(N, D)``."""
        return text.encode(self.net, tokens)

    @property
    def token_embedding(self) -> nn.Embedding:
        """The text tower's first layer."""
        return text.embedding(self.net)

    def encode_classes(self, task: Task) -> Tensor:
        """Unit class features ``(C, D)``: the normalised mean over templates of normalised prompt features."""
        prompts = [prompt for prompts in task.prompts for prompt in prompts]
        features = self.encode_text(prompts).view(len(task.class_names), len(task.templates), -1)
        return F.normalize(features.mean(1), dim=-1)

    @property
    def logit_scale(self) -> Tensor:
        """Inverse temperature, a scalar; 100 for OpenAI's models."""
        scale: Tensor = self.net.logit_scale
        return scale.exp().squeeze()

    def image_blocks(self) -> list[nn.Module]:
        """The image tower's blocks from first to last; the closing norm belongs to the last.

        Raises:
            ValueError: a tower whose blocks are not known.
        """
        visual = self.net.visual
        trunk = getattr(visual, "trunk", visual)
        for owner, blocks, norms in (
            (visual, "transformer.resblocks", ("ln_post",)),
            (trunk, "blocks", ("norm", "conv_head", "bn2")),
            (trunk, "stages", ("norm", "head")),
            (visual, "layer1 layer2 layer3 layer4", ("attnpool",)),
        ):
            found = list(_submodules(owner, blocks))
            if found:
                closing = [module for name in norms for module in _submodules(owner, name, flatten=False)]
                return [*found[:-1], nn.ModuleList([found[-1], *closing])]
        raise ValueError(f"the blocks of {type(trunk).__name__} are not known; train the whole image tower instead")

    def train(self, mode: bool = True) -> "CLIPModel":
        """Sets training mode, except for BatchNorm whose statistics are fixed."""
        super().train(mode)
        for module in self._fixed_modules:
            module.eval()
        return self


def fingerprint(module: nn.Module) -> str:
    """Tells two sets of weights apart; a sample of each tensor suffices."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sample = tensor.flatten()[:: max(1, tensor.numel() // 64)].float().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _submodules(owner: nn.Module, names: str, *, flatten: bool = True) -> Iterator[nn.Module]:
    for name in names.split():
        try:
            module = owner.get_submodule(name)
        except AttributeError:
            continue
        is_container = isinstance(module, nn.Sequential | nn.ModuleList)
        yield from module.children() if flatten and is_container else [module]


def _load(arch: str | None, pretrained: str | None, image_size: int | None) -> tuple[Any, Any]:
    """Model and tokenizer, with every way that weights can fail to fit told in one line."""
    source = str(SHAPES_MODEL) if pretrained == "shapes" else pretrained
    if source is not None and Path(source).is_dir():
        if arch is not None:
            raise ValueError(f"model arch must be null for the folder {source!r}, which has its own; got {arch!r}")
        return _load_folder(Path(source).resolve(), image_size)
    if arch is None:
        raise ValueError(
            f"model arch is missing: pretrained {pretrained!r} is no folder; give an open_clip architecture"
        )
    if arch not in open_clip.list_models():
        close = difflib.get_close_matches(arch, open_clip.list_models())
        remedy = f"did you mean {' or '.join(close)}?" if close else "see open_clip.list_models()"
        raise ValueError(f"open_clip has no architecture {arch!r}; {remedy}")
    if source is not None and not Path(source).is_file():
        _check_tag(arch, source)
    try:
        net = open_clip.create_model(arch, pretrained=source, force_image_size=image_size)
    except LOADING_ERRORS as error:
        raise ValueError(f"weights {pretrained!r} do not load into {arch}: {_one_line(error)}") from error
    return net, open_clip.get_tokenizer(arch)


def _load_folder(folder: Path, image_size: int | None) -> tuple[Any, Any]:
    config_file = folder / "open_clip_config.json"
    if not config_file.is_file():
        raise ValueError(f"model folder {folder} has no open_clip_config.json")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")) and not any(folder.glob("*.pt*")):
        raise ValueError(f"model folder {folder} has no weights (open_clip_model.safetensors)")
    try:
        text_config = json.loads(read_text(config_file))["model_cfg"]["text_cfg"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{config_file} must hold model_cfg.text_cfg as JSON: {_one_line(error)}") from error
    tokenizer_options = dict(text_config.get("tokenizer_kwargs") or {})
    if "bpe_path" in tokenizer_options:
        tokenizer_options["bpe_path"] = str(folder / tokenizer_options["bpe_path"])
    overrides = {**text_config, "tokenizer_kwargs": tokenizer_options}
    if "hf_model_name" in text_config:
        # open_clip reads these against the working directory; here they are relative to their own file.
        overrides |= {"hf_model_name": str(folder / text_config["hf_model_name"]), "hf_model_pretrained": False}
    name = f"local-dir:{folder}"
    try:
        net = open_clip.create_model(name, force_image_size=image_size, text_cfg=overrides)
        tokenizer = open_clip.get_tokenizer(name, **tokenizer_options)
    except LOADING_ERRORS as error:
        raise ValueError(f"model folder {folder} does not load: {_one_line(error)}") from error
    return net, tokenizer


def _check_tag(arch: str, tag: str) -> None:
    known = open_clip.list_pretrained_tags_by_model(arch)
    if tag not in known:
        raise ValueError(f"pretrained {tag!r} is neither a file nor a folder nor a tag of {arch}; its tags: {known}")
    of_weights = get_pretrained_cfg(arch, tag).get("quick_gelu", False)
    of_arch = open_clip.get_model_config(arch).get("quick_gelu", False)
    if of_weights != of_arch:
        activation = {True: "QuickGELU", False: "GELU"}
        other = f"{arch}-quickgelu" if of_weights else arch.removesuffix("-quickgelu")
        raise ValueError(
            f"weights {tag!r} were trained with {activation[of_weights]}, arch {arch} computes {activation[of_arch]};"
            f" use {other}"
        )


def _one_line(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it may hold code, so it was not opened; only tensors and plain values load, best as .safetensors"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300] or type(error).__name__
