"""Samples of a batch are selected and replaced as plain indexing would."""

import pytest
import torch

from robustclip.attacks.rows import replaced, selected

IMAGES = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [3, 1], [2]])
@pytest.mark.parametrize("size", [None, 5])
def test_selected_rows_are_copies_whose_gradients_return_to_their_rows(rows: list[int], size: int | None) -> None:
    images, weights = IMAGES.clone().requires_grad_(), torch.rand(len(rows), 3, 2, 2)
    positions = torch.tensor(rows)
    taken = selected(images, positions, size)
    assert torch.equal(taken, images[[*rows, *rows[:1] * ((size or len(rows)) - len(rows))]])
    assert taken.data_ptr() != images.data_ptr()
    (gradient,) = torch.autograd.grad((taken[: len(rows)].square() * weights).sum(), images, create_graph=True)
    plain = images[positions].square() * weights
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), images)[0])
    (second,) = torch.autograd.grad(gradient.sum(), images)  # defences search with gradients of their own
    torch.testing.assert_close(second[positions], 2 * weights)


def test_repeated_samples_have_no_gradient_even_if_it_is_not_finite() -> None:
    images = IMAGES.clone().requires_grad_()
    taken = selected(images, torch.tensor([1, 2]), 4)
    (gradient,) = torch.autograd.grad(taken[:2].sum() + (taken[2:] * torch.nan).sum(), images)
    assert torch.equal(gradient, torch.zeros_like(IMAGES).index_fill(0, torch.tensor([1, 2]), 1.0))


@pytest.mark.parametrize("where", [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 1, 0]])
def test_replaced_images_are_those_of_the_other_batch(where: list[int]) -> None:
    mask, others = torch.tensor(where).bool(), 1 - IMAGES
    assert torch.equal(replaced(IMAGES, others, mask), torch.where(mask.view(-1, 1, 1, 1), others, IMAGES))
    assert replaced(IMAGES, others.double(), mask).dtype == torch.float64
