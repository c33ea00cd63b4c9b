"""What is in a picture, by its pixels alone: background, and each thing's shape, colour and place.

Colours are the nearest of the palette to the median of what was found; shapes the nearest of templates drawn clean
at many sizes and tilts, or none where every template is too far. Needs no trained model.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from demo_diffusion.captions import Asked, AskedThing
from demo_diffusion.scenes import COLOURS, RELATIONS, SHAPES, SIDE, Scene, Thing, draw

_DIFFERS = 42.0
"""Distance in RGB from the background at which a pixel belongs to a thing; the palette's closest pair is 111 apart."""
_MAX_COLOUR_DISTANCE = 55.0
_MIN_AREA = 20
_CROP = 20
_MAX_SHAPE_DISTANCE = 0.19
"""Root mean square difference of coverage. Clean renders lie below 0.1 of their template."""
SMALL_BELOW, BIG_FROM = 9.8, 12.8

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SeenThing:
    """A connected patch that is not background. Shape and colour are ``None`` where nothing known comes near."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    extent: float
    distance: float


@dataclass(frozen=True, slots=True)
class Seen:
    background: str | None
    things: tuple[SeenThing, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one picture; ``None`` where the caption asked for nothing of the kind."""

    present: bool
    """Every asked thing is there with its shape and colour."""
    exact: bool
    """And nothing else is."""
    sizes: bool | None
    relation: bool | None
    background: bool | None


def look(picture: Picture) -> Seen:
    """Find the things in a picture, (64, 64, 3) uint8, from the largest to the smallest."""
    pixels = picture.astype(np.float64)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    background = np.median(np.concatenate([frame, pixels[:, -2:].reshape(-1, 3)]), axis=0)
    labels, count = ndimage.label(np.linalg.norm(pixels - background, axis=-1) > _DIFFERS)
    patches = [labels == number for number in range(1, count + 1)]
    patches = sorted((patch for patch in patches if patch.sum() >= _MIN_AREA), key=lambda patch: -patch.sum())
    return Seen(_name_colour(background), tuple(_see(pixels, background, patch) for patch in patches))


def _see(
    pixels: npt.NDArray[np.float64], background: npt.NDArray[np.float64], patch: npt.NDArray[np.bool_]
) -> SeenThing:
    inner = ndimage.binary_erosion(patch)
    colour = np.median(pixels[inner if inner.sum() >= 6 else patch], axis=0)
    towards = colour - background
    coverage = np.clip((pixels - background) @ towards / max(float(towards @ towards), 1.0), 0, 1)
    coverage = np.where(ndimage.binary_dilation(patch, iterations=2), coverage, 0)
    rows, columns = np.nonzero(patch)
    x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    extent = max(np.ptp(columns) + 1, np.ptp(rows) + 1) / 2
    shape, distance = _name_shape(_crop(coverage, x, y, extent))
    return SeenThing(shape, _name_colour(colour), float(x), float(y), float(extent), distance)


def _crop(coverage: npt.NDArray[np.float64], x: float, y: float, extent: float) -> npt.NDArray[np.float32]:
    """The square around a thing, scaled to (20, 20)."""
    half = extent + 0.5
    image = Image.fromarray(coverage.astype(np.float32))
    box = (x - half, y - half, x + half, y + half)
    padded = Image.new("F", (SIDE * 2, SIDE * 2))
    padded.paste(image, (SIDE // 2, SIDE // 2))
    moved = tuple(each + SIDE // 2 for each in box)
    return np.asarray(padded.resize((_CROP, _CROP), Image.Resampling.BILINEAR, box=moved))


def _name_colour(rgb: npt.NDArray[np.float64]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - each)) for name, each in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= _MAX_COLOUR_DISTANCE else None


def _name_shape(crop: npt.NDArray[np.float32]) -> tuple[str | None, float]:
    names, templates = _templates()
    distances = np.sqrt(np.square(templates - crop.reshape(-1)).mean(axis=1))
    nearest = int(distances.argmin())
    distance = float(distances[nearest])
    return (names[nearest] if distance <= _MAX_SHAPE_DISTANCE else None), distance


@cache
def _templates() -> tuple[list[str], npt.NDArray[np.float32]]:
    """Clean renders, black on white, through the same crop: names, and (n, 400) coverage."""
    names, crops = [], []
    for shape in SHAPES:
        for extent in (6.2, 7.0, 8.1, 9.7, 11.5, 14.0, 18.0):
            for tilt in (-8.0, -4.0, 0.0, 4.0, 8.0):
                for shift in (0.0, 0.5):
                    middle = SIDE / 2 + shift
                    thing = Thing(shape, "black", "medium", middle, middle, extent, tilt, (0, 0, 0))
                    picture = draw(Scene((thing,), "white", (255, 255, 255)))
                    coverage = 1 - picture[..., 0] / 255.0
                    rows, columns = np.nonzero(coverage > _DIFFERS / np.sqrt(3 * 255.0**2))
                    x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
                    half = max(np.ptp(columns) + 1, np.ptp(rows) + 1) / 2
                    names.append(shape)
                    crops.append(_crop(coverage, x, y, half).reshape(-1))
    return names, np.stack(crops)


def judge(asked: Asked, seen: Seen) -> Verdict:
    """Hold what was seen against what was asked. Pairs are matched in the way that satisfies most of it."""
    best = Verdict(False, False, *_none_of(asked))
    for order in _orders(len(asked.things), len(seen.things)):
        things = [seen.things[index] for index in order]
        if not all(_is(want, thing) for want, thing in zip(asked.things, things, strict=True)):
            continue
        verdict = _verdict(asked, seen, things)
        if not best.present or _worth(verdict) > _worth(best):
            best = verdict
    return best


def _none_of(asked: Asked) -> tuple[bool | None, bool | None, bool | None]:
    sizes = False if any(thing.size for thing in asked.things) else None
    return sizes, False if asked.relation else None, False if asked.background else None


def _verdict(asked: Asked, seen: Seen, things: list[SeenThing]) -> Verdict:
    sized = [(want.size, thing.extent) for want, thing in zip(asked.things, things, strict=True) if want.size]
    return Verdict(
        present=True,
        exact=len(seen.things) == len(things),
        sizes=all(_has_size(size, extent) for size, extent in sized) if sized else None,
        relation=_lies(asked.relation, *things) if asked.relation else None,
        background=seen.background == asked.background if asked.background else None,
    )


def _worth(verdict: Verdict) -> int:
    return sum(each is True for each in (verdict.sizes, verdict.relation))


def _orders(wanted: int, found: int) -> list[tuple[int, ...]]:
    if wanted == 1:
        return [(index,) for index in range(found)]
    return [(first, second) for first in range(found) for second in range(found) if first != second]


def _is(want: AskedThing, thing: SeenThing) -> bool:
    return thing.shape == want.shape and thing.colour is not None and want.colour in (None, thing.colour)


def _has_size(size: str, extent: float) -> bool:
    return extent < SMALL_BELOW if size == "small" else extent >= BIG_FROM


def _lies(relation: str, first: SeenThing, second: SeenThing) -> bool:
    """Whether the centres differ the asked way, and more so than across it."""
    assert relation in RELATIONS
    across, down = first.x - second.x, first.y - second.y
    along, beside = (across, down) if relation in ("left", "right") else (down, across)
    return abs(along) >= abs(beside) and (along < 0) == (relation in ("left", "above"))
