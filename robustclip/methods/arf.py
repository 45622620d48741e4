"""ARF, fine-tuning anchored by captions and by retrieved image-text pairs."""

from typing import Any

import torch
from torch import Tensor

from robustclip.arguments import NonNegative
from robustclip.methods._shared.data_checks import anchors_of
from robustclip.methods.flyp import FLYP
from robustclip.objectives.losses import info_nce
from robustclip.types import Batch, Pairs


class ARF(FLYP):
    """ARF (Han et al., CVPR 2024, https://arxiv.org/abs/2404.06244): FLYP, anchored by two auxiliary sets of texts.

    ``L_ctr`` is the loss of FLYP. With the batch's images ``Z``, their class prompts ``T``, a caption ``C`` for each of
    the images, and image-text pairs ``(Z_r, T_r)`` retrieved from data like those of pre-training, ARF minimises:

        L_ctr(Z, T) + a L_ctr(Z, C) + b L_ctr(Z_r, T_r)

    The three similarity matrices share one logit scale, and no image is contrasted with a text of another term. Each
    tower runs once. An image without a caption uses its class prompt. Duplicates of a pair within a batch are left out,
    since a duplicate would be its own negative; ``train/anchor_collisions`` counts them.

    The authors published neither code nor the weights ``a`` and ``b``; reviews of the paper report a plain sum.

    Args:
        caption_weight: ``a``; at 0, captions are not used.
        anchor_weight: ``b``; at 0, pairs are not used.
        kwargs: arguments of `FLYP`.

    Raises:
        ValueError: a weight is negative.

    Examples:
        >>> import torch
        >>> from robustclip import ARF, Batch, Task
        >>> model = ARF(caption_weight=0.5, anchor_weight=0)
        >>> model.prepare_training(Task("colours", ("red", "blue"), ("a {} shape",)))
        >>> images, captions = torch.rand(2, 3, 32, 32), ("something red", "a blue dot")
        >>> batch = Batch(images, torch.tensor([0, 1]), torch.arange(2), captions)
        >>> sorted(model.training_loss(batch))
        ['caption_nce', 'prompt_nce']
    """

    training_arguments: tuple[str, ...] = ("caption_weight", "anchor_weight")

    def __init__(self, caption_weight: NonNegative = 1.0, anchor_weight: NonNegative = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.caption_weight, self.anchor_weight = caption_weight, anchor_weight

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the InfoNCE losses of images with class prompts, with captions, and of the retrieved pairs.

        Raises:
            ValueError: the data of a term are missing although its weight is not 0.
        """
        images, texts = [batch.images], [self.class_prompts(batch)]
        if self.caption_weight > 0:
            texts.append(self._captions(batch, texts[0]))
        pairs = anchors_of(batch, "anchor_weight") if self.anchor_weight > 0 else None
        if pairs is not None:
            images.append(pairs.images)
            texts.append(self.clip.tokenize(list(pairs.captions)))
        image_features = self.encode_images(*images).chunk(len(images))
        features = self.gathered(*image_features, *self.encode_tokens(*texts).chunk(len(texts)))
        of_images, of_texts, scale = features[: len(images)], features[len(images) :], self.clip.logit_scale
        terms = {"prompt_nce": info_nce(of_images[0], of_texts[0], scale)}
        if self.caption_weight > 0:
            terms["caption_nce"] = self.caption_weight * info_nce(of_images[0], of_texts[1], scale)
        if pairs is not None:
            is_first = self._is_first_copy(pairs)
            terms["anchor_nce"] = self.anchor_weight * info_nce(of_images[-1][is_first], of_texts[-1][is_first], scale)
        return terms

    def _captions(self, batch: Batch, prompts: Tensor) -> Tensor:
        """Returns tokens ``(B, L)`` of the captions, or of the class prompt for images without a caption."""
        if batch.captions is None:
            raise ValueError(
                f"caption_weight is {self.caption_weight:g}, but the data have no captions; set data.captions, or 0"
            )
        tokens = self.clip.join_tokens(prompts, self.clip.tokenize(list(batch.captions)))
        prompts, captions = tokens.chunk(2)
        is_missing = torch.tensor([[not caption] for caption in batch.captions])
        return torch.where(is_missing.to(tokens.device, non_blocking=True), prompts, captions)

    def _is_first_copy(self, pairs: Pairs) -> Tensor:
        """Marks the rows, over all processes, whose pair does not occur in an earlier row."""
        (index,) = self.gathered(pairs.index)
        is_copy = (index[:, None] == index).tril(-1).any(1)
        self.log("train/anchor_collisions", is_copy.sum().float(), batch_size=len(index))
        return ~is_copy
