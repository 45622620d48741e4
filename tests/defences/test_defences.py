"""Every reference defence computes the numbers of its paper, on inputs that can be computed by hand."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import decode_jpeg, encode_jpeg

from robustclip.defences import DBD, ET3, JPEG, MAC, RTPT, TTC, CLIPure, Defence, GaussianNoise, ResizeAndPad
from robustclip.defences.random_views import RandomView
from robustclip.methods import TipAdapter, ZeroShot
from robustclip.types import Task

TASK = "t"
IDS = torch.tensor([3, 11])


class RobustMethod:
    """A stand-in for a method whose embedding is ``W x`` of the flattened image, and whose head is the identity."""

    def __init__(self, weights: Tensor, head: Tensor | None = None) -> None:
        self.weights = weights
        self.clip = SimpleNamespace(embed_image=self.embed, logit_scale=torch.tensor(2.0), encode_text=self.text)
        self.heads = {TASK: torch.eye(len(weights)) if head is None else head}
        self.texts: list[list[str]] = []

    def embed(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights.T

    def text(self, texts: list[str]) -> Tensor:
        self.texts.append(texts)
        return F.normalize(torch.ones(len(texts), len(self.weights)), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(self.embed(images), dim=-1)

    def logits(self, images: Tensor, task: str = TASK) -> Tensor:
        return 2.0 * self.embed(images) @ self.heads[task].T


def linear(outputs: int = 2, side: int = 2) -> Any:
    torch.manual_seed(0)
    return RobustMethod(torch.randn(outputs, 3 * side * side))


def pictures(count: int = 2, side: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(count, 3, side, side) * 0.5 + 0.25


def purified(defence: Defence, method: Any, images: Tensor, **more: Any) -> Tensor:
    return defence.purified(method, images, TASK, **{"index": IDS[: len(images)], "draw": 0, **more})


# TTC


def moved(method: Any, x: Tensor, start: Tensor, alpha: float, eps: float, steps: int) -> list[Tensor]:
    """The moves of a counterattack on a linear embedding, whose gradient is ``2 W^T W d``."""
    moves = [start]
    for _ in range(steps):
        gradient = 2 * (moves[-1].flatten(1) @ method.weights.T @ method.weights).view_as(x)
        moves.append((moves[-1] + alpha * gradient.sign()).clamp(-eps, eps))
    return moves


@pytest.mark.parametrize("tau", [0.0, 100.0])
def test_ttc_weights_its_moves_where_noise_moves_the_embedding_little(tau: float) -> None:
    method, x, defence = linear(), pictures(), TTC("4/255", "1/255", 2, tau=tau, beta=2.0)
    start = 4 / 255 * (2 * defence.uniform(IDS, (3, 2, 2), draw=0) - 1)
    moves = moved(method, x, start, 1 / 255, 4 / 255, 2)
    weights = [math.exp(2.0 * k) for k in range(3)]
    mean = sum(w * m for w, m in zip(weights, moves, strict=True)) / sum(weights)
    expected = x + (mean if tau else start)
    assert torch.allclose(purified(defence, method, x), expected, atol=1e-6)


def test_ttc_compares_the_relative_change_of_the_embedding_with_tau() -> None:
    method, x = linear(), pictures()
    start = 4 / 255 * (2 * TTC().uniform(IDS, (3, 2, 2), draw=0) - 1)
    rho = method.embed(start).norm(dim=1) / method.embed(x).norm(dim=1)
    between = float(rho.mean())
    assert rho.min() < between < rho.max()
    below, above = (int(number) for number in rho.argsort())
    result = purified(TTC(tau=between), method, x)
    assert torch.allclose(result[above], x[above] + start[above], atol=1e-6)
    assert not torch.allclose(result[below], x[below] + start[below], atol=1e-4)


def test_ttc_stays_in_the_valid_range() -> None:
    method, x = linear(), torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    result = purified(TTC("8/255", "4/255", 4), method, x)
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1


# MAC


def test_mac_without_further_views_adds_its_weighted_counterattack() -> None:
    method, x, defence = linear(), pictures(), MAC("8/255", steps=4, views=0, tau=0.05, width=0.01)
    start = 8 / 255 * (2 * defence.uniform(IDS, (3, 2, 2), draw=0, part=1) - 1)
    last = moved(method, x, start, 2 / 255, 8 / 255, 4)[-1]
    other = RandomView().apply(x, defence, index=IDS, draw=0, part=0)
    change = method.embed(other - x).norm(dim=1) / method.embed(x).norm(dim=1)
    weight = 1 / (1 + (-(change - 0.05) / 0.01).exp())
    expected = method.logits(x + weight.view(-1, 1, 1, 1) * last)
    assert torch.allclose(defence.answer(method, x, TASK, index=IDS), expected, atol=1e-5)
    assert float(weight.min()) > 0.01 or float(weight.max()) < 0.99


def test_mac_averages_its_views_and_has_a_gradient_in_its_surrogate_alone() -> None:
    method, x, defence = linear(side=8), pictures(side=8).requires_grad_(), MAC(views=2)
    answer = defence.answer(method, x, TASK, index=IDS)
    assert not answer.requires_grad
    stand_in = defence.surrogate(method, x, TASK, index=IDS, draw=0)
    assert torch.equal(stand_in.detach(), answer)
    (gradient,) = torch.autograd.grad(stand_in.sum(), x)
    assert gradient.abs().sum() > 0


# ET3


def test_et3_steps_down_the_energy() -> None:
    method, x = linear(3), pictures()
    defence = ET3(eps=1.0, alpha=2.5, steps=1, temperature=2.0)
    # E = -T log sum exp(z / T) with z = 2 W x has the gradient -2 W^T softmax(z / T).
    gradient = -2 * ((method.logits(x) / 2.0).softmax(1) @ method.weights).view_as(x)
    step = 2.5 * 2 / 224 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(purified(defence, method, x), x - step, atol=1e-6)
    near = purified(ET3(eps="1/255", alpha=2.5, steps=3), method, x)
    assert float((near - x).abs().max()) <= 1 / 255 + 1e-7


# CLIPure


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("length", [30.0, 0.3])
def test_clipure_turns_by_the_closed_form_angle(steps: int, length: float) -> None:
    """In the plane of u and b, a step turns u by atan(length) towards b, whichever side it is on."""
    start = math.radians(75.0)
    u, b = torch.tensor([[math.cos(start), math.sin(start)]]).double(), torch.tensor([1.0, 0.0]).double()
    angle = start
    for _ in range(steps):
        angle -= math.copysign(math.atan(length), angle)
    turned = CLIPure(steps, length).turned(u, b)
    assert torch.allclose(turned, torch.tensor([[math.cos(angle), math.sin(angle)]]).double(), atol=1e-9)


def test_clipure_returns_to_its_input_after_an_even_number_of_long_steps() -> None:
    torch.manual_seed(2)
    b = F.normalize(torch.randn(16).double(), dim=0)
    side = torch.randn(64, 16).double()
    side = F.normalize(side - (side @ b)[:, None] * b, dim=1)
    cosines = torch.linspace(0.15, 0.30, 64).double()[:, None]
    u = cosines * b + (1 - cosines**2).sqrt() * side
    turned = CLIPure().turned(u, b)
    assert torch.allclose(turned, u, atol=1e-9)
    assert not torch.allclose(CLIPure(steps=9).turned(u, b), u, atol=0.1)
    u.requires_grad_()
    weights = torch.randn(64, 16).double()
    cut = torch.autograd.grad((weights * CLIPure().turned(u, b)).sum(), u)[0]
    whole = torch.autograd.grad((weights * CLIPure().turned(u, b, is_whole=True)).sum(), u)[0]
    assert float(cut.norm() / whole.norm()) < 1e-9  # shrunk by the length at each of ten steps


def test_clipure_encodes_its_blank_text_once_per_classifier() -> None:
    method, x, defence = linear(4), pictures(), CLIPure(templates=("a photo of a {c}.", "a {c} there"))
    for _ in range(3):
        defence.answer(method, x, TASK)
    assert method.texts == [["a photo of a .", "a  there"]]
    method.heads = {TASK: torch.eye(4)}
    defence.answer(method, x, TASK)
    assert len(method.texts) == 2


# DBD


def test_dbd_moves_the_feature_by_the_mean_of_the_surest_views() -> None:
    feature = F.normalize(torch.tensor([[1.0, 0.0, 0.0]]), dim=1)
    views = torch.stack([torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[1.0, 0.3, 0.0]]), torch.tensor([[0.0, 0, 9]])])
    entropies = torch.tensor([[0.1], [0.2], [0.9]])
    agree = DBD(3, 2).moved(feature, views, entropies)
    assert torch.allclose(agree, F.normalize(torch.tensor([[1.0, 2.5 * 0.4, 0.0]]), dim=1))
    apart = torch.stack([torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.5]]), views[2]])
    # The mean move is (0, .25, .25), at 45 degrees to each of the two: .707 is below the coherence of .8.
    differ = DBD(3, 2).moved(feature, apart, entropies)
    assert torch.allclose(differ, F.normalize(torch.tensor([[1.0, 0.25, 0.25]]), dim=1))


def test_dbd_answers_by_the_head_and_refuses_logits_of_another_kind() -> None:
    method, x = linear(4, side=8), pictures(side=8)
    defence = DBD(3, 2, factor=0.0, coherence=0.0)
    answer = defence.answer(method, x, TASK, index=IDS)
    assert torch.allclose(answer, 2.0 * method.image_features(x), atol=1e-5)  # no move: the undefended features
    with pytest.raises(ValueError, match="DBD changes features, but TipAdapter computes logits of its own"):
        defence.classify(TipAdapter(), method.image_features(x), TASK)


# R-TPT


def test_r_tpt_takes_one_step_of_adamw_down_the_entropy_of_the_surest_views() -> None:
    """Logits (a v, 0) have less entropy at larger |v|, so that the first step of AdamW is ``lr sign(v)``."""
    slopes = torch.tensor([3.0, -2.0, 0.01, 0.02, 0.03])
    start = torch.tensor([[-2.0, 0.5]], requires_grad=True)
    scores = slopes * start[0, 0] + torch.tensor([0.0, 0, 0, 0, 1.0]) * start[0, 1]
    logits = torch.stack([scores, torch.zeros(5)], 1)
    for _ in range(2):  # the step of one image leaves the graph and the start to the next
        tuned = RTPT(views=5, kept=0.4, lr=0.01).tuned(start, logits)
        # The two surest views have the slopes 3 and -2; the second number is not theirs, and only decays.
        assert torch.allclose(tuned, torch.tensor([[-2.0 - 0.01 + 1e-4 * 2.0, 0.5 - 1e-4 * 0.5]]), atol=1e-6)
        assert torch.equal(start, torch.tensor([[-2.0, 0.5]]))
        assert start.grad is None
        assert not tuned.requires_grad


def test_r_tpt_weights_views_by_their_nearest_other_views() -> None:
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # cosines .6, 0 and .8
    one, two = (torch.tensor(values) for values in ([0.6, 0.8, 0.8], [0.3, 0.7, 0.4]))
    assert torch.allclose(RTPT(3, neighbours=1, temperature=0.5).weights(features), (one / 0.5).softmax(0))
    assert torch.allclose(RTPT(3, neighbours=20, temperature=0.5).weights(features), (two / 0.5).softmax(0))
    with pytest.raises(ValueError, match="views must be at least 2"):
        RTPT(1)


def test_r_tpt_without_its_step_averages_the_logits_of_its_views() -> None:
    method, defence = ZeroShot().eval(), RTPT(4, kept=0.5)
    method.prepare([Task(TASK, ("red", "green", "blue"), ("a photo of a {}.",))])
    x = pictures(2, 32).requires_grad_()
    views = [x, *(RandomView().apply(x, defence, index=IDS, draw=0, part=part) for part in range(3))]
    logits = torch.stack([method.logits(view, TASK) for view in views], 1)
    weights = torch.stack([defence.weights(part) for part in torch.stack([method.image_features(v) for v in views], 1)])
    expected = (weights[..., None] * logits).sum(1)
    answer = defence.surrogate(method, x, TASK, index=IDS, draw=0)
    assert torch.allclose(answer, expected, atol=1e-3)
    tuned = defence.answer(method, x, TASK, index=IDS)
    assert not torch.allclose(tuned, answer, atol=1e-3)
    alone = torch.cat([defence.answer(method, x[[k]], TASK, index=IDS[[k]]) for k in (0, 1)])
    assert torch.allclose(tuned, alone, atol=1e-3)  # one context per sample
    (gradient,) = torch.autograd.grad(tuned.sum(), x)
    assert gradient.abs().amax((1, 2, 3)).min() > 0


# Simple defences


@pytest.mark.parametrize("quality", [20, 75])
def test_jpeg_is_that_of_the_encoder(quality: int) -> None:
    images = (pictures(2, 16) * 255).round() / 255
    result = purified(JPEG(quality), linear(side=16), images)
    for image, decoded in zip(images, result, strict=True):
        reference = decode_jpeg(encode_jpeg((image * 255).to(torch.uint8), quality)).float() / 255
        assert torch.equal(decoded, reference)
    assert not torch.equal(result, images)


def test_noise_is_averaged_over_its_copies() -> None:
    method, x, defence = linear(3), pictures(), GaussianNoise(0.1, 3)
    draws = [0.1 * defence.normal(IDS, (3, 2, 2), draw=4, part=copy) for copy in range(3)]
    expected = torch.stack([method.logits(x + noise).softmax(1) for noise in draws]).mean(0)
    answer = defence.answer(method, x, TASK, index=IDS, draw=4)
    assert torch.allclose(answer.softmax(1), expected, atol=1e-6)
    noise = GaussianNoise().normal(torch.arange(500), (3, 8, 8), draw=0)
    assert abs(float(noise.std()) - 1) < 0.01


def test_a_resized_and_padded_image_keeps_its_content() -> None:
    images = torch.ones(2, 3, 20, 20)
    result = purified(ResizeAndPad(1.5), linear(side=20), images)
    assert result.shape == images.shape
    # The image covers (side / 30)^2 of the canvas, where side is drawn from 20 to 30; the rest is black.
    sides = 20 + (ResizeAndPad(1.5).uniform(IDS, (3,), draw=0)[:, 0] * 11).long()
    assert torch.allclose(result.mean((1, 2, 3)), (sides / 30) ** 2, atol=0.03)
    same = purified(ResizeAndPad(1.0), linear(side=20), pictures(2, 20))
    assert torch.allclose(same, pictures(2, 20), atol=1e-6)


# Every defence


RANDOM = [GaussianNoise(copies=2), ResizeAndPad(1.3), TTC(), MAC(), DBD(3, 2)]


@pytest.mark.parametrize("defence", RANDOM, ids=lambda defence: type(defence).__name__)
def test_random_numbers_depend_on_sample_and_draw_alone(defence: Defence) -> None:
    method, x = linear(3, side=8), pictures(2, 8)
    state = torch.get_rng_state()
    both = defence.answer(method, x, TASK, index=IDS)
    alone = torch.cat([defence.answer(method, x[[k]], TASK, index=IDS[[k]]) for k in (1, 0)]).flip(0)
    assert torch.allclose(both, alone, atol=1e-5)
    assert torch.equal(both, defence.answer(method, x, TASK, index=IDS))
    assert not torch.allclose(both, defence.answer(method, x, TASK, index=IDS, draw=1), atol=1e-5)
    assert not torch.allclose(both, defence.answer(method, x, TASK, index=IDS + 1), atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="is random and needs the sample ids"):
        defence.answer(method, x, TASK)


@pytest.mark.parametrize(
    "defence", [*RANDOM, JPEG(), ET3(), CLIPure(), RTPT(3)], ids=lambda defence: type(defence).__name__
)
def test_a_defence_leaves_no_trace_in_the_method_and_works_in_inference_mode(defence: Defence) -> None:
    method = ZeroShot(defence=defence).eval()
    method.prepare([Task(TASK, ("red", "green", "blue"), ("a {} shape",))])
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    for parameter in method.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        x = pictures(2, 32).clone()
        answer = method.answers(x, TASK, index=IDS.clone())
    assert answer.shape == (2, 3)
    assert answer.isfinite().all()
    assert not answer.requires_grad
    assert set(method.state_dict()) == set(before) == set(ZeroShot().state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert torch.equal(method.logits(pictures(2, 32), TASK), ZeroShot.logits(method, pictures(2, 32), TASK))
    assert defence.description["class"] == type(defence).__name__


def test_views_have_finite_gradients_also_of_grey_images() -> None:
    images = torch.full((2, 3, 12, 12), 0.5, requires_grad=True)
    view = RandomView(probability=1.0).apply(images, GaussianNoise(), index=IDS, draw=0, part=0)
    (gradient,) = torch.autograd.grad(view.square().sum(), images)
    assert gradient.isfinite().all()
    assert float(gradient.abs().sum()) > 0
    nothing = RandomView(0.0, 0.0, 0.0, probability=0.0).apply(
        pictures(2, 12), GaussianNoise(), index=IDS, draw=0, part=0
    )
    assert torch.allclose(nothing, pictures(2, 12), atol=1e-5)


def test_own_tensors_of_a_defence_are_in_its_description_and_not_in_the_checkpoint() -> None:
    class Mask(Defence):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((1,), value))

    weights = [Mask(value).description["weights"] for value in (1.0, 1.0, 2.0)]
    assert weights[0] == weights[1] != weights[2]
    assert not [name for name in ZeroShot(defence=Mask(1.0)).state_dict() if "mask" in name]


def test_embeddings_in_the_place_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.defence needs images"):
        JPEG().answer(linear(), torch.zeros(2, 5), TASK)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResizeAndPad(0.9), "largest must be at least 1"),
        (lambda: DBD(3, 4), "kept must be at most views"),
        (lambda: JPEG(0), "quality must be an integer in"),
        (lambda: TTC(eps=4), "pixel units"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
