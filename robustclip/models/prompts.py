"""Visual prompts: trained pixels and tokens that are added to the input of an image tower, which may be frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.models.clip import CLIPModel
from robustclip.models.spatial_tokens import returns_class_token

PromptKind = Literal["padding", "fixed_patch", "random_patch"]


class VisualPrompt(nn.Module):
    """Visual prompt that TeCoA trains instead of weights (https://arxiv.org/abs/2212.07016, section 3.2).

    A prompt ``P`` is added to the resized and normalised pixels (Bahng et al., https://arxiv.org/abs/2203.17274), and
    ``n`` tokens follow the patches into the tower (VPT-shallow, Jia et al., https://arxiv.org/abs/2203.12119):

        v = N(R(x)) + P,   [CLS + e_0, patches + e, tokens] -> ln_pre -> blocks -> the output of CLS

    Thus tokens have no position. All values start from N(0, 1), as in the authors' code.

    Args:
        clip: model of the prompt.
        kind: ``padding`` is a frame, ``fixed_patch`` a square in the upper left corner, ``random_patch`` a square at a
            position that is drawn for every pass; null adds nothing to the pixels.
        size: width of the frame, or side of the square, in pixels of the tower's input.
        tokens: number of tokens.

    Raises:
        ValueError: the kind is unknown, the size does not fit the image, the number of tokens is negative, or the tower
            cannot use tokens.
    """

    def __init__(self, clip: CLIPModel, kind: PromptKind | None, *, size: int, tokens: int) -> None:
        super().__init__()
        self.pixels = _for_pixels(kind, size, clip.image_size)
        self.tokens = nn.Parameter(torch.randn(1, tokens, _token_width(clip.net.visual))) if tokens else None

    @contextmanager
    def inserted(self, clip: CLIPModel) -> Iterator[None]:
        """Adds the prompt in all passes of the model's image tower inside the context."""
        visual = clip.net.visual
        # The hooks are removed after the pass, so that a copy of the tower, such as a teacher, has no prompt. They run
        # last, so that other hooks on the tower's input still get the image.
        handles = [visual.register_forward_pre_hook(lambda _, inputs: self.pixels(inputs[0]))]
        if self.tokens is not None:
            handles.append(visual.ln_pre.register_forward_pre_hook(lambda _, inputs: self._append(inputs[0])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Lets a random patch move inside the context even in eval mode, which an attack during training needs."""
        patches = [module for module in self.modules() if isinstance(module, RandomPatch)]
        for patch in patches:
            patch.is_moving = True
        try:
            yield
        finally:
            for patch in patches:
                patch.is_moving = False

    def _append(self, sequence: Tensor) -> Tensor:
        """Appends the tokens to a sequence ``(B, L, width)``."""
        assert self.tokens is not None
        return torch.cat([sequence, self.tokens.to(sequence.dtype).expand(len(sequence), -1, -1)], dim=1)


class Padding(nn.Module):
    """A frame that is added to pixels ``(B, 3, side, side)``.

    Args:
        size: width of the frame, in pixels.
        side: side of the image, in pixels.
    """

    def __init__(self, size: int, side: int) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(1, 3, size, side)) for _ in range(2))
        self.left, self.right = (nn.Parameter(torch.randn(1, 3, side - 2 * size, size)) for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        """Adds the frame to every image."""
        inside = self.left.shape[2]
        middle = torch.cat([self.left, self.left.new_zeros(1, 3, inside, inside), self.right], dim=3)
        return pixels + torch.cat([self.up, middle, self.down], dim=2)


class FixedPatch(nn.Module):
    """A square that is added to pixels ``(B, 3, side, side)`` in their upper left corner.

    Args:
        size: side of the square, in pixels.
        side: side of the image, in pixels.
    """

    def __init__(self, size: int, side: int) -> None:
        super().__init__()
        self.patch = nn.Parameter(torch.randn(1, 3, size, size))
        self.room = side - size

    def forward(self, pixels: Tensor) -> Tensor:
        """Adds the square to every image."""
        top, left = self.place()
        return pixels + F.pad(self.patch, (left, self.room - left, top, self.room - top))

    def place(self) -> tuple[int, int]:
        """Returns the numbers of rows above and of columns left of the square."""
        return 0, 0


class RandomPatch(FixedPatch):
    """A square at a uniformly random position, which all images of a pass share.

    In evaluation it is in the middle, where the authors' code draws a position too: a prediction must depend on the
    image alone, not on the passes before it.
    """

    is_moving = False

    def place(self) -> tuple[int, int]:
        """Returns the numbers of rows above and of columns left of the square."""
        if not (self.training or self.is_moving):
            return self.room // 2, self.room // 2
        top, left = torch.randint(self.room + 1, (2,)).tolist()
        return top, left


KINDS: dict[PromptKind, type[Padding | FixedPatch]] = {
    "padding": Padding,
    "fixed_patch": FixedPatch,
    "random_patch": RandomPatch,
}


def _for_pixels(kind: PromptKind | None, size: int, side: int) -> nn.Module:
    if kind is None:
        return nn.Identity()
    largest = (side - 1) // 2 if kind == "padding" else side
    if not 1 <= size <= largest:
        raise ValueError(f"prompt_size must be in [1, {largest}] for {kind} on images of {side} pixels, got {size}")
    return KINDS[kind](size, side)


def _token_width(visual: Any) -> int:
    """Returns the width of a token.

    Raises:
        ValueError: the tower is no open_clip transformer, or pools over its tokens.
    """
    if not returns_class_token(visual):
        raise ValueError(
            f"prompt_tokens needs an open_clip VisionTransformer whose output is its class token, this tower is a"
            f" {type(visual).__name__} with another output or none; set prompt_tokens 0 and a prompt of pixels"
        )
    return int(visual.class_embedding.shape[0])
