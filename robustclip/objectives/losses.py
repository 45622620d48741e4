"""Losses per sample ``(B,)`` in fp32: distances between two models' outputs, and entropy; and InfoNCE of a batch.

Gradients pass to both arguments; detach the one that must not be trained.
"""

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence
from torch.nn import functional as F


def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """Computes ``KL(q || p) = sum_k q_k (log q_k - log p_k)``, at least 0, the order of distillation.

    With ``p = softmax(logits)`` and ``q = softmax(reference)``, classes weigh as much as the reference's probabilities
    (Hinton et al., https://arxiv.org/abs/1503.02531).

    Args:
        logits: ``(B, K)``.
        reference: logits ``(B, K)``.
    """
    precision = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = (F.log_softmax(values.to(precision), dim=-1) for values in (logits, reference))
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def reverse_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """Computes ``KL(p || q)``, at least 0, with ``p`` and ``q`` as in `kl`.

    Args:
        logits: ``(B, K)``.
        reference: logits ``(B, K)``.
    """
    return kl(reference, logits)


def dirichlet_kl(cosines: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """Computes ``KL(Dir(a) || Dir(b))`` with ``a = exp((cosines + 1) / temperature)``, ``b`` from the reference.

    It is a difference of numbers of the order of ``exp(2 / temperature)``, so the arguments should be in fp64.

    Args:
        cosines: ``(B, K)``.
        reference: cosines ``(B, K)``.
        temperature: temperature of the concentrations.
    """
    a, b = (((values + 1) / temperature).exp() for values in (cosines, reference))
    return kl_divergence(Dirichlet(a), Dirichlet(b))


def evidence(cosines: Tensor, temperature: float) -> Tensor:
    """Computes the sum of `dirichlet_kl`'s concentrations over one plus the largest possible concentration.

    Args:
        cosines: ``(B, K)``.
        temperature: temperature of the concentrations.
    """
    largest = 1 + cosines.new_tensor(-2 / temperature).exp()
    return ((cosines - 1) / temperature).exp().sum(-1) / largest


def widest(values: Tensor) -> Tensor:
    """Converts values to fp64, or to fp32 on a device without fp64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def l1(outputs: Tensor, reference: Tensor) -> Tensor:
    """Computes the mean absolute difference over the K entries.

    Args:
        outputs, reference: ``(B, K)``.
    """
    return (outputs.float() - reference.float()).abs().mean(-1)


def l2(outputs: Tensor, reference: Tensor) -> Tensor:
    """Computes the mean squared difference over the K entries.

    Args:
        outputs, reference: ``(B, K)``.
    """
    return (outputs.float() - reference.float()).square().mean(-1)


def cosine(outputs: Tensor, reference: Tensor) -> Tensor:
    """Computes the cosine distance ``1 - cos``, in [0, 2].

    Args:
        outputs, reference: ``(B, K)``.
    """
    return 1 - F.cosine_similarity(outputs.float(), reference.float(), dim=-1)


def entropy(log_p: Tensor, eps: float = 0.0) -> Tensor:
    """Computes the entropy ``H(p) = -sum_k p_k log(p_k + eps)``, in [0, log K].

    Args:
        log_p: log-probabilities ``(..., K)``.
        eps: constant inside the logarithm; 0 for the exact entropy.
    """
    p = log_p.exp()
    return -(p * (log_p if eps == 0 else (p + eps).log())).sum(-1)


def info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Computes InfoNCE, ``(CE(S, arange) + CE(S^T, arange)) / 2`` with ``S = scale images texts^T``.

    CLIP's loss (Radford et al., https://arxiv.org/abs/2103.00020), a mean over the batch. Row i of the texts belongs to
    image i. The precision is at least fp32, also under autocast: at scale 100, half precision merges close logits.

    Args:
        images: unit features ``(B, D)``.
        texts: unit features ``(B, D)`` of the images' texts.
        scale: inverse temperature, a scalar.

    Returns:
        A scalar; its gradient in ``S`` is ``(softmax_rows(S) + softmax_columns(S) - 2 I) / 2B``.
    """
    with torch.autocast(images.device.type, enabled=False):
        precision = torch.promote_types(images.dtype, torch.float32)
        logits = scale.to(precision) * images.to(precision) @ texts.to(precision).T
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
