"""LoRA: low-rank changes of a frozen tower's weight matrices, in any kind of tower."""

import math
import re
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robustclip.arguments import Count, Positive, checked

Role = Literal["q", "k", "v", "out", "mlp"]
FUSED: tuple[Role, ...] = ("q", "k", "v")  # order of the rows of a matrix that holds all three
NAMES: dict[Role, str] = {  # ends of the names of linear layers in open_clip, timm and Hugging Face
    "q": r"\.(q_proj|query|q)",
    "k": r"\.(k_proj|key|k)",
    "v": r"\.(v_proj|value|v)",
    "out": r"(\.out_proj|\.attn\.proj|attnpool\.c_proj|\.attention\.output\.dense)",
    "mlp": r"(\.c_fc|\.mlp\.c_proj|\.fc1|\.fc2|\.intermediate\.dense|(?<!\.attention)\.output\.dense)",
}
FACTOR = re.compile(r"(.*)parametrizations\.(\w+)\.0\.[AB]")
ORIGINAL = re.compile(r"(.*)parametrizations\.(\w+)\.original")
FREE = ("logit_scale", "logit_bias")  # parameters beside the towers


@checked
@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (Hu et al., https://arxiv.org/abs/2106.09685): ``W' = W + c B A``, ``A`` and ``B`` trained.

    ``A`` ``(r, in)`` starts at random and ``B`` ``(out, r)`` at 0, so the model starts as it was. A matrix that holds
    queries, keys and values has a pair for each.

    Args:
        rank: ``r``.
        alpha: numerator of ``c``; null for the rank.
        scaling: ``c = alpha / r`` (``rank``), or ``alpha / sqrt(r)`` (``sqrt``), that of CLIP-LoRA's code.
        targets: matrices of every block: ``q``, ``k``, ``v`` and ``out`` of attention, ``mlp``.
        towers: towers that are adapted: ``image``, ``text``, or ``both``. Of an adapted tower, nothing else is trained.
    """

    rank: Count = 8
    alpha: Positive | None = None
    scaling: Literal["rank", "sqrt"] = "rank"
    targets: tuple[Role, ...] = ("q", "k", "v", "out")
    towers: Literal["image", "text", "both"] = "image"

    @property
    def factor(self) -> float:
        """The factor ``c`` of the product."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))


class LowRank(nn.Module):
    """The parametrisation ``W + c B A`` of a matrix, whoever reads it.

    Args:
        weight: matrix ``(P d, in)`` of ``P`` stacked parts.
        parts: numbers of the parts to change.
        stacked: ``P``.
        rank: rank ``r`` of a change.
        factor: factor ``c`` of the product.
    """

    def __init__(self, weight: Tensor, parts: Collection[int], stacked: int, *, rank: int, factor: float) -> None:
        super().__init__()
        rows, columns = weight.shape[0] // stacked, weight.shape[1]
        self.parts, self.stacked, self.factor = sorted(parts), stacked, factor
        self.A = nn.Parameter(weight.new_empty(len(parts), rank, columns))
        self.B = nn.Parameter(weight.new_zeros(len(parts), rows, rank))
        nn.init.uniform_(self.A, -1 / math.sqrt(columns), 1 / math.sqrt(columns))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the changed matrix, computed in fp32 at least and in the type of the original."""
        with torch.autocast(weight.device.type, enabled=False):
            change = self.factor * (self.B @ self.A)
            if len(self.parts) < self.stacked:
                whole = change.new_zeros(self.stacked, *change.shape[1:])
                change = whole.index_copy(0, torch.tensor(self.parts, device=change.device), change)
            precision = torch.promote_types(weight.dtype, change.dtype)
            return (weight.to(precision) + change.reshape(weight.shape)).to(weight.dtype)


def inject(net: Any, lora: LoRA, *, is_compiled: bool = False) -> None:
    """Adds the factors to the towers of an open_clip model, whose other parameters keep their values.

    Args:
        net: open_clip model with its pre-trained weights.
        lora: settings.
        is_compiled: whether the towers are to be compiled.

    Raises:
        ValueError: a tower has no such matrix, or one is smaller than the rank, or the towers are compiled.
    """
    if is_compiled:
        raise ValueError("compile must be false where lora is set; unset one of them")
    for tower in ("image", "text") if lora.towers == "both" else (lora.towers,):
        matrices = [matrix for matrix in _matrices(net) if matrix[0].startswith("visual.") == (tower == "image")]
        chosen = [matrix for matrix in matrices if set(matrix[3]) & set(lora.targets)]
        if not chosen:
            names = sorted({role for *_, roles in matrices for role in roles})
            raise ValueError(
                f"lora.targets {list(lora.targets)} finds no matrix in the {tower} tower, which has"
                f" {', '.join(names) or 'none that is known'}; change lora.targets or lora.towers"
            )
        for name, module, key, roles in chosen:
            weight = getattr(module, key)
            if lora.rank > (limit := min(len(weight) // len(roles), weight.shape[1])):
                raise ValueError(f"lora.rank must be at most {limit} for {name}{key}, got {lora.rank}")
            parts = [number for number, role in enumerate(roles) if role in lora.targets]
            change = LowRank(weight, parts, len(roles), rank=lora.rank, factor=lora.factor)
            parametrize.register_parametrization(module, key, change, unsafe=True)  # without a trial pass


def _matrices(net: nn.Module) -> Iterator[tuple[str, nn.Module, str, tuple[Role, ...]]]:
    """Gives prefix, module, attribute and roles of the matrices with a known role."""
    for name, module in net.named_modules():
        if isinstance(getattr(module, "in_proj_weight", None), nn.Parameter):
            yield f"{name}.", module, "in_proj_weight", FUSED
        elif isinstance(module, nn.Linear) and name.endswith("attn.qkv"):
            yield f"{name}.", module, "weight", FUSED
        elif isinstance(module, nn.Linear):
            for role, pattern in NAMES.items():
                if re.fullmatch(f".*{pattern}", f".{name}"):
                    yield f"{name}.", module, "weight", (role,)


def cached() -> AbstractContextManager[None]:
    """Computes every changed matrix once inside the context, where no parameter may change or get a gradient."""
    context: AbstractContextManager[None] = parametrize.cached()
    return context


def is_factor(name: str) -> bool:
    """Checks whether a parameter's name is that of a factor."""
    return FACTOR.fullmatch(name) is not None


def plain_name(name: str) -> str:
    """Returns the name that a changed matrix has in a model without LoRA; other names stay as they are."""
    match = FACTOR.fullmatch(name) or ORIGINAL.fullmatch(name)
    return "".join(match.groups()) if match else name


def factors_alone(net: nn.Module, groups: Any, lora: LoRA | None) -> Any:
    """Returns optimiser groups without the parameters of adapted towers that are no factors.

    Args:
        net: open_clip model with its factors.
        groups: groups of the method.
        lora: settings of the factors; null returns the groups.

    Raises:
        ValueError: no factor is left, since the method trains no matrix of an adapted tower.
    """
    if lora is None:
        return groups
    named = list(net.named_parameters())
    factors = {id(parameter) for name, parameter in named if is_factor(name)}
    adapted = [
        parameter
        for name, parameter in named
        if name not in FREE and lora.towers in ("image" if name.startswith("visual.") else "text", "both")
    ]
    frozen = {id(parameter) for parameter in adapted} - factors
    kept = [
        {**group, "params": [parameter for parameter in group["params"] if id(parameter) not in frozen]}
        for group in groups
    ]
    if not any(id(parameter) in factors for group in kept for parameter in group["params"]):
        raise ValueError(
            "lora must be null for a method and settings that train no matrix of the adapted towers"
            f" ({lora.towers}); change lora.towers"
        )
    return [group for group in kept if group["params"]]


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's state with the changed matrices under their plain names, as of a model without LoRA."""
    state = module.state_dict()
    names: list[str] = []
    for name in state:
        if (match := ORIGINAL.fullmatch(name)) is None:
            names += [] if is_factor(name) else [name]
            continue
        prefix, key = match.groups()
        # A plain module lists its matrix before its bias and its parts.
        place = next((number for number, other in enumerate(names) if other.startswith(prefix)), len(names))
        names.insert(place, f"{prefix}{key}")
    with torch.no_grad():
        return {name: state[name] if name in state else _value(module, name) for name in names}


def _value(module: nn.Module, name: str) -> Tensor:
    """Computes a changed matrix by its name."""
    prefix, _, key = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(prefix), key)
    return value.detach()
