"""UEO's step against its definition (specification sections 3 and 4)."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import method_cases as cases
import open_clip
import pytest
import torch
from torch import Tensor
from unlabelled_cases import class_features

from robustclip.methods import UEO
from robustclip.types import UNKNOWN

EPS = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """open_clip takes longer to build a tokenizer than most of these tests take."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(open_clip.factory, "SimpleTokenizer", functools.cache(open_clip.SimpleTokenizer))
        yield


def loss_by_hand(p: Tensor, weights: Tensor, *, trade: float = 1.0, eps: float = EPS) -> Tensor:
    """``sum_i v_i H(p_i) - trade H(sum_i u_i p_i)``, sample by sample and class by class."""
    batch, classes = p.shape
    total, inverse = sum(weights), sum(1 / w for w in weights)
    loss = p.new_zeros(())
    for i in range(batch):
        for c in range(classes):
            loss = loss - weights[i] / total * p[i, c] * (p[i, c] + eps).log()
    for c in range(classes):
        share = sum(1 / weights[i] / inverse * p[i, c] for i in range(batch))
        loss = loss + trade * share * (share + eps).log()
    return loss


def problem(batch: int = 6, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits and weights, in fp64."""
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.rand(batch, generator=generator, dtype=torch.float64) + 0.05


def ueo(model: Path, **kwargs: Any) -> Any:
    return cases.make(UEO, model, **kwargs)


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("trade", [1.0, 0.3, 0.0])
def test_the_loss_is_the_double_sum(trade: float, is_exact: bool, tiny_model: Path) -> None:
    logits, weights = problem()
    method = ueo(tiny_model, marginal_weight=trade, exact_entropy=is_exact)
    found = total(method.universal_entropy(logits.log_softmax(1), weights))
    expected = loss_by_hand(logits.softmax(1), weights, trade=trade, eps=0 if is_exact else EPS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_gradient_in_the_logits_is_the_specified_one(tiny_model: Path) -> None:
    """``g_ic = -v_i (log p_ic + 1) + u_i (log pbar_c + 1)``; through the softmax ``p_i (g_i - <p_i, g_i>)``."""
    logits, weights = problem()
    method = ueo(tiny_model, exact_entropy=True)
    (found,) = torch.autograd.grad(total(method.universal_entropy(logits.log_softmax(1), weights)), logits)
    p = logits.detach().softmax(1)
    v, u = weights / weights.sum(), (1 / weights) / (1 / weights).sum()
    g = -v[:, None] * (p.log() + 1) + u[:, None] * ((u @ p).log() + 1)
    expected = p * (g - (p * g).sum(1, keepdim=True))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def test_certain_answers_leave_the_entropy_of_the_weighted_histogram(tiny_model: Path) -> None:
    logits = torch.tensor([[200.0, 0, 0], [0, 200, 0], [0, 200, 0]]).double()
    weights = torch.tensor([1.0, 0.5, 0.25]).double()  # inverse weights 1, 2, 4
    terms = ueo(tiny_model).universal_entropy(logits.log_softmax(1), weights)
    histogram = (1 / 7, 6 / 7)
    assert terms["entropy"] == pytest.approx(0, abs=1.1e-5)  # -log(1 + 1e-5)
    assert terms["marginal_entropy"] == pytest.approx(sum(h * math.log(h + EPS) for h in histogram), abs=1e-12)


def test_extreme_logits_have_finite_gradients(tiny_model: Path) -> None:
    for is_exact in (False, True):
        logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, -1e4]], requires_grad=True)
        method = ueo(tiny_model, exact_entropy=is_exact)
        total(method.universal_entropy(logits.log_softmax(1), torch.tensor([0.4, 1.0]))).backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def answers(twin: Any, images: Tensor) -> Tensor:
    """``softmax(s cos(f(x), t))`` from the raw open_clip towers."""
    cosines = cases.unit(cases.embed(twin, images)) @ class_features(twin).T
    return (twin.clip.net.logit_scale.exp() * cosines).softmax(1)


@pytest.mark.parametrize(
    ("options", "weights", "trade"),
    [
        ({}, "stored", 1.0),
        ({"weights": "uniform"}, "equal", 1.0),
        ({"weights": "uniform", "marginal_weight": 0.0}, "equal", 0.0),
        ({"weights": "oracle"}, "known", 1.0),
        ({"learns": "context"}, "stored", 1.0),
        ({"learns": "norms"}, "stored", 1.0),
        ({"classes_per_pass": 2}, "stored", 1.0),
    ],
)
def test_the_step_is_that_of_the_definition(
    options: dict[str, Any], weights: str, trade: float, tiny_model: Path
) -> None:
    method = ueo(tiny_model, **options)
    with torch.no_grad():
        method.context.vectors += 0.1 * torch.randn_like(method.context.vectors)
    method.prepare_training(cases.TASK)  # a context that does not learn is encoded once
    data = cases.batch()._replace(labels=torch.tensor([0, UNKNOWN, 2, UNKNOWN]))
    given = {
        "stored": method.sample_weights[data.index].double(),
        "equal": torch.ones(4).double(),
        "known": torch.tensor([1.001, 0.001, 1.001, 0.001]).double(),
    }

    def expected(twin: Any, images: Tensor, _: Tensor) -> Tensor:
        return loss_by_hand(answers(twin, images), given[weights], trade=trade)

    cases.assert_the_loss_is(method, data, expected)


def test_equal_weights_are_infomax(tiny_model: Path) -> None:
    """``mean_i H(p_i) - H(mean_i p_i)``, whatever the weight is."""
    logits, _ = problem()
    p = logits.softmax(1)
    rows = -(p * (p + EPS).log()).sum(1).mean()
    expected = rows + (p.mean(0) * (p.mean(0) + EPS).log()).sum()
    for weight in (1.0, 0.2):
        terms = ueo(tiny_model).universal_entropy(logits.log_softmax(1), torch.full((6,), weight).double())
        torch.testing.assert_close(total(terms), expected, rtol=1e-12, atol=1e-14)


def test_the_default_recipe_is_the_papers(tiny_model: Path) -> None:
    method = ueo(tiny_model, context_lr=3e-4)
    optimizer = method.optimizer(method.parameter_groups())
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 1e-4]
    for group in optimizer.param_groups:
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0, 0, False)
    assert (UEO(pretrained=str(tiny_model)).context_lr, method.warmup_steps, method.schedule) == (1e-4, 0, "cosine")
    assert (method.temperature, ueo(tiny_model, weight_temperature="msp").temperature) == (1.0, 0.01)
    assert method.takes_unknown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "random"}, "weights must be one of confidence, uniform, oracle, got 'random'"),
        ({"weight_temperature": 0.0}, "must be above 0 or one of official, msp, got 0.0"),
        ({"weight_temperature": "paper"}, "must be above 0 or one of official, msp, got 'paper'"),
    ],
)
def test_options_of_another_name_are_refused(options: dict[str, Any], words: str, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=words):
        UEO(pretrained=str(tiny_model), **options)


@pytest.mark.parametrize("seed", range(3))
def test_unknown_images_become_less_certain_than_by_minimal_entropy_alone(seed: int, tiny_model: Path) -> None:
    """Points around three known and two unknown directions, and a linear tower that learns."""
    generator = torch.Generator().manual_seed(seed)
    directions = cases.unit(torch.randn(5, 8, generator=generator))
    kinds = torch.arange(300) % 5
    points = cases.unit(directions[kinds] + 0.25 * torch.randn(300, 8, generator=generator))
    weights = (points @ directions[:3].T / 0.1).softmax(1).amax(1)
    method, certainties = ueo(tiny_model), []
    for trade, given in ((0.0, torch.ones(300)), (1.0, weights)):
        tower = torch.eye(8, requires_grad=True)
        optimizer = torch.optim.SGD([tower], lr=0.3)
        method.marginal_weight = trade
        for _ in range(100):
            log_p = (10 * cases.unit(points @ tower) @ directions[:3].T).log_softmax(1)
            optimizer.zero_grad()
            total(method.universal_entropy(log_p, given)).backward()
            optimizer.step()
        certainties.append(log_p.exp().amax(1)[kinds >= 3].mean())
    before = (10 * points @ directions[:3].T).softmax(1).amax(1)[kinds >= 3].mean()
    by_entropy, by_ueo = certainties
    assert before < by_ueo < by_entropy
