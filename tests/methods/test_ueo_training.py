"""UEO over a whole fit: where its weights come from, what it reads, and what a checkpoint brings back."""

import copy
from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from helpers import quick_trainer
from torch import Tensor
from unlabelled_cases import OPTIONS, Looking, Save, fitted, learnt, shapes

from robustclip.methods import DANCE, POUF, UEO, UPL, TeCoA
from robustclip.methods._shared.context_and_norms import ContextAndNorms
from robustclip.tools.interpolate import interpolate
from robustclip.types import UNKNOWN, Batch

BASELINES: list[tuple[type[ContextAndNorms], dict[str, Any]]] = [(UPL, {}), (POUF, {}), (DANCE, {"weight": 5.0})]


def ueo(**kwargs: object) -> UEO:
    return UEO(**{**OPTIONS, **kwargs})


@pytest.mark.parametrize(("preset", "temperature"), [("official", 1.0), ("msp", 0.01), (0.1, 0.1)])
def test_weights_are_the_zero_shot_certainties_of_whole_images(preset: float | str, temperature: float) -> None:
    """``max_c exp(cos_c / tau) / sum_c exp(cos_c / tau)`` by sample id, whatever the training crops are."""
    found = fitted(ueo(weight_temperature=preset), is_augmented=True).sample_weights
    pretrained, data, count = UEO().eval(), shapes(), 0
    data.setup("fit")
    classes = pretrained.clip.encode_text([f"a photo of a {name}." for name in data.train_task.class_names])
    with torch.no_grad():
        for batch in data.plain_train_dataloader():
            chances = (cases.unit(cases.embed(pretrained, batch.images)) @ classes.T / temperature).double().exp()
            # Cosines in fp32 have an error of 1e-7, which the temperature multiplies.
            expected = (chances / chances.sum(1, keepdim=True)).amax(1).float()
            torch.testing.assert_close(found[batch.index], expected, rtol=1e-6 / temperature, atol=1e-6)
            count += len(batch.index)
    assert found.isfinite().sum() == count == 5 * 28


@pytest.mark.parametrize(
    ("cls", "kwargs"), [*((UEO, {"weights": kind}) for kind in ("confidence", "uniform", "oracle")), *BASELINES]
)
def test_labels_reach_nothing_but_by_the_oracle(cls: type[ContextAndNorms], kwargs: dict[str, Any]) -> None:
    def run(*, is_changing: bool) -> tuple[Tensor, list[int]]:
        looking = Looking(is_changing=is_changing)
        return learnt(fitted(cls(**OPTIONS, **kwargs), looking)), looking.labels

    (given, labels), (changed, noise) = (run(is_changing=flag) for flag in (False, True))
    assert UNKNOWN in labels
    assert UNKNOWN not in noise
    assert torch.equal(given, changed) == (kwargs != {"weights": "oracle"})


@pytest.mark.parametrize(("cls", "kwargs"), [(UEO, {}), *BASELINES])
def test_statistics_and_all_that_is_not_declared_stay(cls: type[ContextAndNorms], kwargs: dict[str, Any]) -> None:
    method = cls(**OPTIONS, **kwargs)
    tensors = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    fitted(method)
    moved = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}
    norms = {
        name for name, module in method.clip.net.visual.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
    }
    assert len(norms) > 10
    assert moved == {
        "context.vectors",
        *(f"clip.net.visual.{name}.{part}" for name in norms for part in ("weight", "bias")),
    }


def test_a_resumed_fit_has_the_weights_and_the_end_of_an_uninterrupted_one(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    whole = fitted(ueo(weight_temperature="msp"), Save(path))
    resumed = fitted(ueo(weight_temperature="msp"), ckpt_path=path)
    assert torch.equal(resumed.sample_weights.nan_to_num(), whole.sample_weights.nan_to_num())
    assert torch.equal(learnt(resumed), learnt(whole))


def test_looking_back_puts_everything_in_its_place() -> None:
    method = fitted(ueo())
    before, start = copy.deepcopy(method.state_dict()), UEO().state_dict()
    with method.pretrained_values():
        assert all(torch.equal(tensor, start[name]) for name, tensor in method.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())


@pytest.mark.parametrize(("cls", "kwargs"), [(UEO, {"weight_temperature": "msp"}), *BASELINES])
def test_a_fit_lowers_its_loss_over_the_training_set(cls: type[ContextAndNorms], kwargs: dict[str, Any]) -> None:
    method, data = cls(**OPTIONS, **kwargs), shapes()
    data.setup("fit")
    every = Batch(*(torch.cat(parts) for parts in zip(*(b[:3] for b in data.plain_train_dataloader()), strict=True)))
    fitted(method)
    with torch.no_grad():
        after = sum(method.training_loss(every).values())
        with method.pretrained_values():
            before = sum(method.training_loss(every).values())
    assert after < before - 0.005


def test_the_zero_shot_end_of_an_interpolation_is_the_pretrained_model(tmp_path: Path) -> None:
    """The context starts at what the pre-trained model determines, so that WiSE-FT takes it along."""
    method = fitted(ueo())
    method.trainer.save_checkpoint(tmp_path / "a.ckpt")
    paths = interpolate(ueo(), tmp_path / "a.ckpt", tmp_path / "out", alphas=(0.0, 1.0))
    for path, expected in zip(paths, (UEO(), method), strict=True):
        state = {**UEO().state_dict(), **torch.load(path, weights_only=True)["state_dict"]}
        assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


def test_upl_keeps_the_surest_answers_of_each_class() -> None:
    method = fitted(UPL(per_class=3, norm_filter="all"))
    pretrained, data, answers = UPL(norm_filter="all").eval(), shapes(), {}
    data.setup("fit")
    classes = pretrained.clip.encode_text([f"a photo of a {name}." for name in data.train_task.class_names])
    with torch.no_grad():
        for batch in data.plain_train_dataloader():
            cosines = cases.unit(cases.embed(pretrained, batch.images)) @ classes.T
            chances = (pretrained.clip.net.logit_scale.exp() * cosines).softmax(1)
            found = zip(*(part.tolist() for part in chances.max(1)), strict=True)
            answers |= dict(zip(batch.index.tolist(), found, strict=True))
    for label in range(5):
        ranked = sorted((chance, index) for index, (chance, answer) in answers.items() if answer == label)
        kept = torch.where(method.pseudo_labels == label)[0].tolist()
        assert len(kept) == min(3, len(ranked))
        # Answers that are equally sure in fp32 may change places.
        assert not kept or min(answers[index][0] for index in kept) >= ranked[-len(kept)][0] - 1e-6
    assert (method.pseudo_labels >= 0).sum() >= 3


def test_upl_minimises_cross_entropy_on_pseudo_labelled_images(tiny_model: Path) -> None:
    method = cases.make(UPL, tiny_model)
    data = cases.batch()
    log_p = method.log_probabilities(data.images)
    labels = method.pseudo_labels[data.index]
    assert labels.tolist() == [1, 2, -1, 0]
    expected = -(log_p[0, 1] + log_p[1, 2] + log_p[3, 0]) / 3
    torch.testing.assert_close(method.training_loss(data)["pseudo_ce"], expected)
    method.pseudo_labels.fill_(-1)
    assert method.training_loss(data)["pseudo_ce"] == 0


def test_a_method_of_labels_refuses_unknown_images() -> None:
    trainer = quick_trainer(max_steps=1)
    with pytest.raises(ValueError, match="TeCoA needs images of known classes"):
        trainer.fit(TeCoA(), datamodule=shapes())
