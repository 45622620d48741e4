"""Follows which classes a command line and its configurations choose, and checks their names and arguments.

Nothing is imported. What only the parser can judge is left to it.
"""

from collections.abc import Mapping
from typing import Any

from robustclip.cli.messages import SETTINGS, class_expected, offered, unknown_argument, unknown_class
from robustclip.cli.values import check_value
from robustclip.signatures import default_class, parameters, plain_type

NOTHING = ("", "null", "None", "~")
NAMED_ATTACKS = ("evaluation.attacks", "evaluation.fit_attacks")
ONE_CLASS = ("attack", "defence", "optimizer", *SETTINGS)  # keys that take a single class
FREE_KEYS = (*NAMED_ATTACKS, "results.averages")  # mappings whose keys are names that the user chooses
LIBRARIES = ("robustclip", "lightning", "torch")


class ChosenClasses:
    """Classes by dotted key, as far as the options before have chosen them.

    Args:
        defaults: classes before the first option.
    """

    def __init__(self, defaults: Mapping[str, str]) -> None:
        self._names = dict(defaults)

    def read(self, key: str, value: Any) -> None:
        """Adds the classes that a value chooses, and checks names and plain values of their arguments.

        Args:
            key: dotted key.
            value: content of a configuration at this key, or the value of an option.

        Raises:
            ValueError: a class does not exist, takes no such argument, or was given as a number or a list.
            ArgumentError: a value has another type.
        """
        if self._takes_one_class(key) and not isinstance(value, str | Mapping | None):
            raise ValueError(class_expected(key, value))
        if value is None or value in NOTHING:
            self._names = {name: cls for name, cls in self._names.items() if not name.startswith(f"{key}.")} | {key: ""}
        elif isinstance(value, list):
            for place, entry in enumerate(value):
                self.read(f"{key}.{place}", entry)
        elif isinstance(value, str):
            self._names[key] = value
            self._check_class(key)
            self._check_value(key, value)
        elif isinstance(value, Mapping):
            if isinstance(value.get("class_path"), str):
                self._names[key] = value["class_path"]
                self._check_class(key)
            is_class = "class_path" in value or "init_args" in value
            arguments = value.get("init_args") if is_class else value
            for name, entry in arguments.items() if isinstance(arguments, Mapping) else ():
                if is_class:
                    self._check_argument(key, str(name))
                self.read(f"{key}.{name}", entry)
        else:
            self._check_value(key, value)

    def read_option(self, key: str, value: Any) -> None:
        """Does the same for an option, whose key may lead through several classes.

        Args:
            key: name of the option, such as ``model.attack.eps``.
            value: its value.

        Raises:
            ValueError, ArgumentError: as `read`.
        """
        *parts, last = key.removesuffix("+").split(".")
        if last in ("class_path", "init_args"):
            value = {last: value}
        else:
            parts.append(last)
        parts = [part for part in parts if part != "init_args"]
        for depth in range(1, len(parts)):
            self._check_argument(".".join(parts[:depth]), ".".join(parts[depth:]))
        self.read(".".join(parts), value)

    def _check_argument(self, key: str, name: str) -> None:
        known = parameters(self._path(key))
        if known is not None and name.partition(".")[0].removesuffix("+") not in known:
            raise ValueError(unknown_argument(key, name, known))

    def _check_value(self, key: str, value: str | float) -> None:
        """Parses a value as its parameter's type, if that is a plain one."""
        owner, _, name = key.removesuffix("+").rpartition(".")
        kind = plain_type(self._path(owner), name) if owner else None
        if kind is not None:
            check_value(key, value, kind)

    def _check_class(self, key: str) -> None:
        """Refuses a class name without a module that we do not offer, unless a module of the user's may offer it."""
        owner, _, last = key.rpartition(".")
        takes_ours = key == "model" or last in ("attack", "defence") or owner in NAMED_ATTACKS
        name, known = self._names[key], offered(key) if takes_ours else {}
        is_path = "." in name and name.replace(".", "").isidentifier()
        is_value = last in SETTINGS and not is_path and name != SETTINGS[last].rpartition(".")[2]
        if self._takes_one_class(key) and (is_value or name[:1].isdigit()):
            raise ValueError(unknown_class(key, name))
        paths = [path for path in self._names.values() if "." in path and path.replace(".", "").isidentifier()]
        is_ours_alone = all(path.partition(".")[0] in LIBRARIES for path in paths)
        if known and is_ours_alone and name.isidentifier() and name not in known:
            raise ValueError(unknown_class(key, name))

    def _path(self, key: str) -> str:
        """Returns the import path of the class of a key, by default that of the argument's default value."""
        owner, _, argument = key.rpartition(".")
        if key not in self._names:
            return default_class(self._path(owner), argument) if owner else ""
        name = self._names[key]
        return name if "." in name else offered(key).get(name, "")  # a short name is one that we offer

    def _takes_one_class(self, key: str) -> bool:
        """Returns whether a class of ours takes a single class at a key; names of other owners mean nothing."""
        owner, _, last = key.rpartition(".")
        return last in ONE_CLASS and owner not in FREE_KEYS and self._path(owner).startswith("robustclip.")
