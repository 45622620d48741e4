"""Learnable text context: trained vectors around a class name, in place of word embeddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustclip.models.clip import CLIPModel

INITIAL_DEVIATION = 0.02  # standard deviation of a random context, as in CoOp and in CLIP's own token embeddings
FILLER = "x"  # one token in every vocabulary; a placeholder that a random context replaces before encoding


class LearnableContext(nn.Module):
    """A trained text context that all classes share (CoOp, Zhou et al., IJCV 2022, https://arxiv.org/abs/2109.01134).

    Each class's text is ``[start] ctx_1 ... ctx_n NAME . [end]``: a prompt is tokenised with the words of the phrase,
    and the context replaces the tower's embeddings of these words. Thus names follow the context, texts are truncated
    as usual, and a context that starts at a phrase gives the features of its prompts. Underscores in names are spaces.

    Args:
        clip: model of the context; its text tower passes gradients on and need not be trained.
        phrase: text whose embeddings are the start; null for a random start, N(0, 0.02).
        tokens: length ``n`` of a random context; a phrase has its own length.

    Raises:
        ValueError: the phrase has no token, or the context leaves no space for a name.
    """

    def __init__(self, clip: CLIPModel, phrase: str | None = "a photo of a", *, tokens: int = 16) -> None:
        super().__init__()
        self.phrase = " ".join([FILLER] * tokens) if phrase is None else phrase
        empty, phrase_only, longer = clip.tokenizer(["", self.phrase, f"{self.phrase} {FILLER}"])
        if torch.equal(phrase_only, longer):
            raise ValueError(
                f"a context of {self.phrase!r} fills the {len(longer)} tokens of the tower; take a shorter phrase"
            )
        # The phrase begins where its tokens differ from those of an empty text, and ends where a name would follow.
        self.place = slice(_common(empty, phrase_only), _common(phrase_only, longer))
        self.phrase_tokens = phrase_only[self.place]
        if len(self.phrase_tokens) == 0:
            raise ValueError(f"the context must have at least one token, got {self.phrase!r}; null starts at random")
        embeddings = clip.token_embedding.weight[self.phrase_tokens.to(clip.mean.device)]
        start = embeddings.detach().float()  # fp32, for small steps
        self.vectors = nn.Parameter(INITIAL_DEVIATION * torch.randn_like(start) if phrase is None else start)

    def tokenize(self, clip: CLIPModel, class_names: Sequence[str]) -> Tensor:
        """Tokenises the classes' prompts as ``(C, L)`` on the model's device, with the phrase in place of the context.

        Args:
            clip: model of the tokenizer.
            class_names: ``C`` names.

        Raises:
            ValueError: the tokenizer splits the phrase differently before some name.
        """
        tokens = clip.tokenize([f"{self.phrase} {name.replace('_', ' ')}." for name in class_names])
        if not (tokens[:, self.place] == self.phrase_tokens).all():
            raise ValueError(f"the tokenizer must read {self.phrase!r} alike before every name; take another phrase")
        return clip.join_tokens(tokens)

    def encode(
        self, clip: CLIPModel, tokens: Tensor, *, per_pass: int | None = None, vectors: Tensor | None = None
    ) -> Tensor:
        """Encodes tokens of `tokenize` as unit class features ``(C, D)``, with gradients for the context.

        Args:
            clip: model of the text tower.
            tokens: ``(C, L)``.
            per_pass: number of classes whose activations are in memory at once, the others being recomputed in the
                backward pass; null for all.
            vectors: context in place of the trained one, ``(n, width)``.
        """
        encode = partial(self._encode, clip, vectors)
        if per_pass is None:
            return encode(tokens)
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in torch.split(tokens, per_pass)])

    def _encode(self, clip: CLIPModel, vectors: Tensor | None, tokens: Tensor) -> Tensor:
        with self.inserted(clip, vectors):
            return clip.encode_tokens(tokens)

    @contextmanager
    def inserted(self, clip: CLIPModel, vectors: Tensor | None = None) -> Iterator[None]:
        """Puts the context in place of the phrase in all passes of the model's text tower inside.

        Args:
            clip: model of the text tower.
            vectors: context in place of the trained one, ``(n, width)``.
        """
        context = self.vectors if vectors is None else vectors
        hook = partial(exchanged, context, self.place)
        handle = clip.token_embedding.register_forward_hook(lambda _, __, embeddings: hook(embeddings))
        try:
            yield
        finally:
            handle.remove()


def exchanged(context: Tensor, place: slice, embeddings: Tensor) -> Tensor:
    """Replaces a place in embeddings by the context; a place behind the last token appends it.

    Args:
        context: ``(n, width)``.
        place: positions of ``n`` tokens.
        embeddings: ``(N, L, width)``.
    """
    rows = context.to(embeddings.dtype).expand(len(embeddings), -1, -1)
    return torch.cat([embeddings[:, : place.start], rows, embeddings[:, place.stop :]], dim=1)


def _common(one: Tensor, other: Tensor) -> int:
    """Counts the tokens ``(L,)`` at the start of two texts until they first differ."""
    return int((one == other).int().cumprod(0).sum())
