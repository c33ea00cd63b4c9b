"""Scenes of coloured shapes: sampled from a seed, drawn antialiased, and described in words.

Owns what can be drawn and how it is said. Knows nothing of models; the judge (`judge.py`) knows the names and
colours from here and sees only pictures.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIDE = 64
"""Pixels of a picture's side."""
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
COLOURS = {
    "red": (215, 35, 40),
    "orange": (242, 128, 20),
    "yellow": (250, 225, 60),
    "green": (45, 160, 65),
    "cyan": (60, 205, 220),
    "blue": (35, 80, 215),
    "purple": (140, 50, 170),
    "pink": (248, 140, 190),
    "white": (248, 248, 248),
    "grey": (128, 128, 128),
    "black": (20, 20, 20),
}
NEUTRAL = ("white", "grey", "black")
"""Backgrounds that a caption may leave unsaid."""
SIZES = {"small": (7.5, 9.0), "medium": (10.5, 12.0), "big": (13.5, 17.0)}
"""Half extents in pixels. Medium is the size that no caption mentions."""
MAX_EXTENT_OF_TWO = 14.0
RELATIONS = ("left", "right", "above", "below")
_MARGIN = 2.0
_GAP = 2.0
_WANDER = 2.0
"""How far in pixels a centre lies from where a picture of so many things has it, along each axis. Wherever a thing may
be, the network has to have seen it there with every shape: ten times the room takes ten times the training."""
_MAX_TILT = 1.0
_SUPERSAMPLING = 4
_JITTER = 6
"""How far a colour's channels stray from the palette."""

Colour = tuple[int, int, int]
Outline = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Thing:
    """A drawn shape: centre and half extent in pixels (x to the right, y downwards), tilt in degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    extent: float
    tilt: float
    rgb: Colour


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two things, far enough apart for a strip of background between them."""

    things: tuple[Thing, ...]
    background: str
    background_rgb: Colour


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene: half of them hold one thing, the others two, of which every fifth pair is alike."""
    background = str(rng.choice(NEUTRAL if rng.random() < 0.5 else list(COLOURS)))
    colours = [name for name in COLOURS if name != background]
    if rng.random() < 0.5:
        kinds = [_sample_kind(rng, colours)]
    else:
        kinds = [_sample_kind(rng, colours), _sample_kind(rng, colours)]
        if rng.random() < 0.2:
            kinds[1] = kinds[0]
    things = _place(kinds, rng)
    return Scene(things, background, _stray(COLOURS[background], rng))


def _sample_kind(rng: np.random.Generator, colours: list[str]) -> tuple[str, str, str]:
    size = ("small", "medium", "medium", "big")[rng.integers(4)]
    return str(rng.choice(SHAPES)), str(rng.choice(colours)), size


def _place(kinds: list[tuple[str, str, str]], rng: np.random.Generator) -> tuple[Thing, ...]:
    """One thing about the middle, two side by side or one above the other; each inside the picture and apart."""
    middles = [SIDE / 2] if len(kinds) == 1 else [SIDE / 4, SIDE * 3 / 4]
    is_column = rng.random() < 0.5
    while True:
        things = []
        for (shape, colour, size), middle in zip(kinds, middles, strict=True):
            low, high = SIZES[size]
            extent = float(rng.uniform(low, high if len(kinds) == 1 else min(high, MAX_EXTENT_OF_TWO)))
            edge = extent + _MARGIN
            along, across = (
                float(np.clip(each + rng.uniform(-_WANDER, _WANDER), edge, SIDE - edge)) for each in (middle, SIDE / 2)
            )
            x, y = (across, along) if is_column else (along, across)
            tilt = float(rng.uniform(-_MAX_TILT, _MAX_TILT))
            things.append(Thing(shape, colour, size, x, y, extent, tilt, _stray(COLOURS[colour], rng)))
        if len(things) == 1 or _distance(*things) >= _GAP:
            return tuple(things)


def _distance(first: Thing, second: Thing) -> float:
    """Pixels between two bounding squares along the axis that parts them most."""
    return max(abs(first.x - second.x), abs(first.y - second.y)) - first.extent - second.extent


def _stray(rgb: Colour, rng: np.random.Generator) -> Colour:
    red, green, blue = (int(np.clip(each + rng.integers(-_JITTER, _JITTER + 1), 0, 255)) for each in rgb)
    return red, green, blue


def draw(scene: Scene) -> npt.NDArray[np.uint8]:
    """The scene as a picture, (64, 64, 3) uint8. Edges are averages of 16 samples a pixel."""
    side = SIDE * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), scene.background_rgb)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        for number, outline in enumerate(outlines(thing.shape)):
            points = _posed(outline, thing) * _SUPERSAMPLING
            # A second outline is a hole: only the ring has one.
            pen.polygon([(x, y) for x, y in points.tolist()], fill=thing.rgb if number == 0 else scene.background_rgb)
    return np.asarray(image.reduce(_SUPERSAMPLING))


def _posed(outline: Outline, thing: Thing) -> Outline:
    angle = math.radians(thing.tilt)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return outline @ turn * thing.extent + (thing.x, thing.y)


def outlines(shape: str) -> list[Outline]:
    """Closed polygons of a shape in the square from -1 to 1, each (n, 2); y points down."""
    turn = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    match shape:
        case "circle":
            return [circle]
        case "ring":
            return [circle, circle * 0.55]
        case "square":
            return [np.array([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])]
        case "diamond":
            return [np.array([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)], dtype=np.float64)]
        case "triangle":
            return [np.array([(0, -0.9), (1, 0.85), (-1, 0.85)])]
        case "cross":
            a, b = 1.0, 0.34
            corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a)]
            return [np.array([*corners, (-b, b), (-a, b), (-a, -b), (-b, -b)])]
        case "star":
            angles = np.arange(10) * math.pi / 5 - math.pi / 2
            radii = np.where(np.arange(10) % 2 == 0, 1.05, 0.46)
            return [np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] + (0, 0.08)]
        case "heart":
            x = 16 * np.sin(turn) ** 3
            y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            return [np.stack([x / 16, -(y + 2.5) / 15], axis=1)]
    raise ValueError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")
