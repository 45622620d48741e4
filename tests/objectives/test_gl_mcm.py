"""GL-MCM: worked numbers, features of positions written out, methods that change features, and a test under attack."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_test, tiny_clip
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import OODDetection
from robustclip.methods import CLIPAdapter, CRoFT, RobustMethod, TeCoA, TipAdapter, ZeroShot
from robustclip.models.clip import CLIPModel
from robustclip.models.spatial_tokens import self_attended
from robustclip.objectives.gl_mcm import GLMCM
from robustclip.objectives.scores import SCORES, Model, Score
from robustclip.types import Task

WHOLE = [0.31, 0.24, 0.22]
LOCAL = [[0.20, 0.21, 0.19], [0.28, 0.10, 0.15], [0.10, 0.30, 0.12], [0.15, 0.15, 0.15]]
SCALE = torch.tensor(100.0, dtype=torch.float64)
TASK = Task("shades", ("red", "green", "blue"), ("a photo of a {}",))


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 0.351330223), (0.5, 0.539725031), (1.0, 0.728119838)])
def test_the_score_is_that_of_its_authors(weight: float, expected: float) -> None:
    outputs = SCALE * torch.tensor([[WHOLE, *LOCAL]], dtype=torch.float64)
    assert float(GLMCM(weight).value(outputs, SCALE)) == pytest.approx(expected, abs=1e-8)
    permuted = outputs[:, [0, 3, 1, 4, 2]]
    assert torch.equal(GLMCM(weight).value(permuted, SCALE), GLMCM(weight).value(outputs, SCALE))
    if weight == 0:
        assert torch.equal(GLMCM(0).value(outputs, SCALE), SCORES["mcm"].value(outputs[:, 0], SCALE))


def test_positions_have_a_softmax_each() -> None:
    outputs = SCALE * torch.tensor([[WHOLE, row] for row in LOCAL], dtype=torch.float64)
    local = GLMCM(1).value(outputs, SCALE) - GLMCM(0).value(outputs, SCALE)
    assert local.tolist() == pytest.approx([0.336672167, 0.368545980, 0.376789614, 0.333333333], abs=1e-8)


def test_a_block_is_applied_by_hand() -> None:
    block = ResidualAttentionBlock(2, 1).double()
    with torch.no_grad():
        block.attn.in_proj_weight[4:] = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
        block.attn.in_proj_bias.copy_(torch.tensor([9.0, 9, 9, 9, 0.5, 0]))
        block.attn.out_proj.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        block.attn.out_proj.bias.copy_(torch.tensor([0.0, -0.5]))
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.zero_()
        tokens = torch.tensor([[[3.0, 1.0], [0.0, 2.0], [1.0, 4.0]]], dtype=torch.float64)
        assert self_attended(block, tokens)[0, 0].tolist() == pytest.approx([4.499995, 2.49999], abs=1e-6)


def test_equal_tokens_give_the_blocks_own_outputs() -> None:
    torch.manual_seed(0)
    block = ResidualAttentionBlock(12, 3, ls_init_value=0.3).double()
    tokens = torch.randn(2, 1, 12, dtype=torch.float64).expand(2, 5, 12)
    torch.testing.assert_close(self_attended(block, tokens), block(tokens), rtol=0, atol=1e-12)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def by_hand(net: Any, pixels: Tensor) -> Tensor:
    """Features of the patches of a transformer, block by block."""
    visual = net.visual
    patches = F.conv2d(pixels, visual.conv1.weight, stride=visual.patch_size).flatten(2).transpose(1, 2)
    first = visual.class_embedding.expand(len(pixels), 1, -1)
    tokens = layer_norm(torch.cat([first, patches], 1) + visual.positional_embedding, visual.ln_pre)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        tokens = block(tokens)
    width = tokens.shape[-1]
    values = (
        layer_norm(tokens, last.ln_1) @ last.attn.in_proj_weight[2 * width :].T + last.attn.in_proj_bias[2 * width :]
    )
    tokens = tokens + values @ last.attn.out_proj.weight.T + last.attn.out_proj.bias
    tokens = tokens + last.mlp(layer_norm(tokens, last.ln_2))
    return layer_norm(tokens, visual.ln_post)[:, 1:] @ visual.proj


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_positions_of_a_transformer_are_its_patches_written_out(tower: Path, images: Tensor) -> None:
    clip = CLIPModel(pretrained=str(tower)).eval()
    with torch.no_grad():
        whole, local = clip.embed_grid(images)
        assert torch.equal(whole, clip.embed_image(images))
        assert local.shape == (3, 16, 16)
        torch.testing.assert_close(local, by_hand(clip.net, (images - 0.5) / 0.25), rtol=1e-5, atol=1e-5)


def test_positions_of_a_resnet_are_projected_one_by_one(tmp_path: Path, images: Tensor) -> None:
    clip = CLIPModel(pretrained=str(tiny_clip(tmp_path, layers=[1, 1, 1, 1], width=8))).eval()
    seen = []
    clip.net.visual.layer4.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        whole, local = clip.embed_grid(images)
        assert torch.equal(whole, clip.embed_image(images))
        pool, maps = clip.net.visual.attnpool, seen[0]
        for row, column in ((0, 0), (maps.shape[2] - 1, 0)):
            value = pool.v_proj.weight @ maps[1, :, row, column] + pool.v_proj.bias
            expected = pool.c_proj.weight @ value + pool.c_proj.bias
            torch.testing.assert_close(local[1, row * maps.shape[3] + column], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: TeCoA(pretrained=folder),
        lambda folder: TeCoA(pretrained=folder, prompt="padding", prompt_size=4, prompt_tokens=3),
        lambda folder: CRoFT(pretrained=folder),
        lambda folder: CLIPAdapter(pretrained=folder),
    ],
    ids=["TeCoA", "prompted", "CRoFT", "CLIPAdapter"],
)
def test_the_first_row_of_the_grid_is_the_logits_of_every_method(tower: Path, images: Tensor, make: Any) -> None:
    torch.manual_seed(1)
    method: RobustMethod = make(str(tower)).eval()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    method.prepare([TASK])
    with torch.no_grad():
        grid, logits = method.grid_logits(images, "shades"), method.logits(images, "shades")
        assert grid.shape == (3, 17, 3)
        assert torch.equal(grid[:, 0], logits)
        # An image whose patches are all its own whole has no other answer: positions go through the adapter too.
        _, local = method.grid_features(images)
        head, scale = method.head("shades"), method.clip.logit_scale
        torch.testing.assert_close(grid[:, 1:], scale * local @ head.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(local.norm(dim=-1), torch.ones(3, 16))
        if isinstance(method, CRoFT | CLIPAdapter):
            plain = F.normalize(method.clip.embed_grid(images)[1], dim=-1)
            assert not torch.allclose(plain, local, atol=1e-3)


class Changed(ZeroShot):
    """Features of its own, for the image as a whole alone."""

    def image_features(self, images: Tensor) -> Tensor:
        return -super().image_features(images)


def test_methods_and_towers_without_positions_are_refused(tower: Path, tmp_path: Path, images: Tensor) -> None:
    pooled = tiny_clip(tmp_path / "pooled", attentional_pool=True, attn_pooler_heads=2)
    for method, words in (
        (Changed(pretrained=str(tower)), "Changed has image_features but no grid_features, which gl_mcm needs"),
        (ZeroShot(pretrained=str(pooled)), "need an open_clip VisionTransformer .* this tower is a VisionTransformer"),
    ):
        method.prepare([TASK])
        with pytest.raises(ValueError, match=words):
            GLMCM().prepare(method, TASK)
    with pytest.raises(ValueError, match="TipAdapter has logits of its own, and none of the positions of an image"):
        GLMCM().forward(TipAdapter(pretrained=str(tower)), images, "shades")


class OfFeatures(Score):
    name = "of_features"

    def forward(self, model: Model, images: Tensor, task: str) -> Tensor:
        return model.image_features(images)

    def value(self, outputs: Tensor, scale: Tensor) -> Tensor:
        return outputs[:, 0]


COLOURS = [DataSource("shapes:colours", classes="0-5")]


def test_a_test_scores_positions_clean_and_attacked_in_one_pass_each() -> None:
    data = CLIPDataModule(test=COLOURS, unknown=COLOURS, image_size=32, batch_size=36)
    data.connect(limit=12)
    method, passes = ZeroShot(), []
    method.clip.net.visual.register_forward_hook(lambda *call: passes.append(len(call[-1])))
    scores = ["mcm", OfFeatures(), GLMCM(0), "energy"]
    trainer = run_test(method, data, OODDetection(scores=scores, headline="gl_mcm"))
    prefix = "test/colours/detection/colours_unknown"
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found[f"{prefix}/gl_mcm/auroc"] == found[f"{prefix}/mcm/auroc"]
    # The blank image of `prepare`, known and unknown images for all scores at once, and the known ones of the test.
    assert sorted(passes) == [1, 12, 12, 12]
    attack = PGD(eps="4/255", alpha="1/255", steps=3, keep="best")
    trainer = run_test(method, data, OODDetection(scores=["mcm", "gl_mcm"], headline="gl_mcm", attack=attack))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found[f"{prefix}/gl_mcm/attacked/auroc"] < found[f"{prefix}/gl_mcm/auroc"]
