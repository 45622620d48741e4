"""Tiny models of every kind of tower with random weights, in folders for `pretrained`."""

import copy
import shutil
from pathlib import Path
from typing import Any

import open_clip.model
import torch
from helpers import save_clip
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, PreTrainedTokenizerFast

from robustclip.models.clip import SHAPES_MODEL

WORDS = ["[PAD]", "[UNK]", "this", "is", "a", "photo", "of", "red", "green", "blue", "circle", "square", "star"]
TEXT = {
    "context_length": 18, "vocab_size": 735, "width": 16, "heads": 2, "layers": 1,
    "tokenizer_kwargs": {"bpe_path": "bpe_shapes.txt.gz"},
}  # fmt: skip
# As in open_clip's SigLIP configurations: no causal mask, the last token, and a tokenizer of its own.
SIGMOID_TEXT = {
    "context_length": 12, "vocab_size": len(WORDS), "width": 16, "heads": 2, "layers": 1,
    "hf_tokenizer_name": ".", "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
}  # fmt: skip
HUGGING_FACE_TEXT = {
    "hf_model_name": ".", "hf_tokenizer_name": ".", "hf_model_pretrained": False, "hf_proj_type": "linear",
    "hf_pooler_type": "mean_pooler", "context_length": 12,
}  # fmt: skip
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}


def timm(name: str, **options: Any) -> dict[str, Any]:
    return {"image_size": 32, "timm_model_name": name, "timm_pool": "", "timm_proj": "linear", **options}


TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "resnet-attention-pooling": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": TEXT,
    },
    "convnext": {"embed_dim": 16, "vision_cfg": timm("test_convnext"), "text_cfg": TEXT},
    "efficientnet": {"embed_dim": 16, "vision_cfg": timm("test_efficientnet", timm_pool="avg"), "text_cfg": TEXT},
    "siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": timm("test_vit", image_size=160, timm_pool="map", timm_proj="none"),
        "text_cfg": SIGMOID_TEXT,
    },
    "hugging-face-text": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": HUGGING_FACE_TEXT},
}


def write(name: str, folder: Path) -> Path:
    """Writes a tower of the table; its weights are not at the initial values, where some gradients are zero."""
    config = TOWERS[name]
    write_tokenizer(folder)
    text_config = {**config["text_cfg"]}
    if "hf_model_name" in text_config:
        text_config["hf_model_name"] = str(folder)
    is_custom = "hf_model_name" in text_config or config.get("custom_text", False)
    cls = open_clip.model.CustomTextCLIP if is_custom else open_clip.model.CLIP
    arguments = copy.deepcopy({key: value for key, value in config.items() if key != "custom_text"})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = cls(**{**arguments, "text_cfg": text_config})
        for parameter in net.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return save_clip(folder, config, net)


def write_tokenizer(folder: Path) -> None:
    """Both kinds: the byte pairs of the embedded model, and whole words in the files of Hugging Face."""
    shutil.copy(SHAPES_MODEL / "bpe_shapes.txt.gz", folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, **size).save_pretrained(folder)
