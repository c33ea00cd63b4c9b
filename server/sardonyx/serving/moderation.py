"""What the moderators of a repository say together about texts and pictures, by OpenAI's categories.

Floor 4. A moderator is a classifier whose config maps labels to categories; this asks several and joins their answers.
It knows no model's name but in messages, and no wire format.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx.errors import UnsupportedFeature
from sardonyx.repository.encoder_config import CATEGORIES
from sardonyx.serving.task_finder import Judge
from sardonyx.serving.tasks import CategoryRule, ClassifyTask, Encoded, EncodeOptions, ImageClassifyTask
from sardonyx.serving.together import together

Kind: TypeAlias = Literal["text", "image"]

# Joining the answers on so many items takes about a millisecond; beyond that a thread does it.
_MAX_ITEMS_ON_LOOP = 64


class ModerationItem(msgspec.Struct, frozen=True, kw_only=True):
    """What is judged as one."""

    texts: Sequence[str] = ()
    images: Sequence[bytes] = ()
    """Encoded pictures."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """On one item. Each of `CATEGORIES` is in each mapping."""

    scores: dict[str, float]
    """In [0, 1]: the highest that any part got from any label. 0 where nobody judged it."""
    flags: dict[str, bool]
    """Some label reached the threshold of its rule."""
    kinds: dict[str, list[Kind]]
    """Of the item's parts that somebody judged for that category."""

    @property
    def is_flagged(self) -> bool:
        return any(self.flags.values())


class Moderator:
    """Asks every judge that can judge what is there, all at once.

    Args:
        judges: at least one, each with rules.
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        self._texts = [judge for judge in judges if isinstance(judge, ClassifyTask)]
        self._images = [judge for judge in judges if isinstance(judge, ImageClassifyTask)]

    def names(self, items: Sequence[ModerationItem]) -> list[str]:
        """The judges that these items are for."""
        names = [judge.name for judge in self._texts if any(item.texts for item in items)]
        names += [judge.name for judge in self._images if any(item.images for item in items)]
        return sorted(names)

    async def judge(self, items: Sequence[ModerationItem], *, timeout_s: float | None = None) -> list[Verdict]:
        """A verdict on each item. A judge gets all the texts, or all the pictures, of all items in one call.

        Args:
            items: each with at least one part.
            timeout_s: for the whole; ``None``: the server's.

        Raises:
            UnsupportedFeature: there are parts of a kind that no judge judges; nothing is passed unjudged.
            ServeError: the first that a judge raised; the others were cancelled. As `ClassifyTask.classify` and
                `ImageClassifyTask.classify_images`.
        """
        self._check_kinds(items)
        texts = [text for item in items for text in item.texts]
        images = [image for item in items for image in item.images]
        options = EncodeOptions(timeout_s=timeout_s)
        judges: list[Judge] = []
        jobs = []
        if texts:
            judges += self._texts
            jobs += [judge.classify(texts, options=options) for judge in self._texts]
        if images:
            judges += self._images
            jobs += [judge.classify_images(images, timeout_s=timeout_s) for judge in self._images]
        answers = await together(jobs)
        if len(items) > _MAX_ITEMS_ON_LOOP:
            return await asyncio.to_thread(_verdicts, items, judges, answers)
        return _verdicts(items, judges, answers)

    def _check_kinds(self, items: Sequence[ModerationItem]) -> None:
        only: list[Judge] = [*self._texts, *self._images]
        others = f"{only[0].name} judges" if len(only) == 1 else "the moderation models judge"
        if not self._texts and any(item.texts for item in items):
            raise UnsupportedFeature(
                f"input: holds text, and {others} pictures only; export a text classifier and map its labels to "
                "categories, or name one as model",
                param="input",
            )
        if not self._images and any(item.images for item in items):
            raise UnsupportedFeature(
                f"input: holds a picture, and {others} text only; export an image classifier and map its labels to "
                "categories, or name one as model",
                param="input",
            )


def _verdicts(items: Sequence[ModerationItem], judges: Sequence[Judge], answers: Sequence[Encoded]) -> list[Verdict]:
    verdicts = [_nothing_said() for _ in items]
    for judge, answer in zip(judges, answers, strict=True):
        kind: Kind = "text" if isinstance(judge, ClassifyTask) else "image"
        first = 0
        for item, verdict in zip(items, verdicts, strict=True):
            last = first + len(item.texts if kind == "text" else item.images)
            if last > first:
                _add(verdict, kind, judge, answer.values[first:last])
            first = last
    return verdicts


def _nothing_said() -> Verdict:
    return Verdict(
        scores=dict.fromkeys(CATEGORIES, 0.0),
        flags=dict.fromkeys(CATEGORIES, False),
        kinds={category: [] for category in CATEGORIES},
    )


def _add(verdict: Verdict, kind: Kind, judge: Judge, values: npt.NDArray[np.float32]) -> None:
    """Let a judge's scores of an item's parts, (parts, labels), count where they are higher than what was there."""
    rules: Mapping[str, Sequence[CategoryRule]] = judge.moderation
    for label, highest in zip(judge.labels, values.max(axis=0).tolist(), strict=True):
        for rule in rules.get(label, ()):
            verdict.scores[rule.category] = max(verdict.scores[rule.category], highest)
            verdict.flags[rule.category] |= highest >= rule.threshold
            if kind not in verdict.kinds[rule.category]:
                verdict.kinds[rule.category].append(kind)
