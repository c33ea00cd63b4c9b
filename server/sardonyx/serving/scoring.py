"""How well texts answer queries: a reranker's scores, or how near two texts' embeddings lie.

Floor 4. Composes tasks; which model it is and how a request looks is `api`'s.
"""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sardonyx.serving.tasks import EmbeddingTask, Encoded, EncodeOptions, RerankTask
from sardonyx.serving.together import together

QUERY_PROMPTS = ("query", "search_query", "retrieval.query")
"""What models call the prompt of a question."""
DOCUMENT_PROMPTS = ("document", "passage", "corpus", "search_document", "retrieval.passage")
"""What models call the prompt of a text that may answer one. The first three: sentence-transformers'."""

# Comparing so many numbers takes about a millisecond; beyond that a thread does it.
_MAX_NUMBERS_ON_LOOP = 200_000


_Comparison = Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32]], npt.NDArray[np.float32]]


async def score(
    task: RerankTask | EmbeddingTask, queries: Sequence[str], texts: Sequence[str], *, options: EncodeOptions
) -> Encoded:
    """A score of each pair, (texts, 1).

    Embeddings are compared by their cosine in [-1, 1], or by the dot product where the model was trained for that.

    Args:
        queries: as many as texts, or one for all of them.
        texts: at least one.
        options: for both sides; a pair's text is cut, never its query, a reranker reads the two as one.

    Raises:
        ServeError: as `EmbeddingTask.embed`; `param` is "input", as there.
    """
    if isinstance(task, EmbeddingTask):
        return await _similarity(task, queries, texts, options)
    pairs = list(zip(queries if len(queries) > 1 else [queries[0]] * len(texts), texts, strict=True))
    return await task.rerank(pairs, options=options)


def named_prompt(task: EmbeddingTask, names: Sequence[str]) -> str:
    """The first of some prompts that the model has, else its default (as in sentence-transformers); may be empty."""
    name = next((name for name in names if name in task.prompts), task.default_prompt)
    return "" if name is None else task.prompts[name]


async def _similarity(
    task: EmbeddingTask, queries: Sequence[str], texts: Sequence[str], options: EncodeOptions
) -> Encoded:
    prompts = [named_prompt(task, QUERY_PROMPTS), named_prompt(task, DOCUMENT_PROMPTS)]
    if prompts[0] == prompts[1]:  # one call fills its batches better than two
        # The texts first, for errors count from there.
        both = await task.embed([*texts, *queries], prompt=prompts[0], options=options)
        sides = [both.values[len(texts) :], both.values[: len(texts)]]
        num_tokens = both.num_tokens
    else:
        jobs = [
            task.embed(side, prompt=prompt, options=options)
            for side, prompt in zip((queries, texts), prompts, strict=True)
        ]
        encoded = await together(jobs)
        sides = [each.values for each in encoded]
        num_tokens = sum(each.num_tokens for each in encoded)
    compare: _Comparison = _dots if task.similarity == "dot" else _cosines
    is_large = sides[1].size > _MAX_NUMBERS_ON_LOOP
    values = await asyncio.to_thread(compare, *sides) if is_large else compare(*sides)
    return Encoded(values=values, num_tokens=num_tokens)


def _dots(queries: npt.NDArray[np.floating], texts: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Of (Q, width) and (N, width) with Q of 1 or N: (N, 1)."""
    dots: npt.NDArray[np.float64] = np.einsum(
        "nw,nw->n", np.broadcast_to(queries, texts.shape), texts, dtype=np.float64
    )
    return dots[:, None].astype(np.float32)


def _cosines(queries: npt.NDArray[np.float32], texts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """As `_dots`. A vector of zeros is like nothing: 0."""
    cosines = _dots(_directions(queries), _directions(texts))
    return cosines.clip(-1.0, 1.0)


def _directions(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """With length 1, but for those without any."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)
