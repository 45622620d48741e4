"""Tiny models of the Hugging Face library with random weights, written as ``save_pretrained`` does."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SIZE, CONTEXT = 32, 16
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 69,  # its ratio to the width is no whole number, and rounds down
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 69,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
}
WORDS = ["a", "photo", "of", "the", "cat", "dog", "red", "circle", "in", "sky", "aeroplane", "an"]
PIECES = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), *f"▁{string.ascii_lowercase}{string.digits}"]


def randomised(model: torch.nn.Module, seed: int = 0) -> Any:
    """Moves every parameter, since zeros and ones would hide a tensor in the wrong place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def write_siglip(folder: Path, **changes: dict[str, Any]) -> Any:
    """Writes a SiglipModel with tokenizer and preprocessing, and returns it."""
    import transformers

    text = {"vocab_size": len(PIECES), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers.SiglipConfig(
        text_config={**TEXT, **text, **changes.get("text", {})}, vision_config={**VISION, **changes.get("vision", {})}
    )
    model = randomised(transformers.SiglipModel(config))
    model.logit_bias.data.fill_(-7.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    write_pixels(folder, image_processor_type="SiglipImageProcessor", size={"height": SIZE, "width": SIZE})
    return model


def write_tokenizer(folder: Path) -> None:
    """Writes a Unigram tokenizer with padding on the right and an end token, as SigLIP's have."""
    tokenizer = Tokenizer(models.Unigram([(piece, -float(len(piece) == 1)) for piece in PIECES], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    options |= {"unk_token": "<unk>", "model_max_length": CONTEXT, "padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def write_clip(folder: Path, **changes: dict[str, Any]) -> Any:
    """Writes a CLIPModel alone, without tokenizer and preprocessing, and returns it."""
    import transformers

    config = transformers.CLIPConfig(
        text_config={**TEXT, "max_position_embeddings": 77, **changes.get("text", {})},
        vision_config={**VISION, **changes.get("vision", {})},
        projection_dim=24,
    )
    model = randomised(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    return model


def write_pixels(folder: Path, **options: Any) -> None:
    """Writes a ``preprocessor_config.json``; options replace its entries."""
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "resample": 3, "do_rescale": True}
    pixels |= {"do_resize": True, "do_normalize": True, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels | options))


def change(file: Path, **changes: Any) -> None:
    """Changes entries of a JSON file, also inside mappings."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(content))
