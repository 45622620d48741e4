"""Learnable text context: the words around a class name, as numbers in place of word embeddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robustclip.models.clip import CLIPModel

INITIAL_DEVIATION = 0.02  # of a random context, as in CoOp and in CLIP's own token embeddings
FILLER = "x"  # one token in every vocabulary; a random context takes its place before it is read


class LearnableContext(nn.Module):
    """One context for all classes (CoOp, Zhou et al., IJCV 2022, https://arxiv.org/abs/2109.01134).

    Each class reads ``[start] ctx_1 ... ctx_n NAME . [end]``: a prompt is tokenised with the words of the phrase, and
    the tower's embeddings of these words are exchanged for the context. So names stand behind the context, the text is
    cut as any other, and a context that starts at a phrase gives the features of its prompts. Underscores in names are
    spaces.

    Args:
        clip: the model that it is for; its text tower lets gradients through and need not learn.
        phrase: whose embeddings are the start; null for a random one, N(0, 0.02).
        tokens: length ``n`` of a random context; a phrase has its own.

    Raises:
        ValueError: a phrase of no token, or a context that leaves no room for a name.
    """

    def __init__(self, clip: CLIPModel, phrase: str | None = "a photo of a", *, tokens: int = 16) -> None:
        super().__init__()
        self.phrase = " ".join([FILLER] * tokens) if phrase is None else phrase
        empty, words, longer = clip.tokenizer(["", self.phrase, f"{self.phrase} {FILLER}"])
        if torch.equal(words, longer):
            raise ValueError(f"a context of {self.phrase!r} fills the {len(words)} tokens of the tower; take a shorter")
        self.place = slice(_common(empty, words), _common(words, longer))
        self.words = words[self.place]
        if len(self.words) == 0:
            raise ValueError(f"the context must have at least one token, got {self.phrase!r}; null starts at random")
        start = clip.token_embedding.weight[self.words.to(clip.mean.device)].detach().float()  # fp32 for small steps
        self.vectors = nn.Parameter(INITIAL_DEVIATION * torch.randn_like(start) if phrase is None else start)

    def tokenize(self, clip: CLIPModel, class_names: Sequence[str]) -> Tensor:
        """Tokens ``(C, L)`` of the prompts, on the model's device.

        Raises:
            ValueError: a tokenizer that reads the phrase otherwise before a name.
        """
        tokens = clip.tokenize([f"{self.phrase} {name.replace('_', ' ')}." for name in class_names])
        if not (tokens[:, self.place] == self.words).all():
            raise ValueError(f"the tokenizer must read {self.phrase!r} alike before every name; take another phrase")
        return clip.join_tokens(tokens)

    def encode(self, clip: CLIPModel, tokens: Tensor, *, per_pass: int | None = None) -> Tensor:
        """Tokens ``(C, L)`` of `tokenize` to unit class features ``(C, D)``, with gradients in the context.

        Args:
            clip: whose text tower reads.
            tokens: of the prompts.
            per_pass: keep the activations of this many classes alone, and read all others again in the backward pass;
                null keeps those of all.
        """
        read = partial(self._read, clip)
        if per_pass is None:
            return read(tokens)
        return torch.cat([checkpoint(read, part, use_reentrant=False) for part in torch.split(tokens, per_pass)])

    def _read(self, clip: CLIPModel, tokens: Tensor) -> Tensor:
        with self.inserted(clip):
            return clip.encode_tokens(tokens)

    @contextmanager
    def inserted(self, clip: CLIPModel) -> Iterator[None]:
        """The passes of the model's text tower inside read the context in place of the phrase."""
        handle = clip.token_embedding.register_forward_hook(lambda _, __, embeddings: self._exchange(embeddings))
        try:
            yield
        finally:
            handle.remove()

    def _exchange(self, embeddings: Tensor) -> Tensor:
        """``(N, L, width)`` with the context at its place."""
        context = self.vectors.to(embeddings.dtype).expand(len(embeddings), -1, -1)
        return torch.cat([embeddings[:, : self.place.start], context, embeddings[:, self.place.stop :]], dim=1)


def _common(one: Tensor, other: Tensor) -> int:
    """Number of tokens ``(L,)`` that two texts begin with alike."""
    return int((one == other).int().cumprod(0).sum())
