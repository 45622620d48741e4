"""Names of tensors in the Hugging Face library and in open_clip, whose blocks join queries, keys and values."""

from dataclasses import dataclass

import torch
from torch import Tensor

LETTERS = "qkv"  # order of the rows of a joint projection
Pairs = tuple[tuple[str, str], ...]
# Parts of names inside the blocks of open_clip's own transformers.
BLOCKS: Pairs = (
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
QUERY = ".self_attn.q_proj."


@dataclass(frozen=True)
class Naming:
    """Names of the tensors of one or both towers; of each pair, the first is the library's and the second open_clip's.

    Args:
        beginnings: prefixes; a longer prefix precedes those that it contains.
        inside: parts of names inside blocks.
        joint: name of the joint projection of queries, keys and values in open_clip.
        transposed: matrices in open_clip that are linear layers in the library.
        kind: model with these tensors, for messages.
    """

    beginnings: Pairs
    inside: Pairs = BLOCKS
    joint: str = ".attn.in_proj_"
    transposed: tuple[str, ...] = ()
    kind: str = "an OpenAI-type CLIP"

    def to_open_clip(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames tensors of the library to open_clip's names.

        Raises:
            ValueError: the model has no tensor of that name, or a projection lacks its queries, keys or values.
        """
        renamed: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name.endswith(".position_ids"):  # a counter that old versions stored
                continue
            new = self._translated(name, there=0)
            renamed[new] = tensor.T.contiguous() if new in self.transposed else tensor
        for name in [name for name in renamed if QUERY in name]:
            names = [name.replace("q_proj", f"{letter}_proj") for letter in LETTERS]
            if missing := [name for name in names if name not in renamed]:
                raise ValueError(f"the weights lack {missing[0]!r} beside {name!r}")
            renamed[name.replace(QUERY, self.joint)] = torch.cat([renamed.pop(name) for name in names])
        return renamed

    def from_open_clip(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames tensors of open_clip to the library's names."""
        renamed: dict[str, Tensor] = {}
        for name, tensor in state.items():
            new = self._translated(name, there=1)
            tensor = tensor.T.contiguous() if name in self.transposed else tensor
            if self.joint in new:
                for letter, part in zip(LETTERS, tensor.chunk(3), strict=True):
                    renamed[new.replace(self.joint, QUERY.replace("q_proj", f"{letter}_proj"))] = part.contiguous()
            else:
                renamed[new] = tensor
        return renamed

    def _translated(self, name: str, *, there: int) -> str:
        """Translates a name; ``there`` is 0 for a name of the library, 1 for a name of open_clip."""
        for pair in self.beginnings:
            if name.startswith(pair[there]):
                name = pair[1 - there] + name.removeprefix(pair[there])
                break
        else:
            raise ValueError(f"{name!r} is no tensor of {self.kind}")
        for pair in self.inside:
            name = name.replace(pair[there], pair[1 - there])
        return name
