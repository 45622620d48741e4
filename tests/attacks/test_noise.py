"""Random numbers keyed by sample id."""

import numpy as np
import torch

from robustclip.attacks import noise


def murmur(words: np.ndarray) -> np.ndarray:
    words = words.astype(np.uint32)
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x85EBCA6B)
    words ^= words >> np.uint32(13)
    words *= np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))


def test_uniform_equals_the_same_hash_in_unsigned_arithmetic() -> None:
    index, seed = torch.tensor([0, 1, 2**33 + 5]), 7
    expected = []
    for sample in index.tolist():
        key = murmur(murmur(np.array([seed])) ^ np.uint32(sample & 0xFFFFFFFF))
        key = murmur(key ^ np.uint32(sample >> 32))
        expected.append((murmur(murmur(np.arange(12)) ^ key) >> np.uint32(8)) / 2**24)
    drawn = noise.uniform(index, (3, 2, 2), seed=seed)
    np.testing.assert_array_equal(drawn.flatten(1).numpy(), np.stack(expected).astype(np.float32))


def test_a_draw_depends_on_id_and_seed_alone() -> None:
    together = noise.uniform(torch.arange(10), (3, 4, 4), seed=1)
    assert torch.equal(noise.uniform(torch.tensor([7, 2]), (3, 4, 4), seed=1), together[[7, 2]])
    assert not torch.equal(noise.uniform(torch.arange(10), (3, 4, 4), seed=2), together)


def test_draws_have_the_moments_of_their_distribution() -> None:
    index = torch.arange(500)
    flat = noise.uniform(index, (400,), seed=0)
    # 200,000 draws: the standard error of the mean is 0.00065 (uniform) and 0.0022 (normal); 5 of them are allowed.
    assert abs(flat.mean() - 0.5) < 0.0033
    assert abs(flat.var() - 1 / 12) < 0.001
    assert flat.min() >= 0
    assert flat.max() < 1
    bell = noise.normal(index, (400,), seed=0)
    assert abs(bell.mean()) < 0.011
    assert abs(bell.var() - 1) < 0.016
    neighbours = torch.corrcoef(torch.stack([flat[:-1].flatten(), flat[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.012
