"""What all models have in common that read a text once: tokenising, limits, and the way of items through the steps.

Floor 4. `serving.embeddings`, `serving.reranker` and `serving.classifier` say what becomes a row, and what of a result.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx.errors import ContextLengthExceeded, InvalidRequest
from sardonyx.processing.encoder_tokenizer import MAX_CHARS_PER_TOKEN, EncoderTokenizer, Row
from sardonyx.serving.admission import estimate_tokens
from sardonyx.serving.item_calls import Item, ItemCalls
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.tasks import EncodeOptions

PARAM = "input"
"""What errors call the field that holds the texts."""
_MAX_TEXTS_PER_JOB = 64
"""Of a call, in one job of the worker pool: others shall have their turn between."""

T = TypeVar("T")


class EncoderVersion(msgspec.Struct, frozen=True, kw_only=True):
    """What a version folder and the operator's config say about an encoder model."""

    name: str
    tokenizer: EncoderTokenizer
    vocab_size: int
    """Ids from 0 up to this are the model's."""
    max_model_len: int
    """Tokens of a row at most, special ones among them."""
    truncates: bool = False
    """Texts that are too long are cut where a request does not say."""


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Of one call."""

    values: npt.NDArray[np.float32]
    """(rows, width), finite, as the runner sees to; the rows of all inputs, in their order."""
    num_rows: list[int]
    """Of each input."""
    num_tokens: int


class EncoderModel:
    """A model's texts in, its graph's numbers out.

    Args:
        version: what was loaded.
        calls: belongs to the model from now on.
        pool: where texts are tokenised; shared.
    """

    def __init__(self, version: EncoderVersion, calls: ItemCalls, pool: WorkerPool) -> None:
        self.name = version.name
        self.max_model_len = version.max_model_len
        self.facts = version
        self.calls = calls
        self._tokenizer = version.tokenizer
        self._pool = pool

    async def run(
        self, inputs: Sequence[T], make: Callable[[int, T], list[Item]], *, num_chars: int, timeout_s: float | None
    ) -> Results:
        """Make rows of inputs in the worker pool, and run them.

        Args:
            inputs: at least one.
            make: the rows of an input, which comes with its index; called in other threads.
            num_chars: of all inputs as far as they will be read, for the admission's estimate.
            timeout_s: for all of it; ``None``: the server's.

        Raises:
            ServeError: as `tasks.EmbeddingTask.embed`.
        """
        items: list[Item] = []
        num_rows: list[int] = []
        async with self.calls.open(estimate_tokens(num_chars), timeout_s=timeout_s) as call:
            for part in _parts(inputs):
                for made in await self._pool.run(_make_all, make, part):
                    items += made
                    num_rows.append(len(made))
            values = np.stack(await call.run(items))
        return Results(values=values, num_rows=num_rows, num_tokens=sum(item.num_tokens for item in items))

    def limit(self, options: EncodeOptions) -> int | None:
        """Tokens to which longer inputs are cut; ``None``: they are refused.

        Raises:
            InvalidRequest: none would be left.
        """
        truncate = self.facts.truncates if options.truncate is None else options.truncate
        if isinstance(truncate, bool):
            return self.max_model_len if truncate else None
        if truncate < 1:
            raise InvalidRequest(f"texts cannot be cut to {truncate} tokens; ask for at least 1", param=PARAM)
        return min(truncate, self.max_model_len)

    def most_chars(self, texts: Sequence[str], limit: int | None) -> int:
        """Characters of texts that will be read.

        Raises:
            ContextLengthExceeded: one is so long that tokenising it, only to refuse it, would be a waste.
        """
        most = MAX_CHARS_PER_TOKEN * (limit or self.max_model_len)
        if limit is not None:
            return sum(min(len(text), most) for text in texts)
        for index, text in enumerate(texts):
            if len(text) > most:
                raise ContextLengthExceeded(
                    f"this model's maximum context length is {self.max_model_len:,} tokens; text {index} of "
                    f"{len(text):,} characters is too long for it (at most {most:,} are read); shorten it, or ask for "
                    "it to be truncated",
                    param=PARAM,
                )
        return sum(map(len, texts))

    def encode(self, index: int, text: str, options: EncodeOptions, limit: int | None) -> Row:
        """The row of a text, cut or checked. Blocks.

        Raises:
            InvalidRequest: it is no Unicode, or has no token.
            ContextLengthExceeded: it is too long, and is not to be cut.
        """
        row = self._tokenizer.encode(
            text, add_special_tokens=options.add_special_tokens, max_tokens=limit, side=options.truncation_side
        )
        return self.check(index, row)

    def check(self, index: int, row: Row) -> Row:
        """The row itself.

        Raises:
            ContextLengthExceeded: it is too long.
        """
        if len(row) > self.max_model_len:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {self.max_model_len:,} tokens, but text {index} has "
                f"{len(row):,}; shorten it, or ask for it to be truncated",
                param=PARAM,
            )
        return row

    def check_ids(self, index: int, ids: list[int], limit: int | None, options: EncodeOptions) -> Row:
        """The row of token ids, cut or checked.

        Raises:
            InvalidRequest: there are none, or one is outside of the vocabulary.
            ContextLengthExceeded: they are too many, and are not to be cut.
        """
        if not ids:
            raise InvalidRequest(f"text {index} is empty: a list of token ids needs at least one", param=PARAM)
        for token_id in (min(ids), max(ids)):
            if not 0 <= token_id < self.facts.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} of text {index} is outside of the model's vocabulary (0 to "
                    f"{self.facts.vocab_size - 1:,})",
                    param=PARAM,
                )
        if limit is not None:
            ids = ids[:limit] if options.truncation_side == "right" else ids[-limit:]
        return self.check(index, Row(np.array(ids, np.int64)))


def item(row: Row, *, num_prompt_tokens: int = 0) -> Item:
    """What the runner takes of a row.

    Args:
        num_prompt_tokens: at its head, that take no part in pooling.
    """
    inputs: dict[str, npt.NDArray[np.integer[Any]]] = {"input_ids": row.token_ids}
    if row.token_type_ids is not None:
        inputs["token_type_ids"] = row.token_type_ids
    if num_prompt_tokens:
        inputs["num_prompt_tokens"] = np.array(num_prompt_tokens, np.int32)
    return Item(inputs=inputs, num_tokens=len(row))


def _parts(inputs: Sequence[T]) -> Iterator[list[tuple[int, T]]]:
    numbered = iter(enumerate(inputs))
    while part := list(itertools.islice(numbered, _MAX_TEXTS_PER_JOB)):
        yield part


def _make_all(make: Callable[[int, T], list[Item]], part: list[tuple[int, T]]) -> list[list[Item]]:
    return [make(index, each) for index, each in part]
