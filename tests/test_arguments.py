"""A public constructor refuses, by name, an argument outside of its type, set or range."""

import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

import robustclip.attacks
import robustclip.data
import robustclip.evaluation
import robustclip.methods
import robustclip.models.clip
import robustclip.training
from robustclip.arguments import Count, Interval, Share, checked
from robustclip.attacks import APGD, PGD, Attack, Recipe, Square, TorchAttack
from robustclip.data import CLIPDataModule, DataSource
from robustclip.data.transforms import Augmentation
from robustclip.methods import TeCoA
from robustclip.models.clip import CLIPModel
from robustclip.tools import cache, captioner, retrieve
from robustclip.types import Task

NAN, INF = math.nan, math.inf
POOL: list[Any] = ["", "x", -1, 0, 1, 1.5, 1e9, NAN, INF, None, True, [], ["x"], [-1], {}, {"x": 1}, {1: "x"}, object()]
SCALARS: list[Any] = [np.float32(0.5), np.int64(3), np.bool_(True), torch.tensor(0.5), torch.tensor(3)]
NEEDED: dict[type, dict[str, Any]] = {
    Recipe: {"name": "pgd10"},
    TorchAttack: {"name": "FGSM"},
    DataSource: {"source": "shapes:colours"},
    Task: {"name": "t", "class_names": ("a", "b")},
    retrieve.Settings: {"data": "shapes:source", "pool": ["wds:x"], "guard": ["shapes:colours"]},
}
MODULES = (robustclip.attacks, robustclip.methods, robustclip.evaluation, robustclip.training, robustclip.data)
OFFERED = [getattr(module, name) for module in MODULES for name in module.__all__]
BUILT = [cls for cls in OFFERED if inspect.isclass(cls) and not inspect.isabstract(cls) and not issubclass(cls, tuple)]
CLASSES = [*BUILT, CLIPModel, Task, Augmentation, captioner.Decoding, cache.Settings, retrieve.Settings]


def arguments_of(cls: type) -> Iterator[tuple[str, Any, Any]]:
    """Name, hint and default of every argument, through ``**kwargs`` to the bases."""
    for base in cls.__mro__:
        if "__init__" not in vars(base) or not inspect.isfunction(vars(base)["__init__"]):
            continue
        hints = get_type_hints(base.__init__, include_extras=True)
        parameters = [*inspect.signature(base.__init__).parameters.values()][1:]
        for parameter in parameters:
            if parameter.kind is not parameter.VAR_KEYWORD:
                yield parameter.name, hints[parameter.name], parameter.default
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return


def takes(hint: Any, value: Any) -> bool:
    """Whether a hint admits a value."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(takes(part, value) for part in parts)
    if origin is Annotated:
        limits = [part for part in parts[1:] if isinstance(part, Interval)]
        return takes(parts[0], value) and all(inside(limit, float(value)) for limit in limits)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if hint in (int, float):
        kinds = (int, np.integer) if hint is int else (int, float, np.number)
        is_tensor = isinstance(value, Tensor) and (hint is float or not value.is_floating_point())
        return (isinstance(value, kinds) or is_tensor) and not isinstance(value, bool | np.bool_)
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if origin in (list, tuple, Sequence):
        if isinstance(value, list | tuple):
            length = len(parts) if origin is tuple and parts[-1] is not Ellipsis else len(value)
            return len(value) == length and all(takes(parts[0], item) for item in value)
        return origin is Sequence and takes(parts[0], value)
    if origin is dict:
        return isinstance(value, dict) and all(takes(parts[0], k) and takes(parts[1], v) for k, v in value.items())
    if hint is Any:
        return True
    return isinstance(value, (str, Path) if hint is str else origin or hint)


def inside(limit: Interval, number: float) -> bool:
    above = number > limit.low or (number == limit.low and limit.low not in limit.excludes)
    return above and (number < limit.high or (number == limit.high < INF and limit.high not in limit.excludes))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded before the arguments were checked")

    monkeypatch.setattr(robustclip.models.clip, "load", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}")
def test_every_constructor_names_the_argument_that_does_not_fit(cls: type) -> None:
    for name, hint, _ in arguments_of(cls):
        for value in [*POOL, *SCALARS]:
            if not takes(hint, value):
                with pytest.raises(ValueError, match=rf"\b{name}\b.* must be .*, got ") as error:
                    cls(**{**NEEDED.get(cls, {}), name: value})
                assert cls.__name__ in str(error.value), f"{name}={value!r}"


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if issubclass(cls, Attack)])
def test_every_value_that_fits_is_taken_or_refused_by_name(cls: type) -> None:
    for name, hint, _ in arguments_of(cls):
        for value in [value for value in [*POOL, *SCALARS] if takes(hint, value)]:
            try:
                cls(**{**NEEDED.get(cls, {}), name: value})
            except ValueError as error:
                assert name in str(error), f"{name}={value!r}: {error}"  # noqa: PT017


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}")
def test_defaults_fit_their_own_arguments(cls: type) -> None:
    for name, hint, default in arguments_of(cls):
        if default is not inspect.Parameter.empty and type(default).__name__ != "_HAS_DEFAULT_FACTORY_CLASS":
            assert takes(hint, default), f"{name}={default!r}"


@pytest.mark.parametrize("attack", [PGD, APGD, Square, Recipe])
@pytest.mark.parametrize(("norm", "remedy"), [("Linf", "'linf'"), ("inf", "'linf'"), ("L2", "'l2'"), ("l3", None)])
def test_no_spelling_of_a_norm_is_taken_for_another(attack: type, norm: str, remedy: str | None) -> None:
    with pytest.raises(
        ValueError, match=rf"{attack.__name__}: norm must be one of linf, l2, l1, got '{norm}'"
    ) as error:
        attack(**NEEDED.get(attack, {}), norm=norm)
    assert str(error.value).endswith(f"; did you mean {remedy}?" if remedy else f"got '{norm}'")


def test_torchattacks_gets_only_norms_that_it_knows() -> None:
    with pytest.raises(ValueError, match=r"kwargs.norm must be one of Linf, L2, L1, got 'linf'; did you mean 'Linf'"):
        TorchAttack("FAB", "4/255", {"norm": "linf"})
    with pytest.raises(ValueError, match=r"kwargs.steps must be an integer at least 1, got 2.0; write 2"):
        TorchAttack("PGD", "4/255", {"steps": 2.0})
    assert TorchAttack("PGD", np.float32(0.5), {"steps": np.int64(3)}).settings["kwargs"] == {"eps": 0.5, "steps": 3}


def test_scalars_of_numpy_and_torch_become_numbers() -> None:
    attack = PGD(np.float64(0.25), torch.tensor(0.5), np.int64(3), random_start=np.bool_(False))
    assert attack.settings == PGD(0.25, 0.5, 3, random_start=False).settings
    assert [type(value) for value in (attack.eps, attack.alpha, attack.steps)] == [float, float, int]


def test_one_item_is_taken_for_a_list_of_one() -> None:
    data = CLIPDataModule(test="shapes:colours", unknown=DataSource("shapes:unknown"))
    assert data.test_sources == ("shapes:colours",)
    assert data.unknown_sources == (DataSource("shapes:unknown"),)
    assert DataSource("folder:x", templates="a {}").templates == "a {}"  # or ``openai``
    assert Augmentation([0.5, 1.0]).scale == (0.5, 1.0)
    with pytest.raises(ValueError, match=r"class_names must be a list.*, got 'cat'; write \['cat'\]"):
        DataSource("folder:x", class_names="cat")


T = TypeVar("T")


class Shaped(Protocol):
    shape: tuple[int, ...]


class Own(PGD):
    """A user's attack, with hints that are understood and others that are not."""

    def __init__(
        self,
        share: Share = 0.5,
        count: Count = None,  # type: ignore[assignment]
        *,
        mask: Shaped | None = None,
        later: "Later | None" = None,
        other: T | None = None,
        loose=3,  # type: ignore[no-untyped-def]
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.share, self.count, self.mask, self.other, self.loose = share, count, mask, other, loose


class Later:
    """A class that comes after the hint that names it."""


def test_subclasses_of_users_get_the_check_and_keep_their_freedom() -> None:
    with pytest.raises(ValueError, match=r"Own: share must be in \[0, 1\], got 2"):
        Own(2)
    with pytest.raises(ValueError, match="Own: later must be Later or null, got 3"):
        Own(later=3)
    with pytest.raises(ValueError, match="Own: steps must be an integer at least 0, got -1"):
        Own(steps=-1)
    free = Own(mask=torch.zeros(2), other=object(), loose="x", count=None)
    assert free.share == 0.5
    assert free.loose == "x"
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        Own(step=1)
    with pytest.raises(TypeError, match="positional"):
        PGD(0.1, 0.1, 1, "linf", True, "last", None, None, 1)


def test_hints_that_cannot_be_evaluated_check_nothing() -> None:
    @checked
    class Broken:
        def __init__(self, count: "Nowhere", share: Share) -> None:  # type: ignore[name-defined] # noqa: F821
            self.count, self.share = count, share

    assert Broken(1, 7).share == 7


def test_hyper_parameters_are_saved_as_without_the_check(tiny_model: Path) -> None:
    class Mine(TeCoA):
        def __init__(self, weight: float = 1.0, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.weight = weight

    method = Mine(2, pretrained=str(tiny_model), last_blocks=1, warmup_steps=np.int64(7), attack=PGD())
    saved = dict(method.hparams)
    assert {name: saved.pop(name) for name in ("weight", "last_blocks", "warmup_steps")} == {
        "weight": 2.0, "last_blocks": 1, "warmup_steps": 7,
    }  # fmt: skip
    assert saved.keys() == {name for name, _, _ in arguments_of(Mine)} - {
        *("weight", "last_blocks", "warmup_steps", *TeCoA.object_arguments)
    }
    assert type(method.hparams["warmup_steps"]) is int


def test_the_command_line_and_its_help_show_the_same_limits(capsys: pytest.CaptureFixture[str]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Attack, "attack", default=None)
    parser.add_class_arguments(captioner.Decoding, "decoding")
    settings = ["--attack", "PGD", "--attack.steps", "3", "--attack.norm", "l2", "--attack.eps", "4/255"]
    attack = parser.instantiate_classes(parser.parse_args(settings)).attack
    assert (attack.steps, attack.norm, attack.eps) == (3, "l2", 4 / 255)
    for wrong in (["--attack.steps", "2.0"], ["--attack.norm", "Linf"], ["--attack.steps", "-1"]):
        with pytest.raises(Exception, match=wrong[1]):
            parser.instantiate_classes(parser.parse_args([*settings, *wrong]))
    assert "type: Annotated[int, at least 1], default: 32" in " ".join(parser.format_help().split())


def test_an_argument_without_type_or_value_is_refused() -> None:
    """The command line gives None for an argument without a type that nobody has set."""

    class Untyped(PGD):
        def __init__(self, beta, **kwargs: Any) -> None:  # type: ignore[no-untyped-def]
            super().__init__(**kwargs)
            self.beta = beta

    assert Untyped(beta=3).beta == 3
    with pytest.raises(ValueError, match="Untyped: beta must be given"):
        Untyped(beta=None)
