"""Cross-encoders: a text is judged against a query. Floor 4. A `tasks.RerankTask`."""

import functools
from collections.abc import Sequence

from sardonyx.repository import families
from sardonyx.serving.activation import activate
from sardonyx.serving.encoder import EncoderModel, EncoderVersion, item
from sardonyx.serving.item_calls import Item, ItemCalls
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.tasks import Encoded, EncodeOptions


class RerankerModel(EncoderModel):
    """See `tasks.RerankTask`.

    Args:
        version, calls, pool: as `EncoderModel`.
        labels: the manifest's.
    """

    def __init__(self, version: EncoderVersion, calls: ItemCalls, pool: WorkerPool, *, labels: families.Labels) -> None:
        super().__init__(version, calls, pool)
        self._activation = labels.activation

    async def rerank(self, pairs: Sequence[tuple[str, str]], *, options: EncodeOptions) -> Encoded:
        """See `tasks.RerankTask.rerank`. `EncodeOptions.add_special_tokens` says nothing: pairs always have them."""
        limit = self.limit(options)
        # A query is read as far as a text is, or refused: the tokenizer never cuts it.
        num_chars = self.most_chars([query for query, _ in pairs], None) + self.most_chars([t for _, t in pairs], limit)
        make = functools.partial(self._make, options=options, limit=limit)
        results = await self.run(pairs, make, num_chars=num_chars, timeout_s=options.timeout_s)
        return Encoded(values=activate(results.values, self._activation), num_tokens=results.num_tokens)

    def _make(self, index: int, pair: tuple[str, str], *, options: EncodeOptions, limit: int | None) -> list[Item]:
        row = self._tokenizer.encode_pair(*pair, max_tokens=limit, side=options.truncation_side)
        return [item(self.check(index, row))]
