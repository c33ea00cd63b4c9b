"""``/v1/rerank`` and ``/v1/score``: which texts answer a query, and how well.

Floor 5. Jina's, Cohere's and TEI's reranking, vLLM's scoring; with a reranker, or an embedding model.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from litestar import Controller, Request
from litestar.params import JSONBody

from sardonyx.api.dependencies import Tasks
from sardonyx.api.disconnect import while_connected
from sardonyx.api.openai.embeddings import EncodingUsage
from sardonyx.api.openai.encode_options import check_texts, encode_options, input_named
from sardonyx.api.openai.encoder_schemas import RerankRequest, ScoreRequest
from sardonyx.api.openai.options import request_timeout_s
from sardonyx.api.openapi import json_post
from sardonyx.errors import InvalidRequest, UnsupportedFeature
from sardonyx.serving.scoring import score
from sardonyx.serving.tasks import EmbeddingTask, Encoded, EncodeOptions, RerankTask


class RankedText(msgspec.Struct, frozen=True, kw_only=True):
    """A document as it was sent."""

    text: str


class Ranked(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One document's place."""

    index: int
    """Of the document in the request."""
    relevance_score: float
    document: RankedText | None = None
    """Where `return_documents` asks for it."""


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to ``documents``."""

    id: str
    model: str
    usage: EncodingUsage
    results: list[Ranked]
    """Best first."""


class TeiRanked(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """TEI's form of a place; the answer to ``texts`` is a list of them."""

    index: int
    score: float
    text: str | None = None
    """Where `return_text` asks for it."""


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One pair's."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``/v1/score``."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: EncodingUsage


class RerankController(Controller):
    """Texts are compared with queries."""

    tags = ("Reranking",)

    @json_post(["/v1/rerank", "/rerank"], RerankRequest, Ranking | list[TeiRanked])
    async def rerank(
        self, data: JSONBody[RerankRequest], request: Request[Any, Any, Any], tasks: Tasks
    ) -> Ranking | list[TeiRanked]:
        """Documents by how well they answer a query, best first."""
        task = tasks.scorer(data.model)
        return await while_connected(request.receive, _rank(data, task, request_timeout_s(request)))

    @json_post(["/v1/score", "/score"], ScoreRequest, ScoreList)
    async def score(self, data: JSONBody[ScoreRequest], request: Request[Any, Any, Any], tasks: Tasks) -> ScoreList:
        """How well texts answer a query each, or all of them one."""
        task = tasks.scorer(data.model)
        return await while_connected(request.receive, _score(data, task, request_timeout_s(request)))


async def _rank(
    body: RerankRequest, task: RerankTask | EmbeddingTask, timeout_s: float | None
) -> Ranking | list[TeiRanked]:
    if body.raw_scores:
        raise UnsupportedFeature("raw_scores: not supported by this server; leave it out", param="raw_scores")
    field, texts = _documents(body)
    check_texts(texts, field)
    if not body.query:
        raise InvalidRequest("query: is an empty string", param="query")
    with input_named(field):
        encoded = await score(task, [body.query], texts, options=_rerank_options(body, task, timeout_s))
    scores = encoded.values[:, 0]
    # Stable: equal scores stay in the order of the request.
    places = np.argsort(-scores, kind="stable")[: body.top_n].tolist()
    if field == "texts":
        return [
            TeiRanked(index=place, score=float(scores[place]), text=texts[place] if body.return_text else None)
            for place in places
        ]
    return Ranking(
        id=f"rerank-{secrets.token_hex(12)}",
        model=task.name,
        usage=_usage(encoded),
        results=[
            Ranked(
                index=place,
                relevance_score=float(scores[place]),
                document=RankedText(text=texts[place]) if body.return_documents else None,
            )
            for place in places
        ],
    )


def _documents(body: RerankRequest) -> tuple[str, list[str]]:
    """The field that holds them, and their texts."""
    if body.documents is None:
        if body.texts is None:
            raise InvalidRequest("documents: is required", param="documents")
        return "texts", body.texts
    if body.texts is not None:
        raise InvalidRequest("texts: not together with documents", param="texts")
    return "documents", [each if isinstance(each, str) else each.text for each in body.documents]


def _rerank_options(body: RerankRequest, task: RerankTask | EmbeddingTask, timeout_s: float | None) -> EncodeOptions:
    options = encode_options(body, timeout_s)
    if body.max_tokens_per_doc is None or options.truncate is not None:
        return options
    if body.max_tokens_per_doc < task.max_model_len:
        raise UnsupportedFeature(
            f"max_tokens_per_doc: model {task.name} counts query and document together; cut both with "
            "truncate_prompt_tokens",
            param="max_tokens_per_doc",
        )
    return msgspec.structs.replace(options, truncate=True)


async def _score(body: ScoreRequest, task: RerankTask | EmbeddingTask, timeout_s: float | None) -> ScoreList:
    query_field, queries = _side(body, ("text_1", "queries", "data_1"))
    text_field, texts = _side(body, ("text_2", "documents", "data_2"))
    if len(queries) not in (1, len(texts)):
        raise InvalidRequest(
            f"{query_field}: {len(queries)} for {len(texts)} of {text_field}; send one, or as many", param=query_field
        )
    with input_named(text_field):
        encoded = await score(task, queries, texts, options=encode_options(body, timeout_s))
    return ScoreList(
        id=f"score-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=task.name,
        data=[Score(index=index, score=value) for index, value in enumerate(encoded.values[:, 0].tolist())],
        usage=_usage(encoded),
    )


def _side(body: ScoreRequest, names: Sequence[str]) -> tuple[str, list[str]]:
    """The texts of one side and the field they came in.

    Raises:
        InvalidRequest: none, two of the names, or an empty text.
    """
    given = [name for name in names if getattr(body, name) is not None]
    if not given:
        raise InvalidRequest(f"{names[0]}: is required", param=names[0])
    if len(given) > 1:
        raise InvalidRequest(f"{given[1]}: not together with {given[0]}, another name for it", param=given[1])
    value = getattr(body, given[0])
    if isinstance(value, str):
        if not value:
            raise InvalidRequest(f"{given[0]}: is an empty string", param=given[0])
        return given[0], [value]
    check_texts(value, given[0])
    return given[0], value


def _usage(encoded: Encoded) -> EncodingUsage:
    return EncodingUsage(prompt_tokens=encoded.num_tokens, total_tokens=encoded.num_tokens)
