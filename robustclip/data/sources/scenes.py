"""Draws the scenes of the shapes world as RGB pixels.

Pixels are equal on every machine, as only IEEE-exact operations (+ - * / sqrt min max) in float32 and
`random.Random.random`, whose stream Python guarantees, are used. A shape is an implicit function (negative inside,
approximately the distance to the edge), which gives anti-aliased edges without supersampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]  # float32 throughout: numpy's stubs widen it at each Python number
RGB = tuple[int, int, int]
Choice = TypeVar("Choice")

SIDE = 32
"""Height and width of an image in pixels."""

COLOURS: dict[str, RGB] = {
    "red": (208, 48, 40),
    "green": (32, 128, 48),
    "blue": (40, 72, 200),
    "yellow": (228, 208, 48),
    "purple": (120, 48, 152),
    "pink": (240, 144, 184),
    "cyan": (64, 200, 216),
    "brown": (120, 76, 40),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "lime": (152, 228, 64),
}
TEXTURES = ("solid", "striped", "barred", "dotted", "checkered", "hatched")
COUNTS = ("one", "two", "three", "four", "five")
RADII = {"tiny": 3.5, "small": 6.0, "large": 9.5, "huge": 13.5}
SIZES = tuple(RADII)
POSITIONS: dict[str, tuple[float, float]] = {
    f"{row} {column}".replace("middle ", "").replace(" middle", "").replace("middle", "centre"): (x, y)
    for row, y in (("top", 7.0), ("middle", 16.0), ("bottom", 25.0))
    for column, x in (("left", 7.0), ("middle", 16.0), ("right", 25.0))
}
BACKGROUNDS: dict[str, tuple[RGB, RGB, str, float]] = {  # two colours, the pattern that mixes them, its period
    "grass": ((56, 136, 48), (96, 176, 72), "barred", 4.0),
    "sand": ((224, 200, 144), (188, 160, 104), "dotted", 4.0),
    "sea": ((32, 88, 168), (88, 152, 208), "striped", 7.0),
    "sky": ((96, 164, 232), (228, 240, 252), "graded", 32.0),
    "night": ((16, 20, 56), (220, 220, 200), "starry", 9.0),
    "brick": ((156, 72, 56), (204, 192, 180), "bricked", 8.0),
    "snow": ((240, 244, 250), (196, 212, 232), "dotted", 6.0),
    "wood": ((148, 104, 64), (112, 72, 40), "hatched", 6.0),
}


@dataclass(frozen=True)
class Scene:
    """The content of one image.

    Args:
        shape: name in `SHAPES`.
        colour: name in `COLOURS`.
        texture: name in `TEXTURES`.
        count: number of objects, 1 to 5.
        size: name in `SIZES`, for a single object.
        position: name in `POSITIONS`, for a single object.
        background: name in `BACKGROUNDS`, or ``plain``.
        style: ``filled``, ``outline``, ``faint`` or ``mosaic``.
    """

    shape: str
    colour: str
    texture: str = "solid"
    count: int = 1
    size: str = "large"
    position: str = "centre"
    background: str = "plain"
    style: str = "filled"


def pick(random: Random, options: Sequence[Choice]) -> Choice:
    """Chooses uniformly, with `random()` alone, whose stream is equal in all Python releases.

    Args:
        random: random generator.
        options: values to choose from.
    """
    return options[int(random.random() * len(options))]


def _between(random: Random, low: float, high: float) -> float:
    return low + (high - low) * random.random()


def _unit(values: Array) -> Array:
    """Clips values to [0, 1]."""
    clipped: Array = np.clip(values, 0.0, 1.0)
    return clipped


def _length(u: Array, v: Array) -> Array:
    length: Array = np.sqrt(u * u + v * v)
    return length


def _planes(u: Array, v: Array, sides: int, radius: float) -> list[Array]:
    """Returns signed distances to the edges of a regular polygon whose first edge is at the bottom."""
    angles = [2.0 * math.pi * side / sides for side in range(sides)]
    return [u * np.float32(math.sin(angle)) + v * np.float32(math.cos(angle)) - np.float32(radius) for angle in angles]


def _polygon(sides: int, radius: float) -> Callable[[Array, Array], Array]:
    def polygon(u: Array, v: Array) -> Array:
        planes = _planes(u, v, sides, radius)
        highest: Array = np.max(planes, axis=0)
        return highest

    return polygon


def _star(u: Array, v: Array) -> Array:
    """Draws a pentagram: points outside of at most one of five half-planes, by the second highest distance."""
    second: Array = np.sort(_planes(u, v, 5, 0.37), axis=0)[-2]
    return second


def _heart(u: Array, v: Array) -> Array:
    side = np.abs(u)
    lobes = _length(side - 0.42, v + 0.3) - 0.5
    edge: Array = np.minimum(lobes, np.maximum(0.77 * side + 0.64 * v - 0.63, -0.3 - v))
    return edge


def _house(u: Array, v: Array) -> Array:
    side = np.abs(u)
    walls = np.maximum(side - 0.62, np.abs(v - 0.4) - 0.5)
    edge: Array = np.minimum(walls, np.maximum(0.7 * side - 0.71 * v - 0.71, v + 0.05))
    return edge


DRAWERS: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: _length(u, v) - 0.92,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    "triangle": lambda u, v: _polygon(3, 0.55)(u, v - 0.2),
    "star": _star,
    "cross": lambda u, v: np.maximum(np.minimum(np.abs(u), np.abs(v)) - 0.3, np.maximum(np.abs(u), np.abs(v)) - 0.95),
    "ring": lambda u, v: np.abs(_length(u, v) - 0.7) - 0.24,
    "heart": _heart,
    "crescent": lambda u, v: np.maximum(_length(u, v) - 0.95, 0.78 - _length(u - 0.5, v)),
    "pentagon": _polygon(5, 0.78),
    "diamond": lambda u, v: 0.83 * np.abs(u) + 0.55 * np.abs(v) - 0.56,
    "house": _house,
    "drop": lambda u, v: np.minimum(
        _length(u, v - 0.35) - 0.6, np.maximum(0.88 * np.abs(u) - 0.47 * v - 0.47, v - 0.1)
    ),
}
SHAPES = tuple(DRAWERS)
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + np.float32(0.5)


def _wave(position: Array, period: float) -> Array:
    """Returns a triangle wave with flat tops, in [0, 1]: soft stripes half a period wide."""
    phase = position / np.float32(period)
    folded = np.abs(phase - np.floor(phase) - 0.5) * np.float32(period) - np.float32(period / 4)
    return _unit(folded + 0.5)


def _spots(x: Array, y: Array, period: float, radius: float) -> Array:
    across, down = x / np.float32(period), y / np.float32(period)
    distance = _length(across - np.floor(across) - 0.5, down - np.floor(down) - 0.5) * np.float32(period)
    return _unit(np.float32(radius + 0.5) - distance)


def _bricks(x: Array, y: Array, period: float) -> Array:
    shifted = x + np.floor(y / np.float32(period / 2)) * np.float32(period / 2)
    gaps_x, gaps_y = shifted / np.float32(period), y / np.float32(period / 2)
    mortar = np.minimum((gaps_x - np.floor(gaps_x)) * np.float32(period), (gaps_y - np.floor(gaps_y)) * period / 2)
    return _unit(1.5 - mortar)


# Weight of the second colour at each pixel, `(SIDE, SIDE)` in [0, 1], by coordinates and period.
PATTERNS: dict[str, Callable[[Array, Array, float], Array]] = {
    "striped": lambda x, y, period: _wave(y, period),
    "barred": lambda x, y, period: _wave(x, period),
    "hatched": lambda x, y, period: _wave((x + y) * np.float32(0.7071), period),
    "dotted": lambda x, y, period: _spots(x, y, period, period * 0.3),
    "starry": lambda x, y, period: _spots(x, y, period, 0.6),
    "graded": lambda x, y, period: _unit(y / np.float32(period)),
    "checkered": lambda x, y, period: _unit(np.abs(_wave(x, 2 * period) - _wave(y, 2 * period))),
    "bricked": _bricks,
}


def _jittered(random: Random, colour: RGB, amount: float) -> Array:
    return np.array([channel + _between(random, -amount, amount) for channel in colour], dtype=np.float32)


def _mixed(first: Array, second: Array, weight: Array) -> Array:
    mixed: Array = first + (second - first) * weight[..., None]
    return mixed


def _ground(random: Random, scene: Scene) -> Array:
    """Draws the background, ``(SIDE, SIDE, 3)`` in [0, 255]."""
    if scene.background != "plain":
        first, second, pattern, period = BACKGROUNDS[scene.background]
        shift_x, shift_y = _between(random, 0, period), (0.0 if pattern == "graded" else _between(random, 0, period))
        weight = PATTERNS[pattern](_X + np.float32(shift_x), _Y + np.float32(shift_y), period)
        return _mixed(_jittered(random, first, 12), _jittered(random, second, 12), weight)
    brightness = sum(COLOURS[scene.colour]) / 3
    is_light = random.random() < 0.5 if 90 < brightness < 170 else brightness <= 90
    level = int(_between(random, 196, 232) if is_light else _between(random, 36, 68))
    return np.zeros((SIDE, SIDE, 3), dtype=np.float32) + _jittered(random, (level, level, level), 10)


def _places(random: Random, scene: Scene) -> list[tuple[float, float, float]]:
    """Returns centre x, centre y and radius of each object, in pixels."""
    if scene.count == 1:
        x, y = POSITIONS[scene.position]
        radius = RADII[scene.size] * _between(random, 0.94, 1.06)
        return [(x + _between(random, -1.5, 1.5), y + _between(random, -1.5, 1.5), radius)]
    cells = [(x, y) for x in (6.0, 16.0, 26.0) for y in (6.0, 16.0, 26.0)]
    chosen = [cells.pop(int(random.random() * len(cells))) for _ in range(scene.count)]
    radius = _between(random, 4.2, 4.9)
    return [(x + _between(random, -0.8, 0.8), y + _between(random, -0.8, 0.8), radius) for x, y in chosen]


def render(scene: Scene, random: Random) -> npt.NDArray[np.uint8]:
    """Draws a scene as pixels ``(SIDE, SIDE, 3)``.

    Args:
        scene: content of the image.
        random: random generator, which determines the exact place, tilt and shade.
    """
    ground = _ground(random, scene)
    x, y, radius = np.array(_places(random, scene), dtype=np.float32).T[:, :, None, None]
    half_tangent = _between(random, -0.12, 0.12)
    square = half_tangent * half_tangent
    cosine, sine = np.float32((1 - square) / (1 + square)), np.float32(2 * half_tangent / (1 + square))
    across, down = (_X - x) / radius, (_Y - y) / radius
    edge = DRAWERS[scene.shape](cosine * across + sine * down, cosine * down - sine * across) * radius
    if scene.style == "outline":
        edge = np.abs(edge) - np.float32(0.7)
    cover = _unit(0.5 - edge).max(axis=0)
    if scene.style == "faint":
        cover = cover * np.float32(0.4)
    paint = _jittered(random, COLOURS[scene.colour], 14)
    if scene.texture != "solid":
        other = paint * np.float32(0.3) if sum(COLOURS[scene.colour]) > 330 else paint * np.float32(0.3) + 170
        shift_x, shift_y = np.float32(_between(random, 0, 5)), np.float32(_between(random, 0, 5))
        weight = PATTERNS[scene.texture](_X + shift_x, _Y + shift_y, 5.0)
        paint = _mixed(paint, other.astype(np.float32), weight)
    image = ground + (paint - ground) * cover[..., None]
    if scene.style == "mosaic":
        blocks = (image[0::2, 0::2] + image[1::2, 0::2] + image[0::2, 1::2] + image[1::2, 1::2]) * np.float32(0.25)
        image = blocks.repeat(2, axis=0).repeat(2, axis=1)
    pixels: npt.NDArray[np.uint8] = (np.clip(image, 0.0, 255.0) + np.float32(0.5)).astype(np.uint8)
    return pixels
