"""Classes read from source files have the parameters that they have when they are imported."""

import inspect
import os
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import pytest
import torch.optim

import robustclip
import robustclip.attacks
import robustclip.data
import robustclip.defences
import robustclip.evaluation
import robustclip.methods
from robustclip.signatures import ancestors, default_class, definition, parameters, plain_type, subclasses

OURS = (robustclip, robustclip.attacks, robustclip.data, robustclip.defences, robustclip.evaluation, robustclip.methods)
OTHERS = (torch.optim, torch.optim.lr_scheduler, lightning.pytorch.callbacks, lightning.pytorch.loggers)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
SOURCE = """
from dataclasses import dataclass, field
from robustclip.methods import TeCoA as Base

class Plain(Base):
    def __init__(self, beta: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.beta = beta * kwargs.get("warmup_steps", 1)

class Without(Plain):
    pass

class Elsewhere(Base):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.other = Plain(**kwargs)

class Popped(Base):
    def __init__(self, **kwargs):
        self.gamma = kwargs.pop("gamma", 1)
        super().__init__(**kwargs)

class New:
    def __new__(cls, **kwargs):
        return object()

@dataclass
class Fields:
    a: int
    b: int = 2
    c: int = field(init=False)

if 1:
    class Hidden:
        def __init__(self, x): ...

def computed(x, y=1):
    return Plain

def forwarded(x, **kwargs):
    return Plain(**kwargs)

class Circle(Circle):
    pass
"""


def imported(cls: type) -> list[str]:
    """The parameters by Python's own inspection, through ``**kwargs`` to the bases."""
    names: list[str] = []
    for base in cls.__mro__:
        entries = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        names += [entry.name for entry in entries if entry.kind in NAMED and entry.name != "self"]
        if not any(entry.kind is entry.VAR_KEYWORD for entry in entries):
            break
    return list(dict.fromkeys(names))


def classes(module: ModuleType) -> dict[str, type]:
    return {name: getattr(module, name) for name in module.__all__ if inspect.isclass(getattr(module, name))}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of a user's in the current folder."""
    (tmp_path / "own_signatures.py").write_text(SOURCE)
    (tmp_path / "own_pack").mkdir()
    (tmp_path / "own_pack" / "__init__.py").write_text("from .inner import Deep as Renamed\nfrom .inner import *\n")
    (tmp_path / "own_pack" / "inner.py").write_text("class Deep:\n    def __init__(self, depth): ...\n")
    (tmp_path / "own_broken.py").write_text("class Broken(:\n")
    (tmp_path / "own_round.py").write_text("from own_trip import Round\n")
    (tmp_path / "own_trip.py").write_text("from own_round import Round\n")
    monkeypatch.chdir(tmp_path)
    return "own_signatures"


@pytest.mark.parametrize("module", OURS, ids=lambda module: module.__name__)
def test_all_public_classes_have_their_parameters(module: ModuleType) -> None:
    for name, cls in classes(module).items():
        if cls.__init__ is not object.__init__ and not issubclass(cls, tuple):  # type: ignore[misc]
            assert (parameters(f"{module.__name__}.{name}") or []) == imported(cls), name


@pytest.mark.parametrize("module", OTHERS, ids=lambda module: module.__name__)
def test_classes_of_libraries_have_their_parameters_or_are_unknown(module: ModuleType) -> None:
    found = {cls: parameters(f"{module.__name__}.{name}") for name, cls in classes(module).items()}
    assert sum(names is not None for names in found.values()) > len(found) / 3
    for cls, names in found.items():
        assert names in (None, imported(cls)), cls


def test_parameters_go_through_kwargs_to_imported_bases(own: str) -> None:
    names = parameters(f"{own}.Plain")
    assert names is not None
    assert names[0] == "beta"
    assert {"attack", "arch", "optimizer", "warmup_steps"} <= {*names}
    assert parameters(f"{own}.Without") == names


@pytest.mark.parametrize("name", ["Elsewhere", "Popped", "New", "Hidden", "Circle", "forwarded", "Nonesuch"])
def test_what_the_source_does_not_tell_is_unknown(name: str, own: str) -> None:
    assert parameters(f"{own}.{name}") is None


def test_functions_and_dataclasses_have_parameters(own: str) -> None:
    assert parameters(f"{own}.computed") == ["x", "y"]
    assert parameters(f"{own}.Fields") == ["a", "b"]


def test_relative_imports_are_followed(own: str) -> None:
    assert parameters("own_pack.Renamed") == parameters("own_pack.inner.Deep") == ["depth"]
    assert definition("own_pack.Deep") is None  # of a star


@pytest.mark.parametrize(
    "path",
    [
        "",
        "X",
        ".X",
        "..x.X",
        "own_broken.Broken",
        "own_round.Round",
        "wds:/a/b.tar",
        "no_module.X",
        "json.X",
        "math.pi",
        "a b.c",
    ],
)
def test_texts_that_are_no_classes_are_unknown(path: str, own: str) -> None:
    assert parameters(path) is None
    assert definition(path) is None


def test_a_changed_file_is_read_again(own: str, tmp_path: Path) -> None:
    file = tmp_path / "own_changed.py"
    for names in (["a"], ["a", "b"]):
        file.write_text(f"class Changed:\n    def __init__(self, {', '.join(names)}): ...\n")
        os.utime(file, ns=(len(names), len(names)))
        assert parameters("own_changed.Changed") == names


def test_bases_come_in_pythons_order() -> None:
    order = [each.node.name for each in ancestors("robustclip.methods.ARF") if each]
    known = [cls.__name__ for cls in robustclip.methods.ARF.__mro__]
    assert order == [name for name in known if name in order]
    assert {"ARF", "FLYP", "RobustMethod", "LightningModule"} <= {*order}


def test_subclasses_are_those_that_a_module_offers() -> None:
    found = subclasses("Optimizer", "torch.optim")
    kinds = {name for name, cls in classes(torch.optim).items() if issubclass(cls, torch.optim.Optimizer)}
    assert {*found} == kinds - {"Optimizer"}
    assert not subclasses("Optimizer", "no_module")


def test_plain_types_are_those_of_the_hints() -> None:
    checked = 0
    for module in (*OURS, lightning.pytorch.callbacks):
        for name, cls in classes(module).items():
            constructors = [base.__init__ for base in cls.__mro__]  # type: ignore[misc]
            for parameter in parameters(f"{module.__name__}.{name}") or ():
                kind = plain_type(f"{module.__name__}.{name}", parameter)
                if kind is not None:
                    owner = next(each for each in constructors if parameter in inspect.signature(each).parameters)
                    assert get_type_hints(owner)[parameter] == kind, f"{name}.{parameter}"
                    checked += 1
    assert checked > 500


def test_the_default_of_a_parameter_has_a_class() -> None:
    assert default_class("robustclip.methods.TeCoA", "attack") == "robustclip.methods._shared.tecoa_recipe.PGD"
    assert default_class("robustclip.methods.TeCoA", "optimizer") == "torch.optim.SGD"
    assert default_class("robustclip.methods.TeCoA", "arch") == default_class("no_module.X", "attack") == ""
