"""The learnable context against a text tower written out, and what it leaves alone."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import tower_cases
from method_cases import unit
from torch import Tensor, nn

from robustclip.models.clip import CLIPModel
from robustclip.models.context import LearnableContext

NAMES = ("red circle", "blue square", "green star", "red star")
PHRASE = "a photo of a"


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """open_clip takes longer to build a tokenizer than most of these tests take."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(open_clip.factory, "SimpleTokenizer", functools.cache(open_clip.SimpleTokenizer))
        yield


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("vit", "siglip", "hugging-face-text")
    return {name: tower_cases.write(name, tmp_path_factory.mktemp(name)) for name in names}


@pytest.fixture
def clip(tiny_model: Path) -> Any:
    return CLIPModel(pretrained=str(tiny_model)).requires_grad_(False).eval().double()


def moved(context: LearnableContext) -> LearnableContext:
    generator = torch.Generator().manual_seed(1)
    context.vectors.data += 0.05 * torch.randn(context.vectors.shape, generator=generator)
    return context


def read_by_hand(clip: CLIPModel, texts: list[str], context: Tensor | None) -> Tensor:
    """Unit features by a causal pre-norm transformer of heads of 8 over the whole length of 16 tokens."""
    net: Any = clip.net
    tokens = clip.tokenizer(texts)
    x = net.token_embedding.weight[tokens]
    if context is not None:
        x = torch.cat([x[:, :1], context.expand(len(x), -1, -1), x[:, 1 + len(context) :]], dim=1)
    x = x + net.positional_embedding
    hidden = torch.ones(16, 16, dtype=torch.bool).triu(1)
    for block in net.transformer.resblocks:
        stacked = block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in stacked.chunk(3, -1))
        heads = (q @ k.mT / 8**0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = x + block.attn.out_proj(heads.transpose(1, 2).flatten(2))
        inner = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(inner * (1 + torch.erf(inner / 2**0.5)) / 2)
    return unit(net.ln_final(x)[range(len(x)), tokens.argmax(1)] @ net.text_projection)


def test_a_moved_context_is_read_in_place_of_the_phrase(clip: CLIPModel) -> None:
    """Cut behind the longest prompt here, over the whole length there: the features and their gradient are one."""
    context = moved(LearnableContext(clip, PHRASE).double())
    tokens = context.tokenize(clip, NAMES)
    assert tokens.shape[1] < clip.net.context_length
    found = context.encode(clip, tokens)
    expected = read_by_hand(clip, [f"a photo of a {name}." for name in NAMES], context.vectors)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # fp64 in another order of the same sums
    directions = torch.randn(found.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad(each, context.vectors, directions)[0] for each in (found, expected)]
    assert gradients[1].norm() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tower", ["vit", "siglip", "hugging-face-text"])
def test_an_untouched_context_gives_the_features_of_the_phrase(tower: str, towers: dict[str, Path]) -> None:
    clip = CLIPModel(pretrained=str(towers[tower])).eval()
    context = LearnableContext(clip, PHRASE)
    features = context.encode(clip, context.tokenize(clip, NAMES))
    assert torch.equal(features, clip.encode_text([f"a photo of a {name}." for name in NAMES]))
    (gradient,) = torch.autograd.grad(features.square().sum() + features[:, 0].sum(), context.vectors)
    assert (gradient.abs().amax(1) > 0).all(), "every token of the context counts"
    assert not torch.equal(moved(context).encode(clip, context.tokenize(clip, NAMES)), features)


def test_the_context_has_the_tokens_of_the_phrase(clip: CLIPModel, towers: dict[str, Path]) -> None:
    context = LearnableContext(clip, PHRASE)
    ids = clip.tokenizer.encode(PHRASE)
    assert len(ids) == 4
    assert torch.equal(context.vectors.detach(), clip.net.token_embedding.weight[ids].float())
    shapes = CLIPModel()  # whose vocabulary has no word for photo
    assert len(LearnableContext(shapes, PHRASE).vectors) == len(shapes.tokenizer.encode(PHRASE)) == 7
    words = CLIPModel(pretrained=str(towers["hugging-face-text"]))  # no start of the text, whole words
    assert LearnableContext(words, PHRASE).place == slice(0, 4)


def test_a_random_context_is_normal_with_deviation_002(tiny_model: Path) -> None:
    clip = CLIPModel(pretrained=str(tiny_model)).eval()
    torch.manual_seed(0)
    drawn = torch.stack([LearnableContext(clip, None, tokens=8).vectors.detach() for _ in range(100)])
    assert drawn.shape == (100, 8, 16)
    assert abs(drawn.mean()) < 4 * 0.02 / drawn.numel() ** 0.5  # four standard errors
    assert abs(drawn.std() / 0.02 - 1) < 4 / (2 * drawn.numel()) ** 0.5
    clip.double()
    context = LearnableContext(clip, None, tokens=3).double()
    expected = read_by_hand(clip, [f"word word word {name}." for name in NAMES], context.vectors)
    found = context.encode(clip, context.tokenize(clip, NAMES))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_pass", [1, 3, 100])
def test_classes_in_passes_are_exact_and_keep_less(per_pass: int, clip: CLIPModel) -> None:
    context = moved(LearnableContext(clip, PHRASE).double())
    tokens, results = context.tokenize(clip, NAMES), []
    for size in (None, per_pass):
        kept = [0]

        def count(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            features = context.encode(clip, tokens, per_pass=size)
        (gradient,) = torch.autograd.grad(features[:, 0].sum(), context.vectors)
        results.append((features, gradient, kept[0]))
    (features, gradient, whole), (in_passes, gradient_in_passes, parts) = results
    torch.testing.assert_close(in_passes, features, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_in_passes, gradient, rtol=1e-9, atol=1e-12)
    assert parts < 0.2 * whole


def test_underscores_are_spaces(clip: CLIPModel) -> None:
    context = LearnableContext(clip, PHRASE)
    assert torch.equal(context.tokenize(clip, ["red_circle"]), context.tokenize(clip, ["red circle"]))


def test_the_context_does_not_outlive_its_pass(clip: CLIPModel) -> None:
    context = moved(LearnableContext(clip, PHRASE).double())
    texts = [f"a photo of a {name}." for name in NAMES]
    before = clip.encode_text(texts)
    context.encode(clip, context.tokenize(clip, NAMES))
    with pytest.raises(RuntimeError, match="in the middle"), context.inserted(clip):
        raise RuntimeError("in the middle")
    assert torch.equal(clip.encode_text(texts), before)


def test_it_is_fp32_also_beside_a_half_tower(tiny_model: Path) -> None:
    clip = CLIPModel(pretrained=str(tiny_model)).eval().bfloat16()
    context = LearnableContext(clip, PHRASE)
    assert context.vectors.dtype == torch.float32
    assert context.encode(clip, context.tokenize(clip, NAMES)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phrase": "a photo of one of the very many kinds of a thing that there are"}, "fills the 16 tokens"),
        ({"phrase": None, "tokens": 14}, "fills the 16 tokens"),
        ({"phrase": None, "tokens": 0}, "must have at least one token"),
        ({"phrase": ""}, "must have at least one token"),
    ],
)
def test_impossible_contexts_are_refused(options: dict[str, Any], words: str, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=words):
        LearnableContext(CLIPModel(pretrained=str(tiny_model)), **options)


def test_a_tokenizer_that_joins_words_is_refused(clip: CLIPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    context, tokenizer = LearnableContext(clip, PHRASE), clip.tokenizer
    monkeypatch.setattr(clip, "tokenizer", lambda texts: tokenizer([text.replace("a red", "ared") for text in texts]))
    with pytest.raises(ValueError, match="alike before every name"):
        context.tokenize(clip, NAMES)


def test_the_tower_gets_no_gradient(tiny_model: Path) -> None:
    clip = CLIPModel(pretrained=str(tiny_model)).requires_grad_(False).eval()
    context = LearnableContext(clip, PHRASE)
    context.encode(clip, context.tokenize(clip, NAMES)).sum().backward()
    assert [name for name, parameter in clip.named_parameters() if parameter.grad is not None] == []
    assert isinstance(context.vectors, nn.Parameter)
    assert [name for name, _ in context.named_parameters()] == ["vectors"]
