"""Implements one ARF training step, which has no published code, and its class prompts in several ways.

* `Separate`: computes each term by itself, as a direct implementation would, with every text on 77 tokens;
* `Ours`: the package;
* `Bare`: one pass of each tower on as many tokens as the batch has, without a framework;
* `WholeText`, `CutText`: the text side alone, forward and backward, on 77 tokens and by the package.

Class prompts are of OpenAI's 80 templates. Captions, and those of the pairs, are sentences of 12 to 27 tokens.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
import ways
from open_clip import get_tokenizer
from open_clip.model import CLIP
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from plain_zero_shot import uniform
from torch import Tensor
from torch.nn import functional as F
from ways import Problem, sgd

if TYPE_CHECKING:
    from robustclip.methods import ARF, RobustMethod

TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


class Texts:
    """Texts of one step, and the images of the pairs."""

    def __init__(self, problem: Problem) -> None:
        size, names = len(problem.labels), problem.class_names
        draws = (uniform(list(range(size)), torch.Size([])) * len(TEMPLATES)).long().tolist()
        labels = problem.labels.tolist()
        self.prompts = [TEMPLATES[draw].format(names[label]) for draw, label in zip(draws, labels, strict=True)]
        self.captions = [f"two people walk past a {names[label]} on a sunny day in the old town" for label in labels]
        self.pair_captions = [f"the {names[label]} of number {n}, seen from the road" for n, label in enumerate(labels)]
        self.pair_images = problem.images.flip(0)
        self.tokenize = get_tokenizer(problem.arch)


def contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Compute CLIP's loss."""
    logits, targets = scale * images @ texts.T, torch.arange(len(images))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class Separate:
    """Each of the three terms runs both towers."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.texts, self.model = problem, Texts(problem), problem.model().train()
        self.parameters = list(self.model.parameters())
        self.optimizer = sgd(self.parameters)
        texts = (self.texts.prompts, self.texts.captions, self.texts.pair_captions)
        self.tokens = [self.texts.tokenize(each) for each in texts]

    def loss(self) -> Tensor:
        """Sums the terms."""
        images, scale = self.problem.images, self.model.logit_scale.exp()
        terms = []
        for seen, tokens in zip((images, images, self.texts.pair_images), self.tokens, strict=True):
            features = self.model.encode_image(self.problem.normalise(seen), normalize=True)
            terms.append(contrast(features, self.model.encode_text(tokens, normalize=True), scale))
        return torch.stack(terms).sum()

    def step(self) -> None:
        """Takes one training step."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.loss())
        self.optimizer.step()


class Bare(Separate):
    """One pass of each tower, on tokens that were computed before."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        tokens = torch.cat(self.tokens)
        self.cut = tokens[:, : int(tokens.argmax(1).max()) + 1]

    def loss(self) -> Tensor:
        """Sums the terms of the parts."""
        images = self.problem.normalise(torch.cat([self.problem.images, self.texts.pair_images]))
        seen, anchors = self.model.encode_image(images, normalize=True).chunk(2)
        prompts, captions, pairs = read_cut(self.model, self.cut).chunk(3)
        matches = ((seen, prompts), (seen, captions), (anchors, pairs))
        scale = self.model.logit_scale.exp()
        return torch.stack([contrast(*match, scale) for match in matches]).sum()


def read_cut(model: CLIP, tokens: Tensor) -> Tensor:
    """Computes unit features from fewer tokens than the context has; they are equal, since the tower is causal."""
    length = tokens.shape[1]
    vectors = model.token_embedding(tokens) + model.positional_embedding[:length]
    vectors = model.ln_final(model.transformer(vectors, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(vectors[torch.arange(len(tokens)), tokens.argmax(1)] @ model.text_projection, dim=-1)


class Ours(ways.Ours):
    """The step through the package, which splits texts into tokens in every step."""

    def __init__(self, problem: Problem) -> None:
        from robustclip.types import Pairs, Task

        super().__init__(problem)
        texts = Texts(problem)
        pairs = Pairs(texts.pair_images, tuple(texts.pair_captions), self.batch.index)
        self.batch = self.batch._replace(captions=tuple(texts.captions), anchors=pairs)
        self.method.prepare_training(Task("train", problem.class_names, TEMPLATES))
        self.parameters = list(self.method.clip.net.parameters())

    def build(self, **options: Any) -> "RobustMethod":
        """Constructs the method."""
        from robustclip.methods import ARF

        return ARF(**options)


class WholeText(Separate):
    """The class prompts on 77 tokens."""

    def step(self) -> None:
        """Encodes the texts, and runs the backward pass of the features' sum in place of a loss."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.model.encode_text(self.tokens[0], normalize=True).sum())


class CutText(Ours):
    """The class prompts by the package, cut behind the longest of all classes and templates."""

    def step(self) -> None:
        """Encodes the texts, and runs the backward pass of their sum."""
        self.optimizer.zero_grad()
        method = cast("ARF", self.method)
        torch.autograd.backward(method.encode_tokens(method.class_prompts(self.batch)).sum())
