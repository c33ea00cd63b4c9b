"""``POST /v1/embeddings`` and OpenAI's first path for it.

Floor 5. Texts or token ids in, an embedding of each out; cut, brought to length 1 and written as the caller asks.
"""

import asyncio
import base64
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from litestar import Controller, Request, Response
from litestar.params import FromPath, JSONBody

from sardonyx.api.dependencies import Tasks
from sardonyx.api.disconnect import while_connected
from sardonyx.api.openai.encode_options import check_texts, encode_options, prompt_text
from sardonyx.api.openai.encoder_schemas import MAX_INPUTS, EmbeddingRequest
from sardonyx.api.openai.options import request_timeout_s
from sardonyx.api.openapi import json_post
from sardonyx.errors import InvalidRequest, UnsupportedFeature
from sardonyx.serving.tasks import EmbeddingTask, TextInput

# What takes about a millisecond to write; beyond that a thread does it.
_MAX_NUMBERS_ON_LOOP = {"float": 10_000, "base64": 100_000}

T = TypeVar("T")


class EncodingUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """One input's."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers, or base64 of little-endian float32."""


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``/v1/embeddings``."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EncodingUsage


class EmbeddingsController(Controller):
    """Texts become vectors."""

    tags = ("Embeddings",)

    @json_post("/v1/embeddings", EmbeddingRequest, EmbeddingList)
    async def create_embeddings(
        self, data: JSONBody[EmbeddingRequest], request: Request[Any, Any, Any], tasks: Tasks
    ) -> Response[bytes]:
        """An embedding of each input, in their order."""
        return await while_connected(request.receive, _answer(data, tasks.embedder(data.model), request))

    @json_post("/v1/engines/{engine:str}/embeddings", EmbeddingRequest, EmbeddingList)
    async def create_engine_embeddings(
        self, engine: FromPath[str], data: JSONBody[EmbeddingRequest], request: Request[Any, Any, Any], tasks: Tasks
    ) -> Response[bytes]:
        """As ``/v1/embeddings``, with the model in the path, which wins (OpenAI's first API, Azure)."""
        return await while_connected(request.receive, _answer(data, tasks.embedder(engine), request))


async def _answer(body: EmbeddingRequest, task: EmbeddingTask, request: "Request[Any, Any, Any]") -> Response[bytes]:
    inputs = input_list(body.input)
    shape = _Shape(body, task)
    encoded = await task.embed(
        inputs,
        prompt=prompt_text(body, task, has_texts=isinstance(inputs[0], str)),
        options=encode_options(body, request_timeout_s(request)),
    )
    usage = EncodingUsage(prompt_tokens=encoded.num_tokens, total_tokens=encoded.num_tokens)

    def write() -> bytes:
        rows = shape.apply(encoded.values)
        reply = EmbeddingList(data=_embeddings(rows, shape.encoding_format), model=task.name, usage=usage)
        return msgspec.json.encode(reply)

    is_large = encoded.values.size > _MAX_NUMBERS_ON_LOOP[shape.encoding_format]
    content = await asyncio.to_thread(write) if is_large else write()
    return Response(content, media_type="application/json", status_code=200)


def input_list(value: "str | Sequence[int | str | list[int]] | None") -> list[TextInput]:
    """Any of the four forms of ``input`` as a list of inputs, either all texts or all token ids.

    Raises:
        InvalidRequest: none, too many, an empty one, or forms that cannot stand side by side.
    """
    if value is None:
        raise InvalidRequest("input: is required", param="input")
    if not value:
        raise InvalidRequest("input: is empty", param="input")
    if isinstance(value, str):
        return [value]
    texts = [item for item in value if isinstance(item, str)]
    token_ids = [item for item in value if isinstance(item, int)]
    lists = [item for item in value if isinstance(item, list)]
    if len(token_ids) == len(value):
        return [token_ids]
    if len(value) not in (len(texts), len(lists)):
        raise InvalidRequest(
            "input: mixes texts, token ids and lists of them; send a text, texts, token ids or lists of token ids",
            param="input",
        )
    if len(value) > MAX_INPUTS:
        raise InvalidRequest(f"input: has {len(value):,} items; at most {MAX_INPUTS:,} in a request", param="input")
    if texts:
        check_texts(texts, "input")
        return list(texts)
    for index, item in enumerate(lists):
        if not item:
            raise InvalidRequest(f"input.{index}: is an empty list", param=f"input.{index}")
    return list(lists)


class _Shape:
    """How many numbers the caller wants of each embedding, how long, and how written.

    Raises:
        InvalidRequest: a size that the model's embeddings cannot be cut to.
        UnsupportedFeature: lengths that the model's embeddings no longer have.
    """

    def __init__(self, body: EmbeddingRequest, task: EmbeddingTask) -> None:
        self.encoding_format: Literal["float", "base64"] = body.encoding_format or "float"
        self.size = task.size
        for name in ("output_dimension", "dimensions"):
            if (wanted := getattr(body, name)) is not None:
                _check_size(wanted, name, task)
                self.size = wanted
        wish = next((value for value in (body.normalize, body.normalized) if value is not None), None)
        if wish is False and task.is_normalized:
            param = "normalized" if body.normalize is None else "normalize"
            raise UnsupportedFeature(
                f"{param}: embeddings of model {task.name} leave it with length 1; what they were before is gone",
                param=param,
            )
        self._is_normalized = self.size < task.size if wish is None else wish

    def apply(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Of (items, width) to (items, size), little-endian."""
        values = values[:, : self.size]
        if self._is_normalized:
            lengths = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
            values = (values / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
        return np.ascontiguousarray(values, "<f4")


def _check_size(wanted: int, param: str, task: EmbeddingTask) -> None:
    if wanted == task.size or wanted in task.matryoshka_dims or (task.allows_any_dimensions and wanted < task.size):
        return
    if task.allows_any_dimensions:
        possible = f"1 to {task.size}"
    else:
        possible = ", ".join(str(size) for size in sorted({*task.matryoshka_dims, task.size}))
    raise InvalidRequest(f"{param}: model {task.name} has no embeddings of {wanted}; possible: {possible}", param=param)


def _embeddings(rows: npt.NDArray[np.float32], encoding_format: Literal["float", "base64"]) -> list[Embedding]:
    """Row by row, so that a thread that writes thousands lets the event loop in between.

    A number is written as the float64 of the same value: exact, and with 40 ms for 2,048 x 384 ten times as fast as
    the shortest text that gives the same float32, for which it is up to twice as long.
    """
    if encoding_format == "base64":
        texts = (b'"' + base64.b64encode(row) + b'"' for row in rows)
    else:
        texts = (msgspec.json.encode(row.tolist()) for row in rows)
    return [
        Embedding(index=index, embedding=msgspec.Raw(text))  # type: ignore[arg-type]  # written already
        for index, text in enumerate(texts)
    ]
