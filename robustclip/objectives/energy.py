"""Squared gradient of the energy with respect to linear adapters, in closed form: one backward pass suffices."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]


class Branch(NamedTuple):
    """Features of images or texts before and after their adapter ``W``: ``u = ratio * x W^T + (1 - ratio) * x``.

    Attributes:
        inputs: ``x``, ``(N, D)`` of unit length.
        unit: ``u / |u|``, ``(N, D)``.
        norm: ``|u|``, ``(N, 1)``.
        ratio: weight of the adapter, in [0, 1].
        gram: ``x x^T``, ``(N, N)``, if it is kept for several steps; else None.
    """

    inputs: Tensor
    unit: Tensor
    norm: Tensor
    ratio: float
    gram: Tensor | None = None

    @property
    def products(self) -> Tensor:
        """The products ``x x^T``, ``(N, N)``."""
        return self.inputs @ self.inputs.T if self.gram is None else self.gram


def adapted(inputs: Tensor, adapter: Tensor, ratio: float, gram: Tensor | None = None) -> Branch:
    """Applies an adapter to unit features.

    Args:
        inputs: ``(N, D)``, of unit length.
        adapter: ``(D, D)``.
        ratio: weight of the adapter, in [0, 1].
        gram: ``inputs inputs^T``, if it is known.
    """
    outputs = ratio * (inputs @ adapter.T) + (1 - ratio) * inputs
    norm = outputs.norm(dim=-1, keepdim=True)
    return Branch(inputs, outputs / norm, norm, ratio, gram)


def batch_penalty(images: Branch, texts: Branch, *, reduction: Reduction = "mean", is_shared: bool = False) -> Tensor:
    """Computes the squared gradient of one sum over all images and classes, as CRoFT's code does; a scalar.

    The sum ``F = sum_nk exp(cos(u_n, v_k))`` has neither the energy's logarithm nor a temperature. Let ``a_n`` and
    ``b_k`` be its gradients with respect to ``u_n`` and ``v_k``. The gradients with respect to the adapters are
    ``r a^T X`` and ``r_t b^T T``, and the sum of their squared entries is ``sum_ij <x_i, x_j> <a_i, a_j>``.

    Args:
        images: features of ``N`` images.
        texts: features of ``C`` texts.
        reduction: ``mean`` divides ``F`` by its ``N C`` terms and sums the squares; ``sum`` keeps ``F`` and averages
            the squares over the ``D^2`` entries, which is ``(N C / D)^2`` times as much.
        is_shared: one shift moves both adapters, transposed, so that their gradients are added before squaring.
    """
    p = (images.unit @ texts.unit.T).exp()
    if reduction == "mean":
        p = p / p.numel()
    a = _across(p @ texts.unit, images.unit) * (images.ratio / images.norm)
    b = _across(p.T @ images.unit, texts.unit) * (texts.ratio / texts.norm)
    squares = _form(images.products, a) + _form(texts.products, b)
    if is_shared:
        squares = squares + 2 * ((images.inputs @ texts.inputs.T) * (a @ b.T)).sum()
    return squares if reduction == "mean" else squares / a.shape[1] ** 2


def sample_penalty(images: Branch, texts: Branch, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Computes the squared gradient of each image's energy, averaged over the images.

    The energy is ``E = -log sum_k exp(tau cos(u, v_k))``. With ``S_k = cos(u, v_k)``, ``p = softmax(tau S)`` and unit
    vectors ``u^``, ``v^``::

        |dE/dA|^2 = (r tau / |u|)^2 |m - u^ <u^, m>|^2,   m = sum_k p_k v^_k
        |dE/dB|^2 = sum_kl <t_k, t_l> q_k q_l (1 - S_k^2 - S_l^2 + S_k S_l <v^_k, v^_l>),   q_k = r_t tau p_k / |v_k|

    Args:
        images: features of ``N`` images.
        texts: features of ``C`` texts.
        temperature: ``tau``.
    """
    cosines = images.unit @ texts.unit.T
    p = temperature * (temperature * cosines).softmax(-1)
    of_images = (_across(p @ texts.unit, images.unit) * (images.ratio / images.norm)).square().sum(-1)
    q = p * (texts.ratio / texts.norm.T)
    weighted, products = q * cosines, texts.products
    of_texts = (q @ products * (q - 2 * weighted * cosines)).sum(-1)
    of_texts = of_texts + (weighted @ (products * (texts.unit @ texts.unit.T)) * weighted).sum(-1)
    return (of_images + of_texts).mean()


def _across(vectors: Tensor, directions: Tensor) -> Tensor:
    """Removes from vectors ``(N, D)`` their components along unit directions ``(N, D)``."""
    return vectors - directions * (directions * vectors).sum(-1, keepdim=True)


def _form(gram: Tensor, vectors: Tensor) -> Tensor:
    """Computes ``sum_ij gram_ij <c_i, c_j>`` of a symmetric ``(N, N)`` and vectors ``(N, D)``."""
    form: Tensor = _QuadraticForm.apply(gram, vectors)
    return form


class _QuadraticForm(torch.autograd.Function):
    """Quadratic form whose value and gradient share one large product; autograd, unaware of the symmetry, takes two."""

    @staticmethod
    def forward(ctx: Any, gram: Tensor, vectors: Tensor) -> Tensor:
        product = gram @ vectors
        ctx.save_for_backward(gram, vectors, product)
        return (vectors * product).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        gram, vectors, product = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second differentiation needs the product's own graph
            product = gram @ vectors
        of_gram = gradient * (vectors @ vectors.T) if ctx.needs_input_grad[0] else None
        return of_gram, 2 * gradient * product
