"""Captions of scenes, and what exactly each asks for: the training's words and the judge's questions."""

from dataclasses import dataclass

import numpy as np

from demo_diffusion.scenes import COLOURS, NEUTRAL, Scene, Thing


@dataclass(frozen=True, slots=True)
class AskedThing:
    """A thing as a caption names it; ``None`` where the caption leaves it open."""

    shape: str
    colour: str | None
    size: str | None


@dataclass(frozen=True, slots=True)
class Asked:
    """All that a caption says. ``relation`` is where the first thing lies, seen from the second."""

    things: tuple[AskedThing, ...]
    relation: str | None
    background: str | None


NOUNS = {
    "circle": ("circle", "disc", "dot"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "donut"),
    "cross": ("cross", "plus"),
    "heart": ("heart",),
    "diamond": ("diamond", "rhombus"),
}
"""Names of a shape; the first is used four times of five."""
_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "big": ("big", "big", "large", "huge")}
_RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}
_LINKS = ("and", "and", "and", "with")
_OPENINGS = ("a picture of", "an image of", "a drawing of", "a photo of", "draw", "there is")
_PAINT = ("nice", "beautiful", "simple", "flat", "bright", "shiny", "4k", "please", "very", "detailed", "the", "with")
"""Words that change nothing, so that the model learns to pass over words like these."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def caption(scene: Scene, rng: np.random.Generator, *, small_talk: float = 0.08) -> tuple[str, Asked]:
    """A random one of the scene's descriptions, in lower case, and what it asks for.

    Args:
        small_talk: share of captions that also hold a word which means nothing here.
    """
    things = list(scene.things)
    if rng.random() < 0.5:
        things.reverse()
    relation = None
    if len(things) == 1:
        body, asked = _phrase(things[0], rng)
        parts = (asked,)
    elif _alike(*things) and rng.random() < 0.8:
        body, asked = _phrase(things[0], rng, count="two")
        parts = (asked, asked)
    else:
        words, parts = zip(*(_phrase(thing, rng) for thing in things), strict=True)
        link = str(rng.choice(_LINKS))
        if rng.random() < 0.6:
            relation = relation_of(*things)
            link = str(rng.choice(_RELATION_WORDS[relation]))
        body = f"{words[0]} {link} {words[1]}"
    background = scene.background if scene.background not in NEUTRAL or rng.random() < 0.6 else None
    text = _frame(body, background, rng)
    if rng.random() < small_talk:
        text = _with_small_talk(text, rng)
    return text, Asked(tuple(parts), relation, background)


def relation_of(first: Thing, second: Thing) -> str:
    """Where the first lies, seen from the second: along the axis on which their centres differ more."""
    across, down = first.x - second.x, first.y - second.y
    if abs(across) >= abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def phrase_of(thing: AskedThing) -> str:
    """The plain way to ask for a thing, with its article."""
    phrase = " ".join(word for word in (thing.size, thing.colour, NOUNS[thing.shape][0]) if word)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def words() -> list[str]:
    """Every word of captions, made-up ones left out, sorted."""
    nouns = [noun for names in NOUNS.values() for noun in names]
    phrases = (*_OPENINGS, *_PAINT, *_LINKS, *(each for some in _RELATION_WORDS.values() for each in some))
    sizes = [word for some in _SIZE_WORDS.values() for word in some]
    rest = ("a", "an", "two", "on", "background", "gray", ",")
    text = " ".join((*nouns, *map(_plural, nouns), *phrases, *sizes, *rest, *COLOURS))
    return sorted(set(text.split()))


def _alike(first: Thing, second: Thing) -> bool:
    return (first.shape, first.colour, first.size) == (second.shape, second.colour, second.size)


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def _phrase(thing: Thing, rng: np.random.Generator, count: str = "a") -> tuple[str, AskedThing]:
    names = NOUNS[thing.shape]
    noun = names[0] if rng.random() < 0.8 else str(rng.choice(names))
    if count == "two":
        noun = _plural(noun)
    adjectives = []
    if thing.size != "medium":
        adjectives.append(str(rng.choice(_SIZE_WORDS[thing.size])))
    colour = thing.colour if rng.random() < 0.96 else None
    if colour:
        adjectives.append("gray" if colour == "grey" and rng.random() < 0.3 else colour)
    phrase = " ".join([*adjectives, noun])
    if count == "a":
        count = "an" if phrase[0] in "aeiou" else "a"
    size = thing.size if thing.size != "medium" else None
    return f"{count} {phrase}", AskedThing(thing.shape, colour, size)


def _frame(body: str, background: str | None, rng: np.random.Generator) -> str:
    opening = f"{rng.choice(_OPENINGS)} " if rng.random() < 0.15 else ""
    if background is None:
        return opening + body
    article = "an" if background[0] in "aeiou" else "a"
    drawn = rng.random()
    if drawn < 0.7:
        return f"{opening}{body} on {article} {background} background"
    if drawn < 0.8:
        return f"{opening}{body} with {article} {background} background"
    if drawn < 0.9:
        return f"{opening}{body} on {background}"
    return f"{background} background, {opening}{body}"


def _with_small_talk(text: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        word = str(rng.choice(_PAINT))
    else:
        word = "".join(_LETTERS[each] for each in rng.integers(len(_LETTERS), size=rng.integers(2, 6)))
    return f"{word} {text}" if rng.random() < 0.5 else f"{text}, {word}"
