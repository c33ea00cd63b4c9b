"""Text classifiers: a score for each label. Floor 4. A `tasks.ClassifyTask`."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from sardonyx.errors import ContextLengthExceeded
from sardonyx.repository import families
from sardonyx.serving.activation import activate
from sardonyx.serving.encoder import PARAM, EncoderModel, EncoderVersion, item
from sardonyx.serving.item_calls import Item, ItemCalls
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.tasks import CategoryRule, Encoded, EncodeOptions

MAX_WINDOWED_CHARS = 1 << 20
"""Of a text that is judged in windows: about 1,300 windows of 256 tokens."""


class TextClassifier(EncoderModel):
    """See `tasks.ClassifyTask`.

    Args:
        version, calls, pool: as `EncoderModel`.
        labels: the manifest's.
        moderation: the operator's rules, by label.
    """

    def __init__(
        self,
        version: EncoderVersion,
        calls: ItemCalls,
        pool: WorkerPool,
        *,
        labels: families.Labels,
        moderation: Mapping[str, Sequence[CategoryRule]],
    ) -> None:
        super().__init__(version, calls, pool)
        self.labels = labels.names
        self.moderation = moderation
        self._activation = labels.activation

    async def classify(self, texts: Sequence[str], *, options: EncodeOptions) -> Encoded:
        """See `tasks.ClassifyTask.classify`. Where the operator's config cuts long texts, these have one window."""
        limit = self.limit(options)
        if options.truncate is None and limit is None:
            num_chars = _windowed_chars(texts)
            make = functools.partial(self._make_windows, options=options)
        else:
            num_chars = self.most_chars(texts, limit)
            make = functools.partial(self._make, options=options, limit=limit)
        results = await self.run(texts, make, num_chars=num_chars, timeout_s=options.timeout_s)
        scores = activate(results.values, self._activation)
        if len(scores) > len(texts):
            begins = np.cumsum([0, *results.num_rows[:-1]])
            scores = np.maximum.reduceat(scores, begins, axis=0)
        return Encoded(values=scores, num_tokens=results.num_tokens)

    def _make(self, index: int, text: str, *, options: EncodeOptions, limit: int | None) -> list[Item]:
        return [item(self.encode(index, text, options, limit))]

    def _make_windows(self, index: int, text: str, *, options: EncodeOptions) -> list[Item]:
        if not options.add_special_tokens:
            return self._make(index, text, options=options, limit=None)
        return [item(row) for row in self._tokenizer.windows(text, self.max_model_len)]


def _windowed_chars(texts: Sequence[str]) -> int:
    for index, text in enumerate(texts):
        if len(text) > MAX_WINDOWED_CHARS:
            raise ContextLengthExceeded(
                f"text {index} has {len(text):,} characters; at most {MAX_WINDOWED_CHARS:,} are judged",
                param=PARAM,
            )
    return sum(map(len, texts))
