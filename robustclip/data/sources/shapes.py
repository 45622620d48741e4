"""Data sets of the shapes world, a source set and fifteen zero-shot sets, which are drawn without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from random import Random
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from robustclip.data.sources.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    pick,
    render,
)
from robustclip.data.sources.source import LocatedSource, Opened

Fixed = Mapping[str, Any]
"""The fields of a `Scene` that a class determines."""

MENTIONABLE = ("shape", "colour", "texture", "count", "size", "position", "background", "style")
_COLOUR_NAMES = tuple(COLOURS)


def _pairs(*shifts: int) -> tuple[tuple[str, str], ...]:
    """Pairs each colour with the shapes that follow it in the vocabulary at distances `shifts`."""
    return tuple((colour, SHAPES[(i + s) % len(SHAPES)]) for s in shifts for i, colour in enumerate(_COLOUR_NAMES))


SOURCE_PAIRS = _pairs(0, 1, 2, 3, 4, 6)
"""Colour and shape of the source classes."""
HELD_OUT_PAIRS = _pairs(5, 8)
"""Colour and shape of the classes of `held_out_pairs`; neither the source set nor the pretraining has them."""
_FORBIDDEN = frozenset(HELD_OUT_PAIRS)


def plural(shape: str) -> str:
    """Returns the plural of a shape's name."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def describe(scene: Scene, mentioned: Sequence[str] = MENTIONABLE) -> str:
    """Describes a scene in one phrase.

    Args:
        scene: content of an image.
        mentioned: fields to mention; a default such as a plain background has no word and is left out.
    """
    noun = scene.shape if "shape" in mentioned else "shape"
    is_many = "count" in mentioned and scene.count > 1
    words = [COUNTS[scene.count - 1] if "count" in mentioned else "a"]
    if "size" in mentioned and scene.count == 1:
        words.append(scene.size)
    words += [str(getattr(scene, field)) for field in ("texture", "colour") if field in mentioned]
    words.append(plural(noun) if is_many else noun)
    if "position" in mentioned and scene.count == 1:
        words.append(f"at the {scene.position}")
    if "background" in mentioned and scene.background != "plain":
        words.append(f"on {scene.background}")
    styles = {"outline": "a line drawing of ", "mosaic": "a mosaic of ", "faint": "a faint print of "}
    return (styles.get(scene.style, "") if "style" in mentioned else "") + " ".join(words)


def _is_visible(colour: str, background: str) -> bool:
    """Checks whether a colour contrasts with both colours of a background."""
    if background == "plain":
        return True
    return all(
        sum(abs(a - b) for a, b in zip(COLOURS[colour], ground, strict=True)) > 110
        for ground in BACKGROUNDS[background][:2]
    )


def random_scene(random: Random, fixed: Fixed) -> Scene:
    """Chooses the other fields of a scene so that all fields are visible and no held-out pair occurs by chance.

    Args:
        random: random generator.
        fixed: fields that are given.
    """
    style = fixed.get("style", "filled")
    position, size, texture = fixed.get("position"), fixed.get("size"), fixed.get("texture")
    is_single = style != "filled" or any((position, size, texture))
    count = fixed.get("count") or (1 if is_single or random.random() < 0.7 else pick(random, (2, 3, 4, 5)))
    is_bare = count > 1 or size in SIZES[:2] or style != "filled" or position not in (None, "centre")
    texture = texture or ("solid" if is_bare or random.random() < 0.4 else pick(random, TEXTURES))
    needs_room = texture != "solid" or style != "filled"  # a small object would hide its texture or its style
    sizes = SIZES[:2] if position not in (None, "centre") else SIZES[2:] if needs_room else SIZES
    size = size or pick(random, sizes)
    is_loose = size in SIZES[:2] and count == 1
    position = position or (pick(random, tuple(POSITIONS)) if is_loose else "centre")
    grounds = [ground for ground in BACKGROUNDS if "colour" not in fixed or _is_visible(fixed["colour"], ground)]
    is_plain = style != "filled" or random.random() < 0.6
    background = fixed.get("background") or ("plain" if is_plain else pick(random, grounds))
    while True:
        shape, colour = fixed.get("shape") or pick(random, SHAPES), fixed.get("colour") or pick(random, _COLOUR_NAMES)
        is_chosen = "shape" in fixed and "colour" in fixed
        if is_chosen or ((colour, shape) not in _FORBIDDEN and _is_visible(colour, background)):
            return Scene(shape, colour, texture, count, size, position, background, style)


def seeded(key: str) -> Random:
    """Returns a random generator for a key; its stream is equal on every machine and for any PYTHONHASHSEED."""
    return Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


def pretraining_pair(seed: int, index: int) -> tuple[Scene, Random]:
    """Returns one random scene of the pretraining stream and the generator to draw and describe it.

    The stream has no image of any set, since its keys contain no name of a set, and no held-out pair.

    Args:
        seed: seed of the stream.
        index: position in the stream.
    """
    random = seeded(f"pretraining/{seed}/{index}")
    fixed: dict[str, Any] = {}
    if random.random() < 0.3:
        fixed["style"] = pick(random, ("outline", "mosaic", "faint"))
    elif random.random() < 0.15:
        fixed["background"] = pick(random, tuple(BACKGROUNDS))
    return random_scene(random, fixed), random


class _Set(NamedTuple):
    """One set: the fields that each class determines, the templates, and the number of images per split."""

    classes: dict[str, Fixed]
    templates: tuple[str, ...]
    sizes: dict[str, int]


def _source() -> _Set:
    """Makes two classes of each source pair that differ in one more field, so that a colour implies no shape."""
    variants: list[Fixed] = [{"texture": word} for word in TEXTURES[1:]]
    variants += [{"position": word, "size": "small"} for word in POSITIONS if word != "centre"]
    variants += [{"size": word} for word in SIZES if word != "large"]
    variants += [{"count": number} for number in range(2, 6)]
    variants += [{"background": word} for word in BACKGROUNDS]
    classes: dict[str, Fixed] = {}
    for number, (colour, shape) in enumerate(SOURCE_PAIRS):
        visible = [v for v in variants if _is_visible(colour, v.get("background", "plain"))]
        for step in range(2):
            variant = visible[(number * 7 + step * 11) % len(visible)]
            scene = Scene(shape, colour, **variant)
            field = next(iter(variant))
            classes[describe(scene, ("shape", "colour", field))] = asdict(scene)
    return _Set(classes, ("{}", "a picture of {}", "an image of {}"), {"train": 28 * len(classes), "test": 288})


def _zero_shot(words: Sequence[tuple[str, Fixed]], *templates: str, train: int = 0) -> _Set:
    return _Set(dict(words), templates, {"test": 240} | ({"train": train} if train else {}))


def _fields(field: str, words: Sequence[str], **others: Any) -> list[tuple[str, Fixed]]:
    return [(word, {field: word, **others}) for word in words]


def _colour_shapes(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, Fixed]]:
    return [(f"{c} {s}", {"colour": c, "shape": s, "background": "plain", "count": 1}) for c, s in pairs]


def _counted(shapes: Sequence[str]) -> list[tuple[str, Fixed]]:
    classes: list[tuple[str, Fixed]] = []
    for shape, (number, word) in product(shapes, enumerate(COUNTS, start=1)):
        fixed = {"count": number, "background": "plain"} | ({} if shape == "shape" else {"shape": shape})
        classes.append((f"{word} {plural(shape) if number > 1 else shape}", fixed))
    return classes


_TEXTURED = [(t, SHAPES[(i + s) % 12]) for s in (0, 3, 6, 9) for i, t in enumerate(TEXTURES)]
_GROUNDED = [(b, SHAPES[(i + s) % 12]) for s in (0, 4, 8) for i, b in enumerate(BACKGROUNDS)]
_SHAPE_TEMPLATES = ("a {}", "a picture of a {}", "an image of a {}")
_WORD_TEMPLATES = ("a {} shape", "a picture of a {} shape", "an image of a {} shape")
_PLAIN: dict[str, Any] = {"background": "plain"}

_MAKERS: dict[str, Callable[[], _Set]] = {
    "source": _source,
    "colours": lambda: _zero_shot(_fields("colour", _COLOUR_NAMES), *_WORD_TEMPLATES, train=480),
    "shapes": lambda: _zero_shot(_fields("shape", SHAPES, count=1), *_SHAPE_TEMPLATES),
    "textures": lambda: _zero_shot(_fields("texture", TEXTURES, **_PLAIN), *_WORD_TEMPLATES),
    "counts": lambda: _zero_shot(_counted(("shape",)), "{}", "a picture of {}", "an image of {}"),
    "sizes": lambda: _zero_shot(_fields("size", SIZES, **_PLAIN), *_WORD_TEMPLATES),
    "positions": lambda: _zero_shot(_fields("position", tuple(POSITIONS), **_PLAIN), "a shape at the {}"),
    "backgrounds": lambda: _zero_shot(_fields("background", tuple(BACKGROUNDS)), "a shape on {}"),
    "colour_shapes": lambda: _zero_shot(_colour_shapes(SOURCE_PAIRS[:24]), *_SHAPE_TEMPLATES),
    "held_out_pairs": lambda: _zero_shot(_colour_shapes(HELD_OUT_PAIRS), *_SHAPE_TEMPLATES),
    "texture_shapes": lambda: _zero_shot(
        [(f"{t} {s}", {"texture": t, "shape": s, **_PLAIN}) for t, s in _TEXTURED], *_SHAPE_TEMPLATES
    ),
    "count_shapes": lambda: _zero_shot(
        _counted(("circle", "triangle", "star", "cross")), "{}", "a picture of {}", "an image of {}"
    ),
    "background_shapes": lambda: _zero_shot(
        [(f"{s} on {b}", {"background": b, "shape": s, "count": 1}) for b, s in _GROUNDED], *_SHAPE_TEMPLATES
    ),
    "outlines": lambda: _zero_shot(_fields("shape", SHAPES, style="outline"), "a line drawing of a {}"),
    "mosaics": lambda: _zero_shot(_fields("shape", SHAPES, style="mosaic"), "a mosaic of a {}"),
    "faint_prints": lambda: _zero_shot(_fields("shape", SHAPES, style="faint"), "a faint print of a {}"),
}
SHAPES_SETS: tuple[str, ...] = tuple(_MAKERS)
"""Names of the sets: the source set first, then the fifteen zero-shot sets."""


class Shapes(LocatedSource):
    """A set of the shapes world by its name, such as ``shapes:colours``."""

    def open(self, split: str) -> Opened:
        """Opens the set, whose images are drawn when they are read."""
        shapes = ShapesDataset(self.location, split)
        return Opened(shapes, names=shapes.class_names, templates=shapes.templates, native_size=True)


class ShapesDataset(Dataset[tuple[Image.Image, int]]):
    """One split of one set; name, split and index determine the pixels on every machine.

    Args:
        name: one of `SHAPES_SETS`.
        split: ``test``; the sets ``source`` and ``colours`` also have ``train``.

    Raises:
        ValueError: the set or the split does not exist.
    """

    def __init__(self, name: str, split: str = "test") -> None:
        if name not in _MAKERS:
            raise ValueError(f"name must be one of {', '.join(SHAPES_SETS)}; got {name!r}")
        classes, self.templates, sizes = _MAKERS[name]()
        if split not in sizes:
            raise ValueError(f"split of shapes set {name!r} must be one of {', '.join(sizes)}; got {split!r}")
        self.name, self.split, self.class_names = name, split, tuple(classes)
        self.labels = [index % len(classes) for index in range(sizes[split])]
        self._fixed = list(classes.values())

    def __len__(self) -> int:
        return len(self.labels)

    def _scene(self, index: int) -> tuple[Scene, Random]:
        if not 0 <= index < len(self):
            raise IndexError(f"index of shapes set {self.name!r} must be in [0, {len(self) - 1}], got {index}")
        random = seeded(f"{self.name}/{self.split}/{index}")
        return random_scene(random, self._fixed[self.labels[index]]), random

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Returns the RGB image (32 x 32) and the label of one index."""
        scene, random = self._scene(index)
        return Image.fromarray(render(scene, random)), self.labels[index]

    def caption(self, index: int) -> str:
        """Describes one image by all its fields."""
        return describe(self._scene(index)[0])
