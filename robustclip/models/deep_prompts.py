"""Deep prompts: trained tokens in the first blocks of both towers, which may be frozen."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustclip.models import text_tower
from robustclip.models.clip import CLIPModel
from robustclip.models.context import INITIAL_DEVIATION, LearnableContext, exchanged
from robustclip.models.spatial_tokens import returns_class_token


class DeepPrompts(LearnableContext):
    """A text context with tokens in the first blocks of both towers, which FAP trains (Zhou et al., NeurIPS 2024).

    Behind the patches, before the first norm of the image tower, are ``n`` tokens ``map_0(V)`` of the context ``V``,
    without positions. Before block ``j`` from the second to the last prompted one, they are replaced by trained rows
    ``P_j``, and in the text tower the context's place by ``map_j(P_j)``. Lengths do not change, so that the causal mask
    and the end of a text keep their places.

    Args:
        clip: model of the prompts; its towers pass gradients on and need not be trained.
        phrase: see `LearnableContext`.
        tokens: see `LearnableContext`.
        depth: number of blocks with prompts in both towers; 1 for the inputs alone.

    Raises:
        ValueError: a tower is no transformer of open_clip, is compiled, recomputes activations, or has fewer blocks.
    """

    def __init__(self, clip: CLIPModel, phrase: str | None, *, tokens: int, depth: int) -> None:
        super().__init__(clip, phrase, tokens=tokens)
        visual, texts = clip.net.visual, text_tower.blocks(clip.net)
        is_plain = returns_class_token(visual) and text_tower.is_causal(clip.net) and len(texts) > 0
        if not is_plain or clip.compiled_by is not None:
            raise ValueError("deep prompts need open_clip's transformers as both towers, without compilation")
        if visual.transformer.grad_checkpointing:  # a block is recomputed when its prompts are gone
            raise ValueError("has_activation_checkpointing must be false where blocks have deep prompts")
        blocks = min(len(texts), len(visual.transformer.resblocks))
        if depth > blocks:
            raise ValueError(f"depth must be in [1, {blocks}], the number of blocks of the smaller tower, got {depth}")
        (count, text_width), width = self.vectors.shape, visual.class_embedding.shape[0]
        self.to_image = nn.Linear(text_width, width)
        self.rows = nn.ParameterList(INITIAL_DEVIATION * torch.randn(count, width) for _ in range(1, depth))
        self.to_text = nn.ModuleList(nn.Linear(width, text_width) for _ in range(1, depth))

    @contextmanager
    def inserted(self, clip: CLIPModel, vectors: Tensor | None = None) -> Iterator[None]:
        """Puts context and rows in place in all passes of the model's text tower inside.

        Args:
            clip: model of the text tower.
            vectors: context in place of the trained one, ``(n, width)``.
        """
        rows = [layer(row) for layer, row in zip(self.to_text, self.rows, strict=True)]
        with super().inserted(clip, vectors), _replaced(text_tower.blocks(clip.net)[1:], rows, self.place):
            yield

    @contextmanager
    def inserted_in_images(self, clip: CLIPModel) -> Iterator[None]:
        """Adds the tokens in all passes of the model's image tower inside."""
        visual: Any = clip.net.visual
        first, patches = self.to_image(self.vectors), visual.grid_size[0] * visual.grid_size[1]
        place = slice(1 + patches, 1 + patches + len(first))
        handle = visual.ln_pre.register_forward_pre_hook(lambda _, inputs: exchanged(first, place, inputs[0]))
        try:
            with _replaced(list(visual.transformer.resblocks)[1:], list(self.rows), place):
                yield
        finally:
            handle.remove()


@contextmanager
def _replaced(blocks: Sequence[nn.Module], rows: Sequence[Tensor], place: slice) -> Iterator[None]:
    """Replaces a place in the input ``(B, L, width)`` of each block by its row ``(n, width)``."""

    def replace(row: Tensor, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return exchanged(row, place, inputs[0]), *inputs[1:]

    with ExitStack() as stack:
        for block, row in zip(blocks, rows, strict=False):  # the blocks behind the last row have no prompts
            stack.callback(block.register_forward_pre_hook(partial(replace, row)).remove)
        yield
