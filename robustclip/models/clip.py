"""The vision-language model: open_clip towers for images in [0, 1], which return unit features."""

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.arguments import Count, checked
from robustclip.models import spatial_tokens, tensor_files, text_tower
from robustclip.models.lora import merged_state
from robustclip.models.tensor_files import LOADING_ERRORS, one_line
from robustclip.types import Task

SHAPES_MODEL = Path(__file__).parents[1] / "data" / "assets" / "shapes"
INTERPOLATION = "bicubic"  # of the resize inside the model, without antialiasing
PROMPTS_PER_CHUNK = 256  # bounds the memory of the text tower's activations for long class lists
REMEMBERED_CALLS = 8  # 2,048 prompts at most
# Texts whose tokens identify a tokenizer: cases, digits, punctuation, accents, another script, and a long text.
TOKENIZER_PROBE = ("a photo of a Cat.", "it's 3,141 km/h; [x] {y}_z", "café naïve Zürich", "猫 и собака", "word " * 99)
WEIGHT_FILES = (".safetensors", ".bin", ".pth")  # suffixes that open_clip searches for in a folder
BatchNorm = nn.modules.batchnorm._BatchNorm


@checked
class CLIPModel(nn.Module):
    """Image and text tower of an open_clip model.

    The model resizes (bicubic, without antialiasing, as TeCoA does) and normalises images itself. Images, and thereby
    attacks, are in [0, 1] at their native resolution.

    Args:
        arch: open_clip architecture such as ``ViT-B-32-quickgelu``; null when ``pretrained`` is a folder.
        pretrained: open_clip tag (downloaded on first use), ``.safetensors`` or ``.pt`` file, folder in open_clip's
            "local-dir" layout, ``shapes`` for the embedded model, or null for random weights.
        image_size: side of the tower's square input in pixels; null for the model's own.
        has_fixed_batch_norm: keep the pre-trained BatchNorm statistics, also in training.

    Raises:
        ValueError: weights and architecture do not fit, or a file cannot be read safely.
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
        self.net, self.tokenizer, self.config = _load(arch, pretrained, image_size)
        self.arch, self.pretrained = arch, pretrained
        self._tokens: dict[tuple[str, ...], Tensor] = {}
        self._remembered: tuple[Tensor | None, Tensor] | None = None  # images and embeddings, see `remembering`
        self.compiled_by: str | None = None  # backend of a compiled image tower, see `compile_towers`
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
        for name, tensor in self.net.state_dict().items():
            if not tensor_files.is_finite(tensor):
                raise ValueError(f"{name} of the weights {pretrained!r} is not finite; the file is damaged")
        self.fingerprint = fingerprint(self.net)  # identifies the initial weights by content, not by path
        self.train()  # Lightning does not set modes at the start, so BatchNorm must be fixed here

    def encode_image(self, images: Tensor) -> Tensor:
        """Encodes images ``(B, 3, H, W)`` in [0, 1] as unit features ``(B, D)``, in fp32 at least."""
        embeddings = self.embed_image(images)
        return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)

    def encode_grid(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images and their positions as unit features ``(B, D)`` and ``(B, P, D)``, see `embed_grid`."""
        parts = self.embed_grid(images)
        whole, local = (F.normalize(part.to(torch.promote_types(part.dtype, torch.float32)), dim=-1) for part in parts)
        return whole, local

    def embed_grid(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds images ``(B, 3, H, W)`` in [0, 1] as ``(B, D)``, and their P positions as ``(B, P, D)``, in one pass.

        See `local_embeddings` for the features of positions; none is normalised.

        Raises:
            ValueError: the tower has no features of positions, or is compiled.
        """
        visual = self.net.visual
        if self.compiled_by is not None:  # a block that is observed would be compiled in every pass
            raise ValueError("features of positions need model.compile to be false")
        with spatial_tokens.recorded(visual) as inputs:
            embeddings = self._embedded(images)
        if self._remembered is not None:
            self._remembered = images, embeddings
        return embeddings, spatial_tokens.local_embeddings(visual, inputs[0])

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Embeds the same images only once inside the context, where no parameter, prompt or pixel may change."""
        self._remembered = (None, self.mean)
        try:
            yield
        finally:
            self._remembered = None

    def embed_image(self, images: Tensor) -> Tensor:
        """Embeds images ``(B, 3, H, W)`` in [0, 1] as ``(B, D)``, not normalised."""
        if self._remembered is None:
            return self._embedded(images)
        if self._remembered[0] is not images:
            self._remembered = images, self._embedded(images)
        return self._remembered[1]

    def _embedded(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, (self.image_size, self.image_size), mode=INTERPOLATION, align_corners=False)
        normalised = ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        embeddings: Tensor = self.net.encode_image(normalised, normalize=False)
        return embeddings

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Encodes ``N`` prompts as unit features ``(N, D)``."""
        chunks = (prompts[start : start + PROMPTS_PER_CHUNK] for start in range(0, len(prompts), PROMPTS_PER_CHUNK))
        return torch.cat([self.encode_tokens(self.join_tokens(self.tokenize(chunk))) for chunk in chunks])

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Tokenises ``N`` prompts as ``(N, L)`` on the CPU, cut behind the longest where that changes no feature.

        Prompts longer than the context are truncated, but keep the end token. The tokens of the latest calls are kept,
        for heads that learn and thus are encoded in every step; they must not be changed.
        """
        key = tuple(prompts)
        if key not in self._tokens:
            if len(self._tokens) == REMEMBERED_CALLS:
                del self._tokens[next(iter(self._tokens))]
            self._tokens[key] = text_tower.cut(self.net, self.tokenizer(prompts))
        return self._tokens[key]

    def join_tokens(self, *tokens: Tensor) -> Tensor:
        """Concatenates tokens ``(N_i, L_i)`` of `tokenize` as one ``(sum N_i, L)`` on the model's device."""
        return text_tower.joined(self.net, [part.to(self.mean.device, non_blocking=True) for part in tokens])

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encodes tokens ``(N, L)`` on the model's device as unit features ``(N, D)``."""
        return text_tower.encode(self.net, tokens)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings beside the tensors that define the model's function; those of its files begin with ``base.``."""
        visual = self.net.visual
        return {
            "image_size": self.image_size,
            "base.interpolation": INTERPOLATION,
            "base.mean": list(visual.image_mean),
            "base.std": list(visual.image_std),
            "base.tokens": tensor_files.digest(self.tokenizer(list(TOKENIZER_PROBE)))[:16],
            **_flat("base.model_cfg", {**self.config, "vision_cfg": {**self.config["vision_cfg"], "image_size": None}}),
        }

    @property
    def token_embedding(self) -> nn.Embedding:
        """The first layer of the text tower, which embeds tokens."""
        return text_tower.embedding(self.net)

    def encode_classes(self, task: Task) -> Tensor:
        """Encodes a task's classes as unit features ``(C, D)``: the mean of unit prompt features of each class."""
        prompts = [prompt for prompts in task.prompts for prompt in prompts]
        if task.descriptions is not None:
            parts = torch.split(self.encode_text(prompts), [len(sentences) for sentences in task.descriptions])
            return F.normalize(torch.stack([part.mean(0) for part in parts]), dim=-1)
        features = self.encode_text(prompts).view(len(task.class_names), len(task.templates), -1)
        return F.normalize(features.mean(1), dim=-1)

    @property
    def logit_scale(self) -> Tensor:
        """Inverse temperature, a scalar; 100 for OpenAI's models."""
        scale: Tensor = self.net.logit_scale
        return scale.exp().squeeze()

    def image_blocks(self) -> list[nn.Module]:
        """Lists the image tower's blocks from first to last; the closing norm belongs to the last block.

        Raises:
            ValueError: the tower's kind is unknown.
        """
        visual = self.net.visual
        trunk = getattr(visual, "trunk", visual)
        for owner, blocks, norms in (
            (visual, "transformer.resblocks", ("ln_post",)),
            (trunk, "blocks", ("norm", "conv_head", "bn2")),
            (trunk, "stages", ("norm", "head")),
            (visual, "layer1 layer2 layer3 layer4", ("attnpool",)),
        ):
            modules = list(_submodules(owner, blocks))
            if modules:
                closing = [module for name in norms for module in _submodules(owner, name, flatten=False)]
                return [*modules[:-1], nn.ModuleList([modules[-1], *closing])]
        raise ValueError(f"the blocks of {type(trunk).__name__} are not known; train the whole image tower instead")

    def train(self, mode: bool = True) -> "CLIPModel":
        """Sets the training mode, except for BatchNorm with fixed statistics."""
        super().train(mode)
        for module in self._fixed_modules:
            module.eval()
        return self


def fingerprint(module: nn.Module) -> str:
    """Identifies a module's weights by their content, in any memory layout and 16-bit or 32-bit precision."""
    halves = (torch.float16, torch.bfloat16)
    state = merged_state(module).items()
    return tensor_files.digest({name: part.float() if part.dtype in halves else part for name, part in state})[:16]


def _flat(key: str, value: Any) -> dict[str, Any]:
    """Flattens nested mappings to values by dotted keys."""
    if not isinstance(value, Mapping):
        return {key: value}
    return {name: leaf for part, inner in value.items() for name, leaf in _flat(f"{key}.{part}", inner).items()}


def _submodules(owner: nn.Module, names: str, *, flatten: bool = True) -> Iterator[nn.Module]:
    for name in names.split():
        try:
            module = owner.get_submodule(name)
        except AttributeError:
            continue
        is_container = isinstance(module, nn.Sequential | nn.ModuleList)
        yield from module.children() if flatten and is_container else [module]


def _load(arch: str | None, pretrained: str | None, image_size: int | None) -> tuple[Any, Any, dict[str, Any]]:
    """Loads model, tokenizer and open_clip's ``model_cfg``; weights that do not fit raise an error of one line."""
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
    is_file = source is not None and Path(source).is_file()
    if source is not None and not is_file:
        _check_tag(arch, source)
    config = open_clip.get_model_config(arch)
    state = _read_weights(Path(str(source)), config) if is_file else {}
    try:
        # By default open_clip would download the own weights of a Hugging Face text tower.
        net = open_clip.create_model(arch, pretrained=source, force_image_size=image_size, pretrained_text=False)
    except LOADING_ERRORS as error:
        raise ValueError(f"weights {pretrained!r} do not load into {arch}: {one_line(error)}") from error
    _check_not_resampled(state, net, f"weights {pretrained!r}", arch, image_size)
    return net, open_clip.get_tokenizer(arch), config


def _load_folder(folder: Path, image_size: int | None) -> tuple[Any, Any, dict[str, Any]]:
    config_file = folder / "open_clip_config.json"
    if not config_file.is_file():
        raise ValueError(f"pretrained: model folder {folder} has no open_clip_config.json")
    if not any(file.suffix in WEIGHT_FILES for file in folder.iterdir()):
        raise ValueError(f"model folder {folder} has no weights (open_clip_model.safetensors)")
    config = _read_config(config_file)
    name, state = f"local-dir:{folder}", _read_weights(Path(str(_find_checkpoint_in_dir(folder))), config)
    _check_sizes(config, state, config_file)
    try:
        text_config = _with_own_files(config["text_cfg"], folder)
        net = open_clip.create_model(name, force_image_size=image_size, text_cfg=text_config)
        tokenizer = open_clip.get_tokenizer(name, **text_config["tokenizer_kwargs"])
        tokenizer(list(TOKENIZER_PROBE))
    except LOADING_ERRORS as error:
        raise ValueError(f"model folder {folder} does not load: {one_line(error)}") from error
    _check_not_resampled(state, net, f"weights of {folder}", "its open_clip_config.json", image_size)
    return net, tokenizer, config


def _with_own_files(text_config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns ``text_cfg`` with absolute paths to the folder's files; open_clip resolves them in the working folder."""
    tokenizer_options = dict(text_config.get("tokenizer_kwargs") or {})
    if "bpe_path" in tokenizer_options:
        tokenizer_options["bpe_path"] = str(folder / tokenizer_options["bpe_path"])
    paths: dict[str, Any] = {"tokenizer_kwargs": tokenizer_options}
    if "hf_model_name" in text_config:
        paths |= {"hf_model_name": str(folder / text_config["hf_model_name"]), "hf_model_pretrained": False}
    return {**text_config, **paths}


def _read_config(file: Path) -> dict[str, Any]:
    """Reads ``model_cfg`` of a folder and checks the types of its sections."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must hold JSON: {one_line(error)}") from error
    config = _section(_section(content, "the content", file).get("model_cfg"), "model_cfg", file)
    for key in ("vision_cfg", "text_cfg"):
        _section(config.get(key), f"model_cfg.{key}", file)
    pixels = _section(content.get("preprocess_cfg") or {}, "preprocess_cfg", file)
    for key in ("mean", "std"):
        values = pixels.get(key, [0.5] * 3)
        is_triple = isinstance(values, list) and len(values) == 3 and all(type(x) in (int, float) for x in values)
        if not is_triple or not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
            raise ValueError(f"preprocess_cfg.{key} of {file} must be three numbers, got {values!r:.80}")
    return config


def _section(value: Any, key: str, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} of {file} must be a mapping, got {value!r:.80}")
    return value


def _check_sizes(config: Mapping[str, Any], state: Mapping[str, Tensor], file: Path) -> None:
    """Refuses an architecture that the weights cannot fill, before memory is allocated for it."""
    largest = max((side for tensor in state.values() for side in tensor.shape), default=0)
    for key, value in _flat("model_cfg", config).items():
        most = {"embed_dim": largest, "width": largest, "vocab_size": largest, "layers": len(state)}
        if (name := key.rpartition(".")[2]) not in most or not state:
            continue
        numbers = value if isinstance(value, list) and name == "layers" else [value]  # a ResNet has a list
        if not all(type(number) is int and 1 <= number <= most[name] for number in numbers):
            raise ValueError(f"{key} of {file} must be in [1, {most[name]}] for its weights, got {value!r:.80}")


def _read_weights(file: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads the tensors of a weights file for open_clip, by open_clip's names."""
    if file.suffix in (".npz", ".npy"):  # big_vision's format, which open_clip converts
        return {}
    content = tensor_files.read_file(file)
    if isinstance(content, Mapping) and "base_model" in content:
        raise ValueError(f"{file} is a checkpoint of robustclip; use --ckpt_path, or `robustclip export`")
    is_wrapped = isinstance(content, Mapping) and "state_dict" in content
    state = tensor_files.checked_state(content["state_dict"] if is_wrapped else content, str(file))
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if "logit_bias" in state and config.get("init_logit_bias") is None:
        raise ValueError(
            f"{file} has a logit_bias, of the sigmoid loss, and the architecture has none;"
            " give the architecture that the weights were made with"
        )
    return state


def _check_not_resampled(
    state: Mapping[str, Tensor], net: Any, weights: str, arch: str, image_size: int | None
) -> None:
    """Refuses weights whose position embeddings open_clip has resized without a request, or of another number type."""
    own = net.state_dict()
    for name, tensor in state.items():
        mine = own.get(name, own.get(f"text.{name}"))
        if mine is not None and not tensor_files.is_of_kind(tensor, mine):
            raise ValueError(f"{name} of {weights} holds {tensor.dtype}, the model takes {mine.dtype}")
        if mine is None or mine.numel() == tensor.numel():
            continue
        if not name.startswith("visual."):
            raise ValueError(
                f"{weights} are for texts of {len(tensor)} tokens ({name}), {arch} has context_length {len(mine)};"
                " give the architecture that they were made with"
            )
        if image_size is None:
            side = net.visual.image_size
            side = side[0] if isinstance(side, tuple) else side
            raise ValueError(
                f"{weights} are for images of {len(tensor) - 1} patches ({name}), {arch} makes {len(mine) - 1};"
                f" give the architecture that they were made with, or --model.image_size {side} to resample them"
            )


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
