"""Conversion between open_clip's CLIP and the Hugging Face library's: names of tensors, and shared options."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from torch.nn import functional as F

from robustclip.convert.open_clip_folder import PROBE, Logits, config_of, probe_images
from robustclip.convert.tensor_names import Naming
from robustclip.models.clip import CLIPModel
from robustclip.models.layers import frozen
from robustclip.models.tensor_files import one_line
from robustclip.textfiles import read_text

NAMES = Naming(
    beginnings=(
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.pre_layrnorm.", "visual.ln_pre."),
        ("vision_model.post_layernorm.", "visual.ln_post."),
        ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
        ("visual_projection.weight", "visual.proj"),
        ("text_model.embeddings.token_embedding.", "token_embedding."),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm.", "ln_final."),
        ("text_model.encoder.layers.", "transformer.resblocks."),
        ("text_projection.weight", "text_projection"),
        ("logit_scale", "logit_scale"),
    ),
    transposed=("visual.proj", "text_projection"),
)
VOCABULARY = 49408  # size of the vocabulary of CLIP's tokenizer
START, END = "<|startoftext|>", "<|endoftext|>"
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
# Options of a tower in open_clip, and their names in the library; numbers of heads and widths of MLPs differ in kind.
VISION = {"image_size": "image_size", "layers": "num_hidden_layers", "width": "hidden_size", "patch_size": "patch_size"}
TEXT = {
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
}
# Options that both sides have; for all others, the library's code is fixed to the choice of OpenAI's CLIP.
VISION_OPTIONS = {*VISION, "head_width", "mlp_ratio"}
TEXT_OPTIONS = {*TEXT, "mlp_ratio", "tokenizer_kwargs"}
MODEL_OPTIONS = {"embed_dim", "quick_gelu", "init_logit_scale", "vision_cfg", "text_cfg"}


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of a ``transformers.CLIPModel`` to open_clip's names.

    Raises:
        ValueError: a ``CLIPModel`` has no tensor of that name.
    """
    return NAMES.to_open_clip(state)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors of open_clip to the names of ``transformers.CLIPModel``."""
    return NAMES.from_open_clip(state)


def model_config(config: Any) -> dict[str, Any]:
    """Converts a ``CLIPConfig`` to open_clip's ``model_cfg``.

    Raises:
        ValueError: open_clip does not support such towers.
    """
    vision, text = config.vision_config, config.text_config
    activation = vision.hidden_act
    if activation != text.hidden_act or activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act must be quick_gelu or gelu in both towers, got {activation}, {text.hidden_act}")
    if {vision.layer_norm_eps, text.layer_norm_eps} != {1e-5}:
        raise ValueError(f"layer_norm_eps must be 1e-5, got {vision.layer_norm_eps} and {text.layer_norm_eps}")
    if text.vocab_size != VOCABULARY:
        raise ValueError(f"vocab_size must be {VOCABULARY}, as CLIP's tokenizer has, got {text.vocab_size}")
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": ACTIVATIONS[activation],
        "vision_cfg": {**_open_clip(vision, VISION), "head_width": vision.hidden_size // vision.num_attention_heads},
        "text_cfg": _open_clip(text, TEXT),
    }


def _open_clip(tower: Any, names: dict[str, str]) -> dict[str, Any]:
    """Reads open_clip's options of a tower from the library's configuration of it."""
    options = {own: getattr(tower, name) for own, name in names.items()}
    return {**options, "mlp_ratio": mlp_ratio(tower)}


def mlp_ratio(tower: Any) -> float:
    """Returns the width of a tower's MLP over the tower's width, so that `int` of the product is the former again."""
    ratio: float = tower.intermediate_size / tower.hidden_size
    is_exact = int(tower.hidden_size * ratio) == tower.intermediate_size
    return ratio if is_exact else (tower.intermediate_size + 0.5) / tower.hidden_size


def write_files(source: Path, config: Any, folder: Path) -> None:
    """Checks that a folder has the tokenizer of OpenAI's CLIP, which open_clip needs no files for.

    Args:
        source: folder of a ``CLIPModel``.
        config: its ``CLIPConfig``.
        folder: folder to write to.

    Raises:
        ValueError: the folder has another vocabulary.
    """
    vocabularies: list[Any] = []
    try:
        if (file := source / "vocab.json").is_file():
            vocabularies.append(json.loads(read_text(file)))
        if (file := source / "tokenizer.json").is_file():
            vocabularies.append(json.loads(read_text(file))["model"]["vocab"])
        own = _library_vocabulary(open_clip.SimpleTokenizer()) if vocabularies else {}
        # The two special tokens may stand elsewhere.
        numbers = [{START: VOCABULARY - 2, END: VOCABULARY - 1, **vocabulary} for vocabulary in vocabularies]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {one_line(error)}") from error
    if any(vocabulary != own for vocabulary in numbers):
        raise ValueError(f"{source} has another vocabulary than OpenAI's CLIP, whose tokenizer open_clip would use")


def _library_vocabulary(tokenizer: Any) -> dict[str, int]:
    """Returns the vocabulary of open_clip's tokenizer by the library's names of the two special tokens."""
    own = {"<start_of_text>": START, "<end_of_text>": END}
    return {own.get(token, token): number for token, number in tokenizer.encoder.items()}


def library_config(clip: CLIPModel) -> Any:
    """Converts a model's configuration to a ``transformers.CLIPConfig``.

    Raises:
        ValueError: the extra is not installed, or the model is not of OpenAI's ViT type.
    """
    model = config_of(clip)
    _check_type(model)
    vision, text = CLIPVisionCfg(**model["vision_cfg"]), CLIPTextCfg(**model["text_cfg"])
    activation = next(name for name, is_quick in ACTIVATIONS.items() if is_quick == model.get("quick_gelu", False))
    towers = [
        {
            **{name: getattr(tower, own) for own, name in names.items()},
            "intermediate_size": int(tower.width * tower.mlp_ratio),
            "hidden_act": activation,
            "projection_dim": model["embed_dim"],
        }
        for tower, names in ((vision, VISION), (text, TEXT))
    ]
    towers[0]["num_attention_heads"] = vision.width // vision.head_width
    # The last two entries of CLIP's vocabulary; the library reads features at the first occurrence of the end.
    start, end = text.vocab_size - 2, text.vocab_size - 1
    towers[1] |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    return library().CLIPConfig(projection_dim=model["embed_dim"], vision_config=towers[0], text_config=towers[1])


def write_tokenizer(clip: CLIPModel, folder: Path) -> None:
    """Writes CLIP's byte-pair tokenizer, so that the folder can be used offline.

    Args:
        clip: model with CLIP's own tokenizer.
        folder: folder to write to.
    """
    vocabulary = _library_vocabulary(clip.tokenizer)
    merges = "".join(f"{' '.join(pair)}\n" for pair in clip.tokenizer.bpe_ranks)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    tokens = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    length = clip.tokenizer.context_length
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2), encoding="utf-8")


def library_similarities(folder: Path, clip: CLIPModel) -> Logits:
    """Computes the logits of ``transformers.CLIPModel`` for the probe's images and classes.

    Args:
        folder: folder with ``config.json`` and weights.
        clip: model that provides tokenizer and normalisation.
    """
    model = library().CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=None).float()
    prompts = [prompt for prompts in PROBE.prompts for prompt in prompts]
    with torch.no_grad(), frozen(model):
        pixels = (probe_images(clip.image_size) - clip.mean) / clip.std
        images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        texts = model.text_projection(model.text_model(input_ids=clip.tokenizer(prompts)).pooler_output)
    return class_logits(images, texts, scale=float(model.logit_scale.detach().exp()))


def class_logits(images: Tensor, texts: Tensor, *, scale: float, bias: float = 0.0) -> Logits:
    """Computes the logits of the probe's classes, each the mean of its prompts' unit features.

    Args:
        images: embeddings ``(B, D)``.
        texts: embeddings ``(N, D)`` of all prompts.
        scale: scale of the logits.
        bias: bias of the logits, 0 for models without one.
    """
    prompts = F.normalize(texts, dim=-1).view(len(PROBE.class_names), len(PROBE.templates), -1)
    classes = F.normalize(prompts.mean(1), dim=-1)
    return Logits(F.normalize(images, dim=-1) @ classes.T, scale, bias)


def library() -> Any:
    """Imports the Hugging Face library and silences its progress bars.

    Raises:
        ValueError: the library is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("Hugging Face folders need the extra: pip install 'robustclip[hf]'") from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def _check_type(model: dict[str, Any]) -> None:
    for name in sorted(model.keys() - MODEL_OPTIONS):
        if model[name]:
            raise ValueError(f"transformers.CLIPModel has no {name}; export --to open_clip instead")
    for part, allowed, cls in (("vision_cfg", VISION_OPTIONS, CLIPVisionCfg), ("text_cfg", TEXT_OPTIONS, CLIPTextCfg)):
        defaults = {field.name: field.default for field in fields(cls)}
        for name, value in model[part].items():
            if name not in allowed and value != defaults.get(name):
                raise ValueError(
                    f"transformers.CLIPModel has no {part}.{name} = {value!r}: it holds OpenAI's ViT type alone;"
                    " export --to open_clip instead"
                )
    if not isinstance(model["vision_cfg"].get("layers", 12), int):
        raise ValueError("transformers.CLIPModel has no ResNet tower; export --to open_clip instead")
