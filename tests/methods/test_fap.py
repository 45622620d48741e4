"""FAP's training step with both prompted towers written out block by block, and its limits."""

import json
from pathlib import Path
from typing import Any

import method_cases as cases
import open_clip
import pytest
import torch
from helpers import save_clip
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks import PGD
from robustclip.methods import FAP
from robustclip.types import Task

BOX = PGD(eps="8/255", alpha="4/255", steps=2)
TEXTS = [f"a photo of a {name}." for name in cases.TASK.class_names]


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with three blocks for images and two for texts."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = open_clip.model.CLIP(**config)
    return save_clip(tmp_path_factory.mktemp("deep"), config, net)


def images_by_hand(method: Any, images: Tensor) -> Tensor:
    """Unit features of images whose last tokens are the prompts, block by block."""
    visual, prompts = method.clip.net.visual, method.context
    pixels = (images - method.clip.mean) / method.clip.std
    patches = F.conv2d(pixels, visual.conv1.weight, stride=8).flatten(2).transpose(1, 2)
    tokens = torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], 1) + visual.positional_embedding
    first = prompts.vectors @ prompts.to_image.weight.T + prompts.to_image.bias
    tokens = visual.ln_pre(torch.cat([tokens, first.expand(len(images), -1, -1)], 1))
    for number, block in enumerate(visual.transformer.resblocks):
        if 0 < number <= len(prompts.rows):
            tokens = torch.cat([tokens[:, :17], prompts.rows[number - 1].expand(len(images), -1, -1)], 1)
        tokens = block(tokens)
    return cases.unit(visual.ln_post(tokens)[:, 0] @ visual.proj)


def texts_by_hand(method: Any) -> Tensor:
    """Unit features of texts whose first two words are the prompts, block by block."""
    net, prompts = method.clip.net, method.context
    tokens = method.clip.tokenizer(TEXTS)
    words = net.token_embedding(tokens)
    words = torch.cat([words[:, :1], prompts.vectors.expand(3, -1, -1), words[:, 3:]], 1) + net.positional_embedding
    for number, block in enumerate(net.transformer.resblocks):
        if 0 < number <= len(prompts.rows):
            layer = prompts.to_text[number - 1]
            rows = prompts.rows[number - 1] @ layer.weight.T + layer.bias
            words = torch.cat([words[:, :1], rows.expand(3, -1, -1), words[:, 3:]], 1)
        words = block(words, attn_mask=net.attn_mask)
    return cases.unit(net.ln_final(words)[range(3), tokens.argmax(1)] @ net.text_projection)


def divergence(z: Tensor, attacked: Tensor) -> Tensor:
    p, q = z.softmax(1), attacked.softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def make(model: Path, **options: Any) -> Any:
    """A method whose prompts are not at their start."""
    method = cases.make(FAP, model, **{"attack": BOX, "depth": 2} | options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in method.context.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return method


@pytest.mark.parametrize("depth", [1, 2])
def test_loss_and_gradient_are_those_of_both_towers_written_out(deep_model: Path, depth: int) -> None:
    def expected(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
        head, scale = texts_by_hand(twin).T, twin.clip.net.logit_scale.exp()
        features, moved = images_by_hand(twin, clean), images_by_hand(twin, attacked)
        z, cosines = scale * features @ head, (features * moved).sum(1)
        second = 1.5 * divergence(z, scale * moved @ head) * (cosines + 1)
        return (cases.cross_entropy(z, data.labels) + second).mean()

    data, method = cases.batch(), make(deep_model, depth=depth)
    learning = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert learning == {f"context.{name}" for name, _ in method.context.named_parameters()}
    assert len(learning) == 3 + 3 * (depth - 1)
    cases.assert_the_loss_is(method, data, expected)  # also that every prompt has a gradient


def test_the_attack_maximises_the_divergence_from_the_clean_answers(deep_model: Path) -> None:
    def objective(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
        head, scale = texts_by_hand(twin).detach().T, twin.clip.net.logit_scale.exp()
        clean_logits = scale * images_by_hand(twin, clean).detach() @ head
        return divergence(clean_logits, scale * images_by_hand(twin, attacked) @ head).sum()

    cases.assert_the_attack_maximises(make(deep_model), cases.batch(), objective)


def test_without_the_second_term_there_is_no_attack(deep_model: Path) -> None:
    method, data = make(deep_model, weight=0.0), cases.batch()
    terms = method.training_loss(data)
    assert list(terms) == ["clean_ce"]
    assert len(method.attack.images) == 0
    torch.testing.assert_close(terms["clean_ce"], F.cross_entropy(method.logits(data.images), data.labels))


def test_an_image_that_is_not_moved_gives_no_divergence(deep_model: Path) -> None:
    terms = make(deep_model, attack=PGD(eps=0, alpha=0, steps=1)).training_loss(cases.batch())
    assert float(terms["adversarial_kl"].detach()) == pytest.approx(0, abs=1e-6)


def test_zero_maps_cut_the_text_side_off(deep_model: Path) -> None:
    method = make(deep_model)
    with torch.no_grad():
        method.context.to_text[0].weight.zero_()
    (gradient,) = torch.autograd.grad(method.head().sum(), method.context.rows[0])
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_prompts_are_gone_after_a_pass_and_recomputed_classes_change_nothing(deep_model: Path) -> None:
    method, few = make(deep_model), make(deep_model, classes_per_pass=2)
    images = cases.batch().images
    before = method.clip.encode_image(images), method.clip.encode_text(TEXTS)
    heads = [each.head() for each in (method, few)]
    method.image_features(images)
    assert torch.equal(method.clip.encode_image(images), before[0])
    assert torch.equal(method.clip.encode_text(TEXTS), before[1])
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(head[:, 0].sum(), [*each.context.rows, each.context.vectors])
        for head, each in zip(heads, (method, few), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_classes_in_another_order_permute_the_logits(deep_model: Path) -> None:
    method, images = make(deep_model), cases.batch().images
    names = cases.TASK.class_names
    method.prepare([Task("forth", names), Task("back", names[::-1])])
    with torch.no_grad():
        forth, back = method.logits(images, "forth"), method.logits(images, "back")
    torch.testing.assert_close(forth.flip(1), back, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # positions of an image leave the prompts out
        whole, local = method.grid_features(images)
        assert torch.equal(whole, method.image_features(images))
    assert local.shape == (4, 16, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 3}, r"depth must be in \[1, 2\], the number of blocks of the smaller tower, got 3"),
        ({"depth": 1, "pretrained": "shapes"}, "deep prompts need open_clip's transformers as both towers"),
        ({"depth": 1, "has_activation_checkpointing": True}, "has_activation_checkpointing must be false"),
        ({"weight": -1.0}, "weight must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_refused(deep_model: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FAP(**{"pretrained": str(deep_model)} | options)


def test_a_checkpoint_holds_the_prompts_alone(deep_model: Path, tmp_path: Path) -> None:
    bold = {"warmup_epochs": 0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
    method = FAP(pretrained=str(deep_model), depth=2, attack=BOX, **bold)
    cases.fit(method, steps=2, shots=1).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {*saved} == {f"context.{name}" for name, _ in method.context.named_parameters()}
    again = FAP(pretrained=str(deep_model), depth=2)
    assert cases.test(again, tmp_path / "a.ckpt")["test/colours/n"] == 4
    for name, parameter in method.context.named_parameters():
        assert torch.equal(parameter, again.context.get_parameter(name)), name
    other = FAP(pretrained=str(deep_model), depth=1)
    with pytest.raises(ValueError, match="trained with depth 2, this run has 1;"):
        cases.test(other, tmp_path / "a.ckpt")
    assert json.loads(json.dumps(again.inference_settings))["depth"] == 2
