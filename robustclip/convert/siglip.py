"""Conversion between the Hugging Face library's SigLIP and open_clip's: names, configuration, tokenizer.

open_clip builds SigLIP of timm's image tower and its own text tower. For most SigLIP models timm's tower of that name
computes another GELU than the library does (exact, in place of the approximation by tanh), which changes the features.
The image tower is therefore defined by a file in timm's "local-dir" layout, with all sizes and the activation of the
library's configuration. Plain open_clip reads such a folder as the working folder: ``local-dir:.``.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustclip.convert.hugging_face import class_logits, library, mlp_ratio
from robustclip.convert.open_clip_folder import PROBE, Logits, config_of, probe_images
from robustclip.convert.tensor_names import Naming
from robustclip.models.clip import CLIPModel
from robustclip.models.layers import frozen
from robustclip.models.tensor_files import one_line

KIND = "a SiglipModel"
POOL = "visual.trunk.attn_pool."
HEAD = "vision_model.head."
IMAGE_NAMES = Naming(
    beginnings=(
        ("vision_model.embeddings.patch_embedding.", "visual.trunk.patch_embed.proj."),
        ("vision_model.embeddings.position_embedding.weight", "visual.trunk.pos_embed"),
        ("vision_model.encoder.layers.", "visual.trunk.blocks."),
        ("vision_model.post_layernorm.", "visual.trunk.norm."),
        (f"{HEAD}probe", f"{POOL}latent"),
        (f"{HEAD}attention.in_proj_", f"{POOL}in_proj_"),  # timm holds queries apart from keys and values
        (f"{HEAD}attention.out_proj.", f"{POOL}proj."),
        (f"{HEAD}layernorm.", f"{POOL}norm."),
        (f"{HEAD}mlp.", f"{POOL}mlp."),
    ),
    inside=(
        (".self_attn.out_proj.", ".attn.proj."),
        (".layer_norm1.", ".norm1."),
        (".layer_norm2.", ".norm2."),
    ),
    joint=".attn.qkv.",
    kind=KIND,
)
TEXT_NAMES = Naming(
    beginnings=(
        ("text_model.embeddings.token_embedding.", "text.token_embedding."),
        ("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
        ("text_model.encoder.layers.", "text.transformer.resblocks."),
        ("text_model.final_layer_norm.", "text.ln_final."),
        ("text_model.head.", "text.text_projection."),
        ("logit_scale", "logit_scale"),
        ("logit_bias", "logit_bias"),
    ),
    kind=KIND,
)
ACTIVATIONS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}  # names in the library, and approximations in PyTorch
TIMM_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}
SPECIAL = ("pad", "bos", "eos")  # kinds of tokens that the library's configuration names
EPS = 1e-6  # of the norms in timm's towers, which have no option for it
ARCHITECTURE = "vit_base_patch16_siglip_224"  # any of timm's SigLIP towers, since `model_args` replace all sizes
TOWER = "config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "tokenizer.model"),
)


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of a ``transformers.SiglipModel`` to open_clip's names.

    Raises:
        ValueError: a ``SiglipModel`` has no tensor of that name.
    """
    image = {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")}
    text = {name: tensor for name, tensor in state.items() if name not in image}
    renamed = IMAGE_NAMES.to_open_clip(image) | TEXT_NAMES.to_open_clip(text)
    for part in ("weight", "bias"):
        if (joint := renamed.pop(f"{POOL}in_proj_{part}", None)) is not None:
            query, *rest = joint.chunk(3)
            renamed |= {f"{POOL}q.{part}": query, f"{POOL}kv.{part}": torch.cat(rest)}
    if (position := renamed.get("visual.trunk.pos_embed")) is not None:
        renamed["visual.trunk.pos_embed"] = position[None]
    return {name: tensor.reshape(()) if name.startswith("logit_") else tensor for name, tensor in renamed.items()}


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors of open_clip's SigLIP to the names of ``transformers.SiglipModel``."""
    image = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    text = {name: tensor.reshape(1) if name.startswith("logit_") else tensor for name, tensor in state.items()}
    for part in ("weight", "bias"):
        rows = [image.pop(f"{POOL}{name}.{part}") for name in ("q", "kv")]
        image[f"{POOL}in_proj_{part}"] = torch.cat(rows)
    image["visual.trunk.pos_embed"] = image["visual.trunk.pos_embed"][0]
    text = {name: tensor for name, tensor in text.items() if not name.startswith("visual.")}
    return IMAGE_NAMES.from_open_clip(image) | TEXT_NAMES.from_open_clip(text)


def model_config(config: Any) -> dict[str, Any]:
    """Converts a ``SiglipConfig`` to open_clip's ``model_cfg``.

    Raises:
        ValueError: open_clip and timm do not support such towers.
    """
    vision, text = config.vision_config, config.text_config
    width = getattr(text, "projection_size", None) or text.hidden_size  # older configurations lack the key
    _check(config, width)
    return {
        "embed_dim": width,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": "local-dir:.",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "hf_tokenizer_name": ".",
            "tokenizer_kwargs": {"clean": "canonicalize"},  # lower case without punctuation, as in SigLIP's training
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": mlp_ratio(text),
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": text.layer_norm_eps},
            "act_kwargs": {"approximate": ACTIVATIONS[text.hidden_act]},
        },
    }


def _check(config: Any, width: int) -> None:
    """Refuses options that open_clip or timm lack."""
    vision, text = config.vision_config, config.text_config
    for tower, options in (("vision_config", vision), ("text_config", text)):
        if options.hidden_act not in ACTIVATIONS:
            raise ValueError(f"{tower}.hidden_act must be one of {', '.join(ACTIVATIONS)}, got {options.hidden_act!r}")
    for key, value, expected in (
        ("vision_config.layer_norm_eps", vision.layer_norm_eps, EPS),
        ("vision_config.num_channels", vision.num_channels, 3),
        ("vision_config.vision_use_head", getattr(vision, "vision_use_head", True), True),
        ("vision_config.hidden_size", vision.hidden_size, width),
    ):
        if value != expected:
            raise ValueError(f"{key} must be {expected}, got {value!r}; such a SigLIP is not imported")
    for key in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, key), int):
            raise ValueError(f"vision_config.{key} must be one number, got {getattr(vision, key)!r}")


def tower_config(config: Any) -> dict[str, Any]:
    """Converts a ``SiglipConfig`` to timm's definition of its image tower."""
    vision = config.vision_config
    size = vision.image_size
    return {
        "model_type": "siglip",  # the library looks here for the kind of tokenizer
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": vision.hidden_size,
        "model_args": {
            "img_size": size,
            "patch_size": vision.patch_size,
            "embed_dim": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            "mlp_ratio": mlp_ratio(vision),
            "class_token": False,
            "global_pool": "map",
            "act_layer": TIMM_ACTIVATIONS[ACTIVATIONS[vision.hidden_act]],
        },
        "pretrained_cfg": {"input_size": [3, size, size], "fixed_input_size": True},
    }


def library_config(clip: CLIPModel) -> Any:
    """Converts a model's configuration to a ``transformers.SiglipConfig``.

    Raises:
        ValueError: the extra is not installed, or the model is not as `model_config` and `tower_config` define it.
    """
    model, image = config_of(clip), {**clip.tower["model_args"], "img_size": clip.image_size}
    text = model["text_cfg"]
    names = {approximation: name for name, approximation in ACTIVATIONS.items()}
    timm_names = {name: names[approximation] for approximation, name in TIMM_ACTIVATIONS.items()}
    special = {f"{kind}_token_id": getattr(clip.tokenizer.tokenizer, f"{kind}_token_id") for kind in SPECIAL}
    try:
        sizes = [image[key] for key in ("embed_dim", "mlp_ratio", "depth", "num_heads")]
        vision_config = _library_tower(sizes, timm_names[image["act_layer"]])
        vision_config |= {"image_size": clip.image_size, "patch_size": image["patch_size"]}
        sizes = [text[key] for key in ("width", "mlp_ratio", "layers", "heads")]
        text_config = _library_tower(sizes, names[text["act_kwargs"]["approximate"]]) | special
        text_config |= {"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]}
        text_config |= {"layer_norm_eps": text["norm_kwargs"]["eps"], "projection_size": model["embed_dim"]}
        config = library().SiglipConfig(text_config=text_config, vision_config=vision_config)
    except (LookupError, TypeError) as error:
        raise ValueError(f"the model lacks the option {error} of SigLIP; export --to open_clip instead") from error
    again = {"model_cfg": model_config(config), "model_args": tower_config(config)["model_args"]}
    if (option := _difference({"model_cfg": model, "model_args": image}, again)) is not None:
        raise ValueError(f"transformers.SiglipModel has no {option}; export --to open_clip instead")
    return config


def _difference(own: Any, again: Any, key: str = "") -> str | None:
    """Returns the first option, with its value, that has another value after a conversion and back."""
    if not isinstance(own, dict) or not isinstance(again, dict):
        return None if own == again else f"{key} = {own!r}"
    differences = (
        _difference(own.get(name), again.get(name), f"{key}.{name}".lstrip("."))
        for name in sorted(own.keys() | again.keys())
    )
    return next((option for option in differences if option is not None), None)


def _library_tower(sizes: Sequence[Any], activation: str) -> dict[str, Any]:
    """Names the options of a tower; the sizes are width, ratio of the MLP, layers and heads."""
    width, ratio, layers, heads = sizes
    return {
        "hidden_size": width,
        "intermediate_size": int(width * ratio),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
    }


def write_tokenizer(clip: CLIPModel, folder: Path) -> None:
    """Copies the tokenizer of a model.

    Args:
        clip: model that was imported from a ``SiglipModel``.
        folder: folder to write to.
    """
    if clip.folder is not None:
        copy_tokenizer(clip.folder, folder)


def write_files(source: Path, config: Any, folder: Path) -> None:
    """Writes timm's definition of the image tower, and copies the tokenizer.

    Args:
        source: folder of a ``SiglipModel``.
        config: its ``SiglipConfig``.
        folder: folder to write to.

    Raises:
        ValueError: the source has no tokenizer, or one that cannot be loaded.
    """
    (folder / TOWER).write_text(json.dumps(tower_config(config), indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(source, folder)
    largest, size = max(_tokenizer(source).get_vocab().values()), config.text_config.vocab_size
    if largest >= size:
        raise ValueError(f"the tokenizer of {source} has the token {largest}, its text tower only {size} tokens")


def _tokenizer(source: Path) -> Any:
    try:
        return library().AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(
            f"the tokenizer of {source} needs a package: pip install sentencepiece protobuf ({one_line(error)[:80]})"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        if not (source / "tokenizer_config.json").is_file():
            raise ValueError(
                f"{source} has no tokenizer_config.json, which names the class of its tokenizer; copy it there"
            ) from error
        raise ValueError(f"the tokenizer of {source} cannot be read: {one_line(error)}") from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer of the library.

    Args:
        source: folder with the files.
        folder: folder to write to.

    Raises:
        ValueError: there are none.
    """
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not {"tokenizer.json", "spiece.model", "tokenizer.model"} & set(names):
        raise ValueError(
            f"{source} has no tokenizer (tokenizer.json or spiece.model), and SigLIP models have several; save the"
            " checkpoint's own beside its weights, by AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    for name in names:
        shutil.copyfile(source / name, folder / name)


def library_similarities(folder: Path, clip: CLIPModel) -> Logits:
    """Computes the logits of ``transformers.SiglipModel`` for the probe's images and classes.

    Args:
        folder: folder with ``config.json``, weights and tokenizer.
        clip: model that provides the normalisation and the size of images.
    """
    model = library().SiglipModel.from_pretrained(folder, local_files_only=True, use_safetensors=None).float()
    texts = [clip.tokenizer.clean_fn(prompt) for prompts in PROBE.prompts for prompt in prompts]
    tokens = _tokenizer(folder)(
        texts, padding="max_length", max_length=clip.tokenizer.context_length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad(), frozen(model):
        pixels = (probe_images(clip.image_size) - clip.mean) / clip.std
        images = model.vision_model(pixel_values=pixels).pooler_output
        embeddings = model.text_model(input_ids=tokens).pooler_output
    return class_logits(
        images, embeddings, scale=float(model.logit_scale.detach().exp()), bias=float(model.logit_bias.detach())
    )
