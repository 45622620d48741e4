"""The vision-language model: open_clip towers for images in [0, 1], which return unit features."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.arguments import Count, checked
from robustclip.models import spatial_tokens, tensor_files, text_tower
from robustclip.models._loading import TOKENIZER_PROBE, flat, load
from robustclip.models.lora import merged_state
from robustclip.types import Task

SHAPES_MODEL = Path(__file__).parents[1] / "data" / "assets" / "shapes"
INTERPOLATION = "bicubic"  # of the resize inside the model, without antialiasing
PROMPTS_PER_CHUNK = 256  # bounds the memory of the text tower's activations for long class lists
REMEMBERED_CALLS = 8  # 2,048 prompts at most
BatchNorm = nn.modules.batchnorm._BatchNorm


@checked
class CLIPModel(nn.Module):
    """Image and text tower of an open_clip model.

    The model resizes (bicubic, without antialiasing, as TeCoA does) and normalises images itself. Images, and thereby
    attacks, are in [0, 1] at their native resolution.

    Args:
        arch: open_clip architecture such as ``ViT-B-32-quickgelu``; null for a folder or repository.
        pretrained: open_clip tag (downloaded on first use), ``.safetensors`` or ``.pt`` file, folder in open_clip's
            "local-dir" layout, ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION`` for a repository of that layout,
            ``shapes`` for the embedded model, or null for random weights.
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
        base = load(arch, str(SHAPES_MODEL) if pretrained == "shapes" else pretrained, image_size)
        self.net, self.tokenizer, self.config, self.tower = base.net, base.tokenizer, base.config, base.tower
        self.arch, self.pretrained, self.folder, self.source = arch, pretrained, base.folder, base.source
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
            **flat("base.model_cfg", {**self.config, "vision_cfg": {**self.config["vision_cfg"], "image_size": None}}),
            **flat("base.timm", {**self.tower.get("model_args", {}), "img_size": None} if self.tower else {}),
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
        """Inverse temperature, a scalar; 100 for OpenAI's models.

        Models of the sigmoid loss, such as SigLIP, have a ``logit_bias`` beside it. It is kept, but added to no logit:
        a constant changes neither the order of classes nor any loss of a softmax or of differences of logits.
        """
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


def _submodules(owner: nn.Module, names: str, *, flatten: bool = True) -> Iterator[nn.Module]:
    for name in names.split():
        try:
            module = owner.get_submodule(name)
        except AttributeError:
            continue
        is_container = isinstance(module, nn.Sequential | nn.ModuleList)
        yield from module.children() if flatten and is_container else [module]
