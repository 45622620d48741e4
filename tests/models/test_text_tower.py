"""Text towers on cut tokens give the features and gradients of the whole context."""

from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from torch.nn import functional as F

from robustclip.models import text_tower
from robustclip.models.clip import CLIPModel

VISION = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 20, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
END = 49
MODELS = {
    "beside": (CLIP, {}),
    "of_its_own": (CustomTextCLIP, {}),
    "ends_told": (CLIP, {"pool_type": "eos", "eos_id": END}),
    "ends_told_of_its_own": (CustomTextCLIP, {"pool_type": "eos", "eos_id": END}),
    "last": (CustomTextCLIP, {"pool_type": "last"}),
    "first": (CustomTextCLIP, {"pool_type": "first"}),
    "not_causal": (CustomTextCLIP, {"no_causal_mask": True}),
    "not_causal_beside": (CLIP, {"no_causal_mask": True}),
    "class_token": (CustomTextCLIP, {"embed_cls": True}),
}
CUT = {"beside", "of_its_own", "ends_told", "ends_told_of_its_own"}


def tokens() -> torch.Tensor:
    """Texts of 3, 7 and 5 tokens, the last of which is the end."""
    rows = torch.randint(1, END, (3, 20), generator=torch.Generator().manual_seed(0))
    for row, length in zip(rows, (3, 7, 5), strict=True):
        row[length - 1], row[length:] = END, 0
    return rows


@pytest.mark.parametrize("name", MODELS)
def test_cut_tokens_give_the_features_and_gradients_of_the_whole_context(name: str) -> None:
    torch.manual_seed(0)
    cls, options = MODELS[name]
    net = cls(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT | options)
    torch.nn.init.normal_(net.positional_embedding if cls is CLIP else net.text.positional_embedding)
    short = text_tower.cut(net, tokens())
    assert short.shape == (3, 7 if name in CUT else 20)
    assert_same(net, short, tokens())


def assert_same(net: Any, short: torch.Tensor, whole: torch.Tensor) -> None:
    parameters = [parameter for name, parameter in net.named_parameters() if not name.startswith(("visual", "logit"))]
    found, expected = text_tower.encode(net, short), F.normalize(net.encode_text(whole), dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(features[:, 0].sum(), parameters) for features in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_towers_that_are_not_known_get_the_whole_context() -> None:
    config = TEXT | {"embed_cls": True, "output_tokens": True}
    net = CoCa(embed_dim=8, vision_cfg=VISION | {"output_tokens": True}, text_cfg=config, multimodal_cfg=TEXT)
    assert text_tower.cut(net, tokens()).shape == (3, 20)


def test_joined_tokens_give_the_features_of_each_part(tiny_model: Path) -> None:
    model = CLIPModel(pretrained=str(tiny_model))
    parts = [["a cat"], ["a rather long text about a cat", ""]]
    tokens = [model.tokenize(part) for part in parts]
    assert tokens[0].shape[1] < tokens[1].shape[1] < 16
    expected = torch.cat([model.encode_text(part) for part in parts])
    torch.testing.assert_close(model.encode_tokens(model.join_tokens(*tokens)), expected, rtol=0, atol=1e-6)


def test_a_text_beyond_the_context_keeps_its_end(tiny_model: Path) -> None:
    model = CLIPModel(pretrained=str(tiny_model))
    found = model.tokenize(["cat " * 40, "cat"])
    assert found.shape == (2, 16)
    assert found[0, -1] == found.max()


def test_a_tower_of_hugging_face_leaves_padding_out(real_model: Path) -> None:
    model = CLIPModel(pretrained=str(real_model), image_size=64).eval()  # it has dropout
    prompts = ["a cat", "a rather long text about a cat"]
    assert model.tokenize(prompts).shape[1] < model.tokenizer(prompts).shape[1] == 32
    expected = F.normalize(model.net.encode_text(model.tokenizer(prompts)), dim=-1)
    torch.testing.assert_close(model.encode_text(prompts), expected, rtol=0, atol=1e-5)
    parts = [model.tokenize([prompt]) for prompt in prompts]
    torch.testing.assert_close(model.encode_tokens(model.join_tokens(*parts)), expected, rtol=0, atol=1e-5)
