"""Losses per sample ``(B,)`` in fp32: distances between two models' outputs, and entropy; and InfoNCE of a batch.

Gradients pass to both arguments; detach the one that must not be trained.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """Computes ``KL(q || p) = sum_k q_k (log q_k - log p_k)``, at least 0, the order of distillation.

    With ``p = softmax(logits)`` and ``q = softmax(reference)``, classes weigh as much as the reference's probabilities
    (Hinton et al., https://arxiv.org/abs/1503.02531).

    Args:
        logits: ``(B, K)``.
        reference: logits ``(B, K)``.
    """
    log_p, log_q = F.log_softmax(logits.float(), dim=-1), F.log_softmax(reference.float(), dim=-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def reverse_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """Computes ``KL(p || q)``, at least 0, with ``p`` and ``q`` as in `kl`.

    Args:
        logits: ``(B, K)``.
        reference: logits ``(B, K)``.
    """
    return kl(reference, logits)


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
