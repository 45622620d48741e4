"""Hold-outs and subsets: per class, disjoint, and the same for every run."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
from helpers import ShardWriter

from robustclip.data import CLIPDataModule
from robustclip.data.splits import choose, draw_known, hold_out


class Labelled(list[int]):
    """A data set of labels alone."""

    @property
    def labels(self) -> list[int]:
        return list(self)


DATASET = Labelled([0] * 40 + [1] * 20 + [2] * 10)


def test_a_hold_out_takes_its_share_of_every_class() -> None:
    train, held = hold_out(DATASET, 0.1)  # type: ignore[arg-type]
    assert Counter(DATASET[position] for position in held) == {0: 4, 1: 2, 2: 1}
    assert sorted(train + held) == list(range(len(DATASET)))


def test_a_hold_out_is_no_prefix_of_the_set() -> None:
    _, held = hold_out(Labelled([0] * 100), 0.1)  # type: ignore[arg-type]
    assert held != list(range(10))


def test_a_hold_out_without_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holdout 0\.01 of 70 samples in 3 classes is empty; raise it or set 0"):
        hold_out(DATASET, 0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 10, 69])
def test_a_subset_is_fixed_and_within_what_was_offered(count: int) -> None:
    chosen = choose(DATASET, None, count)  # type: ignore[arg-type]
    assert chosen is not None
    assert len(set(chosen)) == count
    assert chosen == sorted(chosen) == choose(DATASET, None, count)  # type: ignore[arg-type]
    offered = list(range(0, 70, 3))
    within = choose(DATASET, offered, 5)  # type: ignore[arg-type]
    assert within is not None
    assert set(within) < set(offered)


def test_no_limit_keeps_everything() -> None:
    assert choose(DATASET, None, None) is None  # type: ignore[arg-type]
    assert choose(DATASET, None, 1000) == list(range(70))  # type: ignore[arg-type]
    assert choose(DATASET, [3, 5], None) == [3, 5]  # type: ignore[arg-type]


def test_the_hold_out_has_no_image_of_an_unknown_class() -> None:
    train, held = hold_out(Labelled([0, -1] * 20), 0.5)  # type: ignore[arg-type]
    assert len(held) == 10
    assert {position % 2 for position in held} == {0}
    assert len(train) == 30


def test_drawn_classes_are_the_same_in_any_order_of_the_list() -> None:
    keys = ["n07", "n03", "n11", "n02", "n05", "n13"]
    drawn = {keys[label] for label in draw_known(keys, 3, seed=1)}
    assert len(drawn) == 3
    other = sorted(keys)
    assert {other[label] for label in draw_known(other, 3, seed=1)} == drawn
    assert any({other[label] for label in draw_known(other, 3, seed=seed)} != drawn for seed in (2, 3))
    assert draw_known(keys, 6, seed=1) == list(range(6))


def test_classes_are_not_drawn_by_names_that_two_of_them_share() -> None:
    with pytest.raises(ValueError, match="by distinct keys, but 'crane' is twice; give the `name` of the catalogue"):
        draw_known(["crane", "cardigan", "crane"], 2, seed=1)
    with pytest.raises(ValueError, match=r"`known` must be in \[1, 2\], the number of classes, got 3"):
        draw_known(["crane", "cardigan"], 3, seed=1)


def ids(folder: Path, *, seed: int) -> tuple[list[int], list[int]]:
    data = CLIPDataModule("wds:set", root=str(folder), holdout=0.2, batch_size=4, image_size=32, seed=seed)
    data.setup("fit")
    (val,) = data.val_dataloader()
    train = [batch.index.tolist() for batch in data.train_dataloader()]
    return list(itertools.chain(*train)), [index for batch in val for index in batch.index.tolist()]


def test_every_run_seed_shares_its_hold_out_but_not_its_order(tmp_path: Path, write_shards: ShardWriter) -> None:
    write_shards(tmp_path, "set", "train", [15, 15])
    (train, held), (other_train, other_held) = ids(tmp_path, seed=0), ids(tmp_path, seed=1)
    assert held == other_held
    assert Counter(position % 3 for position in held) == {0: 2, 1: 2, 2: 2}
    assert sorted(train + held) == sorted(other_train + other_held) == list(range(30))
    assert train != other_train
