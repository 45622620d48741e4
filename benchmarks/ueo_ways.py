"""Implements one UEO training step in three ways. It has no attack; the context starts at "a photo of a".

The authors' loop reads every prompt on the whole context of 77 tokens at every step, and freezes untrained parameters
too. All ways have equal sample weights, and their logit scale is the trained 100.
"""

from typing import TYPE_CHECKING, Any

import open_clip
import torch
import ways
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional as F
from ways import Problem

if TYPE_CHECKING:
    from robustclip.methods import RobustMethod

PHRASE = "a photo of a"
TOKENS = 4  # of the phrase, behind the start of the text
RATE, EPS, SCALE = 1e-4, 1e-5, 100.0


def sample_weights(problem: Problem) -> Tensor:
    """Draws the confidence (B,) of a zero-shot model on each image."""
    return 0.4 + 0.6 * torch.rand(len(problem.labels), generator=torch.Generator().manual_seed(1))


def freeze(model: CLIP) -> list[Tensor]:
    """Freezes all parameters except the norms of the image tower; returns these."""
    model.requires_grad_(False).eval()
    norms = [each for name, each in model.visual.named_parameters() if "ln" in name or "bn" in name]
    for norm in norms:
        norm.requires_grad_(True)
    return norms


def read(model: CLIP, tokens: Tensor, context: Tensor) -> Tensor:
    """Encodes prompts (C, L) with the context in place of the phrase's words: unit features (C, D)."""
    embeddings = model.token_embedding(tokens)
    x = torch.cat([embeddings[:, :1], context.expand(len(tokens), -1, -1), embeddings[:, 1 + TOKENS :]], dim=1)
    length = tokens.shape[1]
    x = model.transformer(x + model.positional_embedding[:length], attn_mask=model.attn_mask[:length, :length])
    ends = x[torch.arange(len(x)), tokens.argmax(dim=-1)]
    features: Tensor = F.normalize(model.ln_final(ends) @ model.text_projection, dim=-1)
    return features


def entropy(p: Tensor) -> Tensor:
    """Computes the entropy of every row, as the authors do."""
    return -(p * (p + EPS).log()).sum(dim=-1)


class Official:
    """The authors' loop, in own words: whole texts, and a diagonal matrix in place of a product of vectors."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.model, self.weights = problem, problem.model(), sample_weights(problem)
        norms = freeze(self.model)
        self.tokens = self.tokenize()
        words = self.tokens[0, 1 : 1 + TOKENS]
        self.context = self.model.token_embedding.weight[words].detach().clone().requires_grad_()
        self.parameters = [self.context, *norms]
        self.optimizer = torch.optim.SGD(self.parameters, lr=RATE)

    def tokenize(self) -> Tensor:
        """Tokenises one prompt a class, on the whole context: (C, 77)."""
        prompts = [f"{PHRASE} {name.replace('_', ' ')}." for name in self.problem.class_names]
        tokens: Tensor = open_clip.get_tokenizer(self.problem.arch)(prompts)
        return tokens

    def loss(self, p: Tensor) -> Tensor:
        """Computes both terms from the logits (B, C)."""
        sure, unsure = self.weights / self.weights.sum(), (1 / self.weights) / (1 / self.weights).sum()
        return (torch.diag(sure) @ entropy(p)).sum() - entropy((torch.diag(unsure) @ p).sum(dim=0))

    def step(self) -> None:
        """Takes one training step."""
        classes = read(self.model, self.tokens, self.context)
        images = F.normalize(self.model.encode_image(self.problem.normalise(self.problem.images)), dim=-1)
        loss = self.loss((SCALE * images @ classes.T).softmax(dim=-1))
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()


class Bare(Official):
    """Only the needed passes: all texts are cut behind the longest."""

    def tokenize(self) -> Tensor:
        """Cut the empty columns: (C, L)."""
        tokens = super().tokenize()
        return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]

    def loss(self, p: Tensor) -> Tensor:
        """Computes both terms from the logits (B, C)."""
        sure, unsure = self.weights / self.weights.sum(), (1 / self.weights) / (1 / self.weights).sum()
        return sure @ entropy(p) - entropy(unsure @ p)


class Ours(ways.Ours):
    """The step through the package."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.parameters = [parameter for group in self.method.parameter_groups() for parameter in group["params"]]
        self.optimizer = torch.optim.SGD(self.parameters, lr=RATE)

    def build(self, **options: Any) -> "RobustMethod":
        """Constructs the method, with the weights of the samples in place of a pass over a data set."""
        from robustclip.methods import UEO

        method = UEO(**options | {"attack": None})
        method.sample_weights = sample_weights(self.problem)
        return method
