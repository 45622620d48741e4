"""ARF's step against its definition (specification sections 4, 10 and 11), on one process and on two."""

from pathlib import Path
from typing import Any

import arf_processes
import method_cases as cases
import pytest
import torch
from anchor_cases import shapes_pairs, write_pairs, write_table
from helpers import ShardWriter, quick_trainer, tiny_clip
from lightning.pytorch import seed_everything
from ranks import in_background
from test_flyp import gradients, read, symmetric
from torch import Tensor

from robustclip.data import CLIPDataModule
from robustclip.methods import ARF, FLYP
from robustclip.types import Batch, Pairs

SCRIPT = Path(arf_processes.__file__)


def anchored_batch() -> Batch:
    """Five images, the third without a caption, and five pairs, the fourth a copy of the first."""
    generator = torch.Generator().manual_seed(4)
    index = torch.tensor([6, 2, 9, 6, 4])
    images = torch.rand(10, 3, 32, 32, generator=generator)[index]
    pairs = Pairs(images, tuple(f"pair number {number}" for number in index.tolist()), index)
    captions = ("one", "a rather long text about the second image", "", "four", "five five")
    return cases.batch(5)._replace(captions=captions, anchors=pairs)


def test_the_loss_is_the_weighted_sum_of_three_separate_contrasts(tiny_model: Path) -> None:
    data = anchored_batch()
    method = cases.make(ARF, tiny_model, caption_weight=0.7, anchor_weight=0.4)
    assert list(method.training_loss(data)) == ["prompt_nce", "caption_nce", "anchor_nce"]

    def expected(twin: Any, images: Tensor, _: Tensor) -> Tensor:
        assert data.captions is not None
        assert data.anchors is not None
        scale, seen = twin.clip.net.logit_scale.exp(), cases.unit(cases.embed(twin, images))
        prompts = [cases.TASK.prompts[label][0] for label in data.labels]
        captions = [caption or prompt for caption, prompt in zip(data.captions, prompts, strict=True)]
        once = [0, 1, 2, 4]
        pairs = cases.unit(cases.embed(twin, data.anchors.images.double()[once]))
        texts = read(twin, [data.anchors.captions[number] for number in once])
        return (
            symmetric(seen, read(twin, prompts), scale)
            + 0.7 * symmetric(seen, read(twin, captions), scale)
            + 0.4 * symmetric(pairs, texts, scale)
        )

    cases.assert_the_loss_is(method, data, expected)


def test_copies_of_a_pair_are_counted(tiny_model: Path) -> None:
    class Logged(ARF):
        def log(self, name: str, value: Any, **kwargs: Any) -> None:
            logged[name] = float(value)

    logged: dict[str, float] = {}
    cases.make(Logged, tiny_model).training_loss(anchored_batch())
    assert logged == {"train/anchor_collisions": 1}


def test_each_tower_runs_once(tiny_model: Path) -> None:
    method = cases.make(ARF, tiny_model)
    sizes: list[int] = []
    for tower in (method.clip.net.visual, method.clip.net.token_embedding):
        tower.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    method.training_loss(anchored_batch())
    assert sizes == [10, 15]


def test_without_weights_a_step_is_that_of_flyp_bit_for_bit(tiny_model: Path) -> None:
    loss, expected = gradients(cases.make(FLYP, tiny_model), anchored_batch())
    method = cases.make(ARF, tiny_model, caption_weight=0.0, anchor_weight=0.0)
    found_loss, found = gradients(method, anchored_batch())
    assert torch.equal(found_loss, loss)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_without_weights_a_fit_is_that_of_flyp_bit_for_bit(files: Path) -> None:
    def fitted(method: FLYP, **options: Any) -> dict[str, Tensor]:
        seed_everything(0, verbose=False)
        data = CLIPDataModule("wds:even", root=str(files), image_size=32, batch_size=3, holdout=0, **options)
        trainer = quick_trainer(max_steps=3, limit_val_batches=0)
        trainer.fit(method, datamodule=data)
        return method.state_dict()

    model: dict[str, Any] = {"pretrained": str(files / "model"), "warmup_steps": 0}
    expected = fitted(FLYP(**model))
    beside = {"captions": "captions.parquet", "anchors": "anchors"}
    found = fitted(ARF(caption_weight=0.0, anchor_weight=0.0, **model), **beside)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    anchored = fitted(ARF(**model), **beside)
    assert any(not torch.equal(anchored[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({}, {"captions": None}, "caption_weight is 1, but the data have no captions; set data.captions"),
        ({}, {"anchors": None}, "anchor_weight is above 0, but the data have no anchors; set data.anchors"),
        ({}, {"images": torch.rand(5, 3, 20, 20)}, r"anchors are of \(32, 32\) pixels, training images of \(20, 20\)"),
    ],
)
def test_missing_data_are_reported(tiny_model: Path, options: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cases.make(ARF, tiny_model, **options).training_loss(anchored_batch()._replace(**changes))


def test_terms_of_weight_0_need_no_data(tiny_model: Path) -> None:
    plain = cases.batch(3)
    assert list(cases.make(ARF, tiny_model, caption_weight=0, anchor_weight=0).training_loss(plain)) == ["prompt_nce"]
    with pytest.raises(ValueError, match="caption_weight must be at least 0, got -1"):
        ARF(pretrained="shapes", caption_weight=-1.0)


@pytest.fixture(scope="module")
def files(write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, eight images, their captions, and four pairs: two copies of each in a batch over all images."""
    folder = tmp_path_factory.mktemp("arf")
    (folder / "model").mkdir()
    tiny_clip(folder / "model")
    write_shards(folder, "even", "train", [arf_processes.IMAGES])
    write_shards(folder, "uneven", "train", [arf_processes.IMAGES], broken=[5])
    write_table(folder / "captions.parquet", "captions", {n: [f"{n} things", f"a {n}"] for n in range(7)})
    write_pairs(folder / "anchors", shapes_pairs("counts", range(4)))
    return folder


@pytest.fixture(scope="module")
def fits(files: Path) -> Path:
    """Weights after the cases ran on two processes and on one."""
    with in_background(SCRIPT, files):
        arf_processes.main(files, 1)
    return files


@pytest.mark.parametrize("name", arf_processes.CASES)
@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_large_batch(fits: Path, name: str) -> None:
    one, logged = torch.load(fits / f"{name}.1.0.pt")
    start = dict(ARF(pretrained=str(fits / "model")).named_parameters())
    assert max(float((one[key] - start[key]).abs().max()) for key in one) > 1e-2, "nothing was learnt"
    for rank in (0, 1):
        two, of_rank = torch.load(fits / f"{name}.2.{rank}.pt")
        # After two steps at rate 0.1: gradients in fp32, summed in another order.
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5)
        for key in logged:
            torch.testing.assert_close(of_rank[key], logged[key], rtol=1e-5, atol=1e-5)
    if name == "dive":
        assert logged["train/shift_norm"] > 1e-4
    else:
        assert logged["train/anchor_collisions"] == (3 if name == "uneven" else 4)
