"""How far two models' outputs lie apart: two ``(B, K)`` to one value per sample ``(B,)``, in fp32.

Gradients flow into both arguments; what must not learn comes detached. Further, entropy and InfoNCE.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """``KL(q || p) = sum_k q_k (log q_k - log p_k)``, ``p = softmax(logits)`` and ``q = softmax(reference)``.

    The order of distillation (Hinton et al., https://arxiv.org/abs/1503.02531): the reference says what matters.
    """
    log_p, log_q = F.log_softmax(logits.float(), dim=-1), F.log_softmax(reference.float(), dim=-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def reverse_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """``KL(p || q)``, with ``p`` and ``q`` as in `kl`."""
    return kl(reference, logits)


def l1(outputs: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute difference over the K entries."""
    return (outputs.float() - reference.float()).abs().mean(-1)


def l2(outputs: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference over the K entries."""
    return (outputs.float() - reference.float()).square().mean(-1)


def cosine(outputs: Tensor, reference: Tensor) -> Tensor:
    """``1 - cos``, in [0, 2]."""
    return 1 - F.cosine_similarity(outputs.float(), reference.float(), dim=-1)


def entropy(log_p: Tensor, eps: float = 0.0) -> Tensor:
    """``H(p) = -sum_k p_k log(p_k + eps)`` of log-probabilities, in [0, log K]."""
    p = log_p.exp()
    return -(p * (log_p if eps == 0 else (p + eps).log())).sum(-1)


def info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """``(CE(S, arange) + CE(S^T, arange)) / 2``, ``S = scale images texts^T``: each image's text is the row of its own.

    CLIP's loss (Radford et al., https://arxiv.org/abs/2103.00020), a mean over the batch, with at least the precision
    of fp32 also under autocast: at scale 100, half precision cannot tell the logits apart.

    Args:
        images: unit features ``(B, D)``.
        texts: theirs, ``(B, D)``.
        scale: inverse temperature, a scalar.

    Returns:
        A scalar; its gradient in ``S`` is ``(softmax_rows(S) + softmax_columns(S) - 2 I) / 2B``.
    """
    with torch.autocast(images.device.type, enabled=False):
        precision = torch.promote_types(images.dtype, torch.float32)
        logits = scale.to(precision) * images.to(precision) @ texts.to(precision).T
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
