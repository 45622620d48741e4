"""LoRA's matrices by hand, in every kind of tower, and what is merged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import tower_cases
from torch import Tensor, nn, tensor
from torch.nn.utils import parametrize

from robustclip.models.clip import CLIPModel
from robustclip.models.lora import LoRA, LowRank, inject, is_factor, merged_state

EVERYWHERE: dict[str, dict[str, Any]] = {
    "vit": {},
    "resnet-attention-pooling": {},
    "convnext": {"targets": ("mlp",)},
    "siglip": {"targets": ("q", "v", "mlp")},
    "hugging-face-text": {"targets": ("q", "k", "v", "out", "mlp")},
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("towers")
    places = {name: folder / name for name in EVERYWHERE}
    for place in places.values():
        place.mkdir()
    return {name: tower_cases.write(name, place) for name, place in places.items()}


def passes(clip: CLIPModel) -> list[Tensor]:
    size = clip.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    return [clip.encode_image(images), clip.encode_text(["a photo of a red circle", "blue"])]


def moved(clip: CLIPModel) -> CLIPModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in clip.net.named_parameters():
            if is_factor(name):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return clip


@pytest.mark.parametrize(("scaling", "factor"), [("rank", 0.5), ("sqrt", 1 / 2**0.5)])
def test_the_factor_of_the_product(scaling: Any, factor: float) -> None:
    assert LoRA(rank=2, alpha=1.0, scaling=scaling).factor == pytest.approx(factor)
    assert LoRA(rank=4).factor == 1


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_part_of_a_fused_matrix_changes_alone(part: int) -> None:
    weight = torch.arange(12.0).view(6, 2)
    change = LowRank(weight, [part], 3, rank=1, factor=0.5)
    assert torch.equal(change(weight), weight)
    assert change.A.abs().max() <= 1 / 2**0.5
    change.A.data, change.B.data = tensor([[[1.0, -2.0]]]), tensor([[[3.0], [4.0]]])
    expected = weight.clone()
    expected[2 * part : 2 * part + 2] += 0.5 * tensor([[3.0, -6.0], [4.0, -8.0]])
    assert torch.equal(change(weight), expected)
    assert change(weight.bfloat16()).dtype == torch.bfloat16


def test_the_gradient_is_that_of_two_products() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4).double(), torch.randn(3, 5, dtype=torch.float64)
    change = LowRank(layer.weight, [0], 1, rank=2, factor=0.7).double()
    change.B.data.normal_()
    parametrize.register_parametrization(layer, "weight", change)
    expected = x @ layer.parametrizations.weight.original.T + 0.7 * x @ change.A[0].T @ change.B[0].T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    found, of_products = (
        torch.autograd.grad(output.square().sum(), (change.A, change.B)) for output in (layer(x), expected)
    )
    torch.testing.assert_close(found, of_products)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_tower_starts_as_it_was_and_merges_without_a_trace(name: str, towers: dict[str, Path]) -> None:
    plain, clip = (CLIPModel(pretrained=str(towers[name])).eval() for _ in range(2))
    inject(clip.net, LoRA(rank=2, towers="both" if name != "convnext" else "image", **EVERYWHERE[name]))
    for ours, theirs in zip(passes(clip), passes(plain), strict=True):  # with gradients: torch's kernel is the same
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        moved(clip)
        found = passes(clip)
        assert not torch.allclose(found[0], passes(plain)[0])
        assert name == "convnext" or not torch.allclose(found[1], passes(plain)[1])
        merged = merged_state(clip.net)
        assert list(merged) == list(plain.net.state_dict())
        plain.net.load_state_dict(merged)
        for ours, theirs in zip(found, passes(plain), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_every_attention_of_the_towers_is_changed(towers: dict[str, Path]) -> None:
    def changed(name: str, **options: Any) -> set[str]:
        clip = CLIPModel(pretrained=str(towers[name]))
        inject(clip.net, LoRA(rank=2, **options))
        return {
            key.replace("parametrizations.", "").removesuffix(".0.A")
            for key, _ in clip.net.named_parameters()
            if key.endswith(".0.A")
        }

    block = "visual.transformer.resblocks.{}."
    assert changed("vit") == {
        f"{block.format(number)}attn.{key}" for number in (0, 1) for key in ("in_proj_weight", "out_proj.weight")
    }
    assert changed("vit", targets=("mlp",), towers="text") == {
        f"transformer.resblocks.0.mlp.{key}.weight" for key in ("c_fc", "c_proj")
    }
    assert changed("resnet-attention-pooling") == {f"visual.attnpool.{key}_proj.weight" for key in "qkvc"}
    layer = "text.transformer.encoder.layer.0."
    assert changed("hugging-face-text", towers="text", targets=("q", "out", "mlp")) == {
        f"{layer}{key}.weight"
        for key in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    }


def test_a_copy_that_is_dropped_leaves_the_original_whole(towers: dict[str, Path]) -> None:
    clip = CLIPModel(pretrained=str(towers["vit"])).eval()
    inject(clip.net, LoRA(rank=2))
    with torch.no_grad():
        before = passes(moved(clip))
        other = copy.deepcopy(clip)
        merged_state(other.net)
        del other
        assert all(torch.equal(*pair) for pair in zip(before, passes(clip), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("convnext", {}, r"lora.targets \['q', 'k', 'v', 'out'\] finds no matrix in the image tower, which has mlp"),
        ("vit", {"rank": 33}, "lora.rank must be at most 32 for visual.transformer.resblocks.0.attn.in_proj_weight"),
        ("vit", {"rank": 0}, "rank must be an integer at least 1, got 0"),
        ("vit", {"targets": ("x",)}, "targets"),
    ],
)
def test_bad_settings_are_refused(name: str, options: dict[str, Any], words: str, towers: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=words):
        inject(CLIPModel(pretrained=str(towers[name])).net, LoRA(**options))
