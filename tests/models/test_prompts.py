"""TeCoA's visual prompts against a transformer written out (specification section 8)."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import method_cases as cases
import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks import PGD
from robustclip.evaluation.engine import examine
from robustclip.evaluation.probes import repeat
from robustclip.methods import PMGAFT, RobustMethod, TeCoA
from robustclip.models.clip import CLIPModel
from robustclip.models.prompts import Padding, RandomPatch, VisualPrompt

PADDING = {"prompt": "padding", "prompt_size": 4}
BOTH = {**PADDING, "prompt_tokens": 3}
PLACES: dict[str, list[tuple[str, slice, slice]]] = {  # piece, rows, columns of an image of 32 x 32
    "padding": [
        ("up", slice(0, 4), slice(0, 32)),
        ("down", slice(28, 32), slice(0, 32)),
        ("left", slice(4, 28), slice(0, 4)),
        ("right", slice(4, 28), slice(28, 32)),
    ],
    "fixed_patch": [("patch", slice(0, 4), slice(0, 4))],
    "random_patch": [("patch", slice(14, 18), slice(14, 18))],  # in eval mode, in the middle
}


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """open_clip takes longer to build a tokenizer than most of these tests take."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(open_clip.factory, "SimpleTokenizer", functools.cache(open_clip.SimpleTokenizer))
        yield


def pixels_by_hand(method: RobustMethod, images: Tensor, kind: str | None) -> Tensor:
    """``N(R(x)) + P``."""
    resized = F.interpolate(images, (32, 32), mode="bicubic", align_corners=False)
    pixels = (resized - method.clip.mean) / method.clip.std
    for name, rows, columns in PLACES.get(kind or "", []):
        added = torch.zeros_like(pixels)
        added[..., rows, columns] = method.get_parameter(f"prompt.pixels.{name}")
        pixels = pixels + added
    return pixels


def tower_by_hand(visual: Any, pixels: Tensor, tokens: Tensor | None) -> Tensor:
    """A pre-norm transformer of heads of 16 over ``[CLS + e_0, patches + e, tokens]``; its answer is at CLS."""
    patches = F.conv2d(pixels, visual.conv1.weight, stride=8).flatten(2).mT
    first = visual.class_embedding.expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], 1) + visual.positional_embedding
    if tokens is not None:
        x = torch.cat([x, tokens.repeat(len(pixels), 1, 1)], 1)
    x = visual.ln_pre(x)
    for block in visual.transformer.resblocks:
        stacked = block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in stacked.chunk(3, -1))
        heads = (q @ k.mT / 16**0.5).softmax(-1) @ v
        x = x + block.attn.out_proj(heads.transpose(1, 2).flatten(2))
        inner = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(inner * (1 + torch.erf(inner / 2**0.5)) / 2)
    return visual.ln_post(x[:, 0]) @ visual.proj


def logits_by_hand(method: RobustMethod, images: Tensor, kind: str | None = "padding") -> Tensor:
    """``s cos(f(x), t)`` through the prompt."""
    text = method.clip.tokenizer([f"This is a photo of a {name}" for name in cases.TASK.class_names])
    classes = cases.unit(method.clip.net.encode_text(text)).detach()
    tokens = dict(method.named_parameters()).get("prompt.tokens")
    embeddings = tower_by_hand(method.clip.net.visual, pixels_by_hand(method, images, kind), tokens)
    return method.clip.net.logit_scale.exp() * cases.unit(embeddings) @ classes.T


def adversarial_ce(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
    return cases.cross_entropy(logits_by_hand(twin, attacked), cases.batch().labels)


def test_the_papers_padding_has_69840_numbers_from_a_standard_normal() -> None:
    torch.manual_seed(0)
    frame = Padding(30, 224)
    shapes = {name: tuple(piece.shape) for name, piece in frame.named_parameters()}
    assert shapes == {"up": (1, 3, 30, 224), "down": (1, 3, 30, 224), "left": (1, 3, 164, 30), "right": (1, 3, 164, 30)}
    numbers = torch.cat([piece.detach().flatten() for piece in frame.parameters()])
    assert len(numbers) == 3 * (224**2 - 164**2) == 69_840
    assert abs(numbers.mean()) < 4 / 69_840**0.5  # four standard errors
    assert abs(numbers.var() - 1) < 4 * (2 / 69_840) ** 0.5
    assert abs((numbers.abs() < 1).float().mean() - 0.6827) < 4 * (0.6827 * 0.3173 / 69_840) ** 0.5


def test_tokens_and_patches_have_their_shapes(tiny_model: Path) -> None:
    prompt = VisualPrompt(CLIPModel(pretrained=str(tiny_model)), "fixed_patch", size=5, tokens=7)
    shapes = {name: tuple(piece.shape) for name, piece in prompt.named_parameters()}
    assert shapes == {"pixels.patch": (1, 3, 5, 5), "tokens": (1, 7, 32)}


@pytest.mark.parametrize("side", [32, 20])
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("kind", [*PLACES, None])
def test_prompted_features_are_those_of_the_formula(kind: str | None, tokens: int, side: int, tiny_model: Path) -> None:
    if kind is None and tokens == 0:
        pytest.skip("no prompt at all")
    kwargs = {"prompt": kind, "prompt_size": 4, "prompt_tokens": tokens}
    method = cases.in_fp64(cases.make(TeCoA, tiny_model, **kwargs)).eval()
    images = torch.rand(2, 3, side, side, dtype=torch.float64)
    pixels = pixels_by_hand(method, images, kind)
    expected = cases.unit(tower_by_hand(method.clip.net.visual, pixels, method.prompt.tokens))
    # fp64 in another order of the same sums
    torch.testing.assert_close(method.image_features(images), expected, rtol=0, atol=1e-10)
    plain = cases.unit(tower_by_hand(method.clip.net.visual, pixels_by_hand(method, images, None), None))
    torch.testing.assert_close(method.clip.encode_image(images), plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prompts_only", [True, False])
def test_the_loss_and_its_gradients_go_through_the_prompt(prompts_only: bool, tiny_model: Path) -> None:
    method = cases.make(TeCoA, tiny_model, prompts_only=prompts_only, **BOTH)
    cases.assert_the_loss_is(method, cases.batch(), lambda *args: adversarial_ce(*args).mean())
    tower = [parameter.grad is not None for parameter in method.clip.net.visual.parameters()]
    assert set(tower) == {not prompts_only}


def test_the_attack_maximises_the_prompted_loss(tiny_model: Path) -> None:
    method = cases.make(TeCoA, tiny_model, **BOTH)
    cases.assert_the_attack_maximises(method, cases.batch(), lambda *args: adversarial_ce(*args).sum())


def test_an_attack_through_the_prompt_is_stronger_and_stays_in_the_perturbation_set(tiny_model: Path) -> None:
    attack = PGD(eps="8/255", alpha="2/255", steps=10)
    method, data = cases.make(TeCoA, tiny_model, attack=attack, **BOTH), cases.batch()
    blind = method.perturb(data, forward=lambda images: method.clip.encode_image(images) @ method.heads["train"].T)
    aware = method.perturb(data)
    losses = [F.cross_entropy(logits_by_hand(method, images), data.labels) for images in (data.images, blind, aware)]
    assert losses[0] < losses[2]
    assert losses[1] < losses[2]
    assert (aware - data.images).abs().max() <= 8 / 255 + 1e-6
    assert 0 <= aware.min() <= aware.max() <= 1
    method.attack = cases.Recorded(attack)
    cases.assert_the_attack_does_not_depend_on_the_batch(method, data)


def test_a_random_patch_moves_in_training_and_its_attacks_and_rests_in_evaluation(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[tuple[int, int]] = []
    draw = RandomPatch.place
    monkeypatch.setattr(RandomPatch, "place", lambda self: places.append(draw(self)) or places[-1])
    method, data = cases.make(TeCoA, tiny_model, prompt="random_patch", prompt_size=8), cases.batch()
    for _ in range(400):
        method.prompt.pixels(torch.zeros(1, 3, 32, 32))
    assert {row for row, _ in places} == {column for _, column in places} == set(range(25))  # 32 - 8 + 1 of them
    assert len({*places}) > 250  # of 625; 295 are expected of 400 uniform draws
    places.clear()
    method.training_loss(data)
    assert len(places) == len({*places}) == 3  # two steps of the attack and the training pass, with this seed
    method.eval()
    places.clear()
    verdicts = [
        examine(part.images, part.labels, method.logits, PGD(steps=2).members(3), index=part.index, seed=0)
        for part in (data, cases.Batch(*(each[:2] for each in data[:3])))
    ]
    assert set(places) == {(12, 12)}
    assert torch.equal(verdicts[0].by[:2], verdicts[1].by)


def test_a_teacher_sees_no_prompt(tiny_model: Path) -> None:
    def expected(twin: Any, clean: Tensor, attacked: Tensor) -> Tensor:
        student, calm = logits_by_hand(twin, attacked).log_softmax(1), logits_by_hand(twin, clean).log_softmax(1)
        pixels = pixels_by_hand(twin, attacked, None)
        features = cases.unit(tower_by_hand(twin.teacher.clip.net.visual, pixels, None))
        teacher = (twin.clip.logit_scale * features @ twin.heads["train"].double().T).log_softmax(1)
        pulls = [(target.exp() * (target - student)).sum(1).mean() for target in (teacher, calm)]
        return adversarial_ce(twin, clean, attacked).mean() + sum(pulls)

    cases.assert_the_loss_is(cases.make(PMGAFT, tiny_model, **BOTH), cases.batch(), expected)


def test_the_audit_measures_the_image_before_the_prompt(tiny_model: Path) -> None:
    method, images = cases.make(TeCoA, tiny_model, **BOTH).eval(), cases.batch().images
    with torch.no_grad():
        found = repeat(images, method.logits, method.logits(images), clip=method.clip)
    assert found["outside"].max() < 1e-6
