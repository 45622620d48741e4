"""Reads classes and the parameters of their constructors from source files, since libraries take seconds to load."""

import ast
import importlib.util
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, reduce
from importlib.machinery import PathFinder
from itertools import chain
from operator import or_
from pathlib import Path
from typing import Any, Literal, NamedTuple

from robustclip.textfiles import read_text

Function = ast.FunctionDef | ast.AsyncFunctionDef
PLAIN: dict[str, type] = {"bool": bool, "float": float, "int": int, "str": str}


class Definition(NamedTuple):
    """A class, a function or a variable as written.

    Attributes:
        module: dotted name of its module.
        node: its syntax; of a variable, its assignment.
    """

    module: str
    node: ast.ClassDef | Function | ast.Assign


def definition(path: str) -> Definition | None:
    """Finds a class, a function or a variable, also where a module imports it from another one.

    Args:
        path: dotted import path. A user's modules are found in the current folder.

    Returns:
        None if there is none, or if it is not defined or imported by a plain statement at the top of its module.
    """
    passed: list[str] = []
    while path not in passed:  # else modules import a name from each other
        passed.append(path)
        module, _, name = path.rpartition(".")
        for node in _statements(module):
            if isinstance(node, ast.ClassDef | Function) and node.name == name:
                return Definition(module, node)
            if isinstance(node, ast.Assign) and _name(node.targets[0]) == name:
                return Definition(module, node)
        path = _imported(name, module) or path
    return None


def ancestors(path: str) -> Iterator[Definition | None]:
    """Yields a class and its base classes in Python's order of resolution, None for a class without known source."""
    try:
        order = _skeleton(path, {}).__mro__
    except (RecursionError, TypeError):  # bases without an order
        order = (_Unknown,)
    yield from (getattr(cls, "definition", None) for cls in order if cls is not object)


def subclasses(base: str, module: str) -> dict[str, Definition]:
    """Finds the classes with a base class that a module offers.

    Args:
        base: name of the base class.
        module: dotted name of a module. It offers the names in its ``__all__``, else the classes that it defines; a
            package without ``__all__`` offers the classes of its modules.
    """
    file, names = _file(module), _listed(module)
    if names is None:
        inner = sorted(file.parent.glob("*.py")) if file and file.name == "__init__.py" else []
        modules = [f"{module}.{path.stem}" for path in inner if path != file] or [module]
        paths = [f"{part}.{name}" for part in modules for name in _classes(part)]
    else:
        paths = [f"{module}.{name}" for name in names]
    orders = {path: list(ancestors(path)) for path in paths}
    return {
        path.rpartition(".")[2]: order[0]
        for path, order in orders.items()
        if order and order[0] and any(cls and getattr(cls.node, "name", "") == base for cls in order[1:])
    }


def parameters(path: str) -> list[str] | None:
    """Lists the names of the parameters of a class, and through ``**kwargs`` those of its bases, or of a function.

    Args:
        path: dotted import path.

    Returns:
        None if the source does not tell: it is not found, or ``**kwargs`` go to another function than the base's
        constructor, or another part of the class than its constructor determines them.
    """
    written = definition(path)
    if written and isinstance(written.node, ast.ClassDef) and _is_dataclass(written.node):
        return None if written.node.bases else _fields(written.node)
    called = _called(path)
    if called is None:
        return None
    return list(dict.fromkeys(argument.arg for _, function in called for argument in _arguments(function)))


def default_class(path: str, parameter: str) -> str:
    """Finds the class whose object a parameter has by default, or by default builds.

    Args:
        path: dotted import path of the class with the parameter.
        parameter: its name.

    Returns:
        Import path of the class; empty if there is none or the source does not tell.
    """
    for module, function in _called(path) or ():
        default = _defaults(function).get(parameter)
        value = default.body if isinstance(default, ast.Lambda) else default
        if isinstance(value, ast.Call):
            name = ast.unparse(value.func)
            return next((path for path in (f"{module}.{name}", name) if definition(path)), "")
    return ""


def plain_type(path: str, parameter: str) -> Any:
    """Builds the type of a parameter from its hint.

    Args:
        path: dotted import path of the class or function with the parameter.
        parameter: its name.

    Returns:
        A union of ``int``, ``float``, ``bool``, ``str``, ``None`` and literals; None if the type is another one or the
        source does not tell.
    """
    for module, function in _called(path) or ():
        for argument in _arguments(function):
            if argument.arg == parameter and argument.annotation is not None:
                try:
                    return _built(argument.annotation, module)
                except _NotPlainError:
                    return None
    return None


class _NotPlainError(Exception):
    """A type hint has parts other than those of `plain_type`."""


def _built(hint: ast.expr, module: str) -> Any:
    """Builds the type of a hint in a module.

    Raises:
        _NotPlainError: the hint has other parts.
    """
    if isinstance(hint, ast.Constant) and hint.value is None:
        return None
    if isinstance(hint, ast.BinOp) and isinstance(hint.op, ast.BitOr):
        return _union(_built(hint.left, module), _built(hint.right, module))
    if isinstance(hint, ast.Subscript):
        kind, inner = _name(hint.value), hint.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if kind == "Literal" and all(isinstance(part, ast.Constant) for part in parts):
            return Literal[tuple(ast.literal_eval(part) for part in parts)]
        if kind == "Annotated":
            return _built(parts[0], module)
        if kind in ("Union", "Optional"):
            types = [_built(part, module) for part in parts]
            return _union(*types, None) if kind == "Optional" else _union(*types)
    if isinstance(hint, ast.Name) and hint.id in PLAIN:
        return PLAIN[hint.id]
    path = ""
    if isinstance(hint, ast.Name):
        path = f"{module}.{hint.id}"
    elif isinstance(hint, ast.Attribute):
        path = f"{_imported(ast.unparse(hint.value), module)}.{hint.attr}"
    alias = definition(path)
    if alias and isinstance(alias.node, ast.Assign):
        return _built(alias.node.value, alias.module)
    raise _NotPlainError


def _union(*types: Any) -> Any:
    return reduce(or_, types)


class _Unknown:
    """Stands for a class without known source."""


def _skeleton(path: str, built: dict[Definition, type]) -> type:
    """Builds a class with the names and bases of another one, so that Python orders the bases.

    Args:
        path: dotted import path.
        built: classes that are built; new ones are added.
    """
    written = definition(path)
    if written is None or not isinstance(written.node, ast.ClassDef):
        return _Unknown
    if written not in built:
        names = [ast.unparse(base).partition("[")[0] for base in written.node.bases]
        bases = dict.fromkeys(_skeleton(f"{written.module}.{name}", built) for name in names if name != "object")
        built[written] = type(written.node.name, tuple(bases), {"definition": written})
    return built[written]


def _file(module: str) -> Path | None:
    """Finds the file of a module; no package is imported on the way."""
    top, *rest = module.split(".")
    try:
        spec = PathFinder.find_spec(top, [str(Path.cwd())]) or importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin)
    for part in rest:
        package = file.parent / part / "__init__.py"
        if file.name != "__init__.py":
            return None
        file = package if package.is_file() else file.parent / f"{part}.py"
    return file if file.suffix == ".py" and file.is_file() else None


def _statements(module: str) -> list[ast.stmt]:
    """Returns the statements at the top of a module; none if it is not found or no Python."""
    file = _file(module) if module else None
    return [] if file is None else _parsed(file, file.stat().st_mtime_ns)


@cache
def _parsed(file: Path, changed: int) -> list[ast.stmt]:
    """Parses a file that was last changed at a time; the cache knows it by both."""
    try:
        body = ast.parse(read_text(file)).body
    except (OSError, RecursionError, SyntaxError, ValueError):
        return []
    checked_types = [node.body for node in body if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING"]
    return [*body, *chain.from_iterable(checked_types)]


def _listed(module: str) -> list[str] | None:
    """Returns the names in a module's ``__all__``, or None."""
    for node in _statements(module):
        if isinstance(node, ast.Assign) and _name(node.targets[0]) == "__all__":
            with suppress(ValueError):  # a computed value
                names: list[str] = ast.literal_eval(node.value)
                return names
    return None


def _classes(module: str) -> list[str]:
    names = [node.name for node in _statements(module) if isinstance(node, ast.ClassDef)]
    return [name for name in names if not name.startswith("_")]


def _imported(name: str, module: str) -> str:
    """Returns the dotted path from which a module imports a name; empty if it does not."""
    for node in _statements(module):
        names = {alias.asname or alias.name: alias.name for alias in getattr(node, "names", ())}
        if isinstance(node, ast.ImportFrom) and name in names:
            return f"{_source(node, module)}.{names[name]}"
    return ""


def _source(node: ast.ImportFrom, module: str) -> str:
    """Returns the absolute name of the module from which a statement imports."""
    if not node.level:
        return node.module or ""
    parts, file = module.split("."), _file(module)
    is_package = file is not None and file.name == "__init__.py"
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *filter(None, [node.module])])


def _called(path: str) -> list[tuple[str, Function]] | None:
    """Lists the constructors, with their modules, through which the arguments of a class go; None if unknown.

    A function is its own constructor.
    """
    written = definition(path)
    if written is None:
        return None
    if isinstance(written.node, Function):
        return None if written.node.args.kwarg else [(written.module, written.node)]
    if isinstance(written.node, ast.Assign):
        return None
    called = []
    for cls in ancestors(path):
        if cls is None or not isinstance(cls.node, ast.ClassDef):
            return None
        if _is_dataclass(cls.node) or _method(cls.node, "__new__"):
            return None
        constructor = _method(cls.node, "__init__")
        if constructor is None:
            continue
        called.append((cls.module, constructor))
        if constructor.args.kwarg is None:
            return called
        if not _passes_on(constructor, constructor.args.kwarg.arg):
            return None
    return None


def _method(cls: ast.ClassDef, name: str) -> Function | None:
    return next((node for node in reversed(cls.body) if isinstance(node, Function) and node.name == name), None)


def _is_dataclass(cls: ast.ClassDef) -> bool:
    return any(_name(decorator) == "dataclass" for decorator in cls.decorator_list)


def _fields(dataclass: ast.ClassDef) -> list[str]:
    """Lists the parameters of the constructor that ``dataclass`` writes."""
    fields = [node for node in dataclass.body if isinstance(node, ast.AnnAssign)]
    own = [node for node in fields if "ClassVar" not in ast.unparse(node.annotation)]
    return [ast.unparse(node.target) for node in own if "init=False" not in ast.unparse(node)]


def _arguments(function: Function) -> list[ast.arg]:
    """Lists the named parameters of a function but for ``self``."""
    arguments = function.args
    return [*_positional(function), *arguments.kwonlyargs]


def _positional(function: Function) -> list[ast.arg]:
    named = [*function.args.posonlyargs, *function.args.args]
    return named[1:] if function.name == "__init__" else named


def _defaults(function: Function) -> dict[str, ast.expr | None]:
    """Maps the names of parameters to their defaults."""
    positional, defaults = _positional(function), function.args.defaults
    last = positional[len(positional) - len(defaults) :]
    pairs = [*zip(last, defaults, strict=True), *zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)]
    return {argument.arg: default for argument, default in pairs}


def _passes_on(constructor: Function, kwargs: str) -> bool:
    """Returns whether ``**kwargs`` are passed to the base's constructor alone; they may also be read by ``get``."""
    nodes = list(ast.walk(constructor))
    uses = sum(_name(node) == kwargs for node in nodes if isinstance(node, ast.Name))
    reads = sum(ast.unparse(node) == f"{kwargs}.get" for node in nodes if isinstance(node, ast.Attribute))
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__"]
    passed = [entry for call in calls for entry in call.keywords if entry.arg is None and _name(entry.value) == kwargs]
    return len(passed) == 1 == uses - reads


def _name(node: ast.expr) -> str:
    """Returns the last part of a dotted name, or of that which is called."""
    return ast.unparse(node.func if isinstance(node, ast.Call) else node).rpartition(".")[2]
