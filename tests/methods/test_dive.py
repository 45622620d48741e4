"""DiVE's training step against the worked numbers of its specification, and its limits."""

from pathlib import Path
from typing import Any

import method_cases as cases
import pytest
import torch
from anchor_cases import shapes_pairs, write_pairs
from helpers import ShardWriter, quick_trainer, tiny_clip
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from test_arf import anchored_batch
from test_flyp import gradients
from torch import Tensor, tensor

from robustclip.data import CLIPDataModule
from robustclip.methods import FLYP, DiVE
from robustclip.types import Pairs

U = [[0.1, 0.0], [0.0, 0.2]]
V = [[0.1, 0.1], [-0.1, 0.1]]


def doubles(rows: Any) -> Tensor:
    return tensor(rows, dtype=torch.float64)


def given(model: Path, *, new: Any, old: Any, **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """A method whose features of two pairs are given, two columns each, and the trained ones, with gradients."""
    method: Any = cases.make(DiVE, model, **options).double()
    images, texts = (doubles(rows).requires_grad_() for rows in new)
    labelled = torch.eye(2, dtype=torch.float64)
    method.encode_images = lambda *_: torch.cat([labelled, images])
    method.encode_tokens = lambda *_: torch.cat([labelled, texts])
    method.teacher.encode_image = lambda _: doubles(old[0])
    method.teacher.encode_tokens = lambda _: doubles(old[1])
    method.shift = torch.zeros(2, dtype=torch.float64)
    data = cases.batch(2)
    return method, data._replace(anchors=Pairs(data.images, ("one", "two"), data.index)), images, texts


def test_the_losses_of_given_differences(tiny_model: Path) -> None:
    method, data, u, v = given(tiny_model, new=(U, V), old=([[0.0] * 2] * 2,) * 2, decay=0.5)
    method.shift = 2 * doubles([0.02, 0.03]) - doubles([0.025, 0.1])  # the step makes it [0.02, 0.03]
    terms = method.training_loss(data)
    assert float(terms["average_vector"].detach()) == pytest.approx(33.6, abs=1e-9)
    assert float(terms["pair_vector"].detach()) == pytest.approx(15, abs=1e-9)
    gradients = torch.autograd.grad(terms["average_vector"] + terms["pair_vector"], (u, v))
    torch.testing.assert_close(gradients[0], 1000 * doubles([[0.08, -0.13], [0.08, 0.27]]), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients[1], 1000 * doubles([[0.08, 0.17], [-0.22, -0.03]]), rtol=0, atol=1e-9)


def test_the_average_moves_before_the_losses_use_it(tiny_model: Path) -> None:
    method, data, *_ = given(tiny_model, new=(U, V), old=([[0.0] * 2] * 2,) * 2, average_weight=1.0, pair_weight=0.0)
    terms = method.training_loss(data)
    torch.testing.assert_close(method.shift, doubles([0.00025, 0.001]), rtol=0, atol=1e-12)
    assert float(terms["average_vector"].detach()) == pytest.approx(0.044577125, abs=1e-12)
    assert terms.keys() == {"prompt_nce", "average_vector"}
    method.training_loss(data)
    torch.testing.assert_close(method.shift, doubles([0.0004975, 0.00199]), rtol=0, atol=1e-12)
    method.decay = 0.0
    assert float(method.training_loss(data)["average_vector"].detach()) == pytest.approx(0.02375, abs=1e-12)


def test_the_losses_of_unit_features(tiny_model: Path) -> None:
    new = [cases.unit(doubles(rows)).tolist() for rows in ([[4, 3], [1, 2]], [[1, 0.5], [0, 1]])]
    old = [cases.unit(doubles(rows)).tolist() for rows in ([[3, 4], [0, 2]], [[1, 0], [1, 1]])]
    method, data, *_ = given(tiny_model, new=new, old=old)
    terms = method.training_loss(data)
    torch.testing.assert_close(method.shift, doubles([-0.0004136650, 0.0010863350]), rtol=0, atol=1e-9)
    found = float((terms["average_vector"] + terms["pair_vector"]).detach())
    assert found == pytest.approx(1245.246486 + 300, abs=1e-6)


def test_weights_of_0_are_flyp_bit_for_bit(tiny_model: Path) -> None:
    for data in (anchored_batch(), cases.batch(5)):
        loss, expected = gradients(cases.make(FLYP, tiny_model), data)
        found_loss, found = gradients(cases.make(DiVE, tiny_model, average_weight=0.0, pair_weight=0.0), data)
        assert torch.equal(found_loss, loss)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_first_step_is_flyps(tiny_model: Path, micro_batch: int | None) -> None:
    def fresh(cls: type[FLYP]) -> Any:
        method = cls(pretrained=str(tiny_model), micro_batch=micro_batch)
        method.freeze_untrained()
        method.prepare_training(cases.TASK)
        return method

    ours, theirs = fresh(DiVE), fresh(FLYP)
    terms = ours.training_loss(anchored_batch())
    assert float(terms["average_vector"].detach()) < 1e-6
    assert float(terms["pair_vector"].detach()) < 1e-6
    _, expected = gradients(theirs, anchored_batch())
    _, found = gradients(ours, anchored_batch())
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 5e-4 * other.abs().max() + 1e-4  # 1000 times rounding
    assert not [name for name in ours.state_dict() if "teacher" in name]
    assert all(not parameter.requires_grad for parameter in ours.teacher.parameters())


def test_the_terms_are_those_of_both_towers(tiny_model: Path) -> None:
    """A moved tower, against raw open_clip passes of it and of the pre-trained one."""
    method, data = cases.make(DiVE, tiny_model), anchored_batch()
    assert data.anchors is not None
    with torch.no_grad():
        method.clip.net.text_projection += 0.02
        start = DiVE(pretrained=str(tiny_model))
        tokens = method.clip.tokenizer(list(data.anchors.captions))
        u = cases.unit(cases.embed(method, data.anchors.images)) - cases.unit(cases.embed(start, data.anchors.images))
        v = cases.unit(method.clip.net.encode_text(tokens)) - cases.unit(start.clip.net.encode_text(tokens))
    terms = method.training_loss(data)
    m = 0.01 * torch.cat([u, v]).mean(0)
    torch.testing.assert_close(method.shift, m, rtol=1e-4, atol=1e-7)
    expected = 1000 * ((u - m).square().sum(1) + (v - m).square().sum(1)).mean()
    torch.testing.assert_close(terms["average_vector"].detach(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        terms["pair_vector"].detach(), 1000 * (u - v).square().sum(1).mean(), rtol=1e-4, atol=1e-6
    )
    assert terms["pair_vector"] <= 2 * terms["average_vector"]


def test_a_fit_keeps_the_average_and_resumes_bit_for_bit(write_shards: ShardWriter, tmp_path: Path) -> None:
    write_shards(tmp_path, "few", "train", [8])
    write_pairs(tmp_path / "anchors", shapes_pairs("counts", range(4)))
    tiny_clip(tmp_path / "model")

    first, resumed = (
        DiVE(
            pretrained=str(tmp_path / "model"),
            warmup_steps=0,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
        )
        for _ in range(2)
    )
    path = tmp_path / "step=2.ckpt"
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    for method, source in ((first, None), (resumed, path)):
        seed_everything(0, verbose=False)
        data = CLIPDataModule(
            "wds:few",
            root=str(tmp_path),
            image_size=32,
            batch_size=2,
            holdout=0,
            anchors="anchors",
            anchor_choice="pool",
        )
        trainer = quick_trainer(keep, enable_checkpointing=True, max_steps=4, limit_val_batches=0)
        trainer.fit(method, datamodule=data, ckpt_path=source, weights_only=True)
    checkpoint = torch.load(path, weights_only=True)
    saved = checkpoint["state_dict"]
    assert checkpoint["shift"].norm() > 0
    assert not torch.equal(checkpoint["shift"], first.shift)
    assert torch.equal(resumed.shift, first.shift)
    assert not [name for name in saved if "teacher" in name]
    again = resumed.state_dict()
    assert [name for name, value in first.state_dict().items() if not torch.equal(value, again[name])] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1"),
        ({"pair_weight": -1.0}, "pair_weight must be at least 0, got -1"),
        ({"arch": "ViT-B-32", "pretrained": None}, "a teacher needs a pre-trained model"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DiVE(**options)


def test_missing_pairs_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="average_weight or pair_weight is above 0, but the data have no anchors"):
        cases.make(DiVE, tiny_model).training_loss(cases.batch())
