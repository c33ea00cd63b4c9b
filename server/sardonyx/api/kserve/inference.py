"""``/infer``, ``/generate`` and ``/generate_stream``.

Floor 5. Parse, ask the service, write. What a body holds is in `infer_request` and `generate`.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import cast

from sardonyx.api.kserve import generate
from sardonyx.api.kserve.body import choose_encoding, compress, decompress
from sardonyx.api.kserve.calls import WireReply, WireRequest
from sardonyx.api.kserve.errors import encode_error
from sardonyx.api.kserve.exchange import JSON_TYPE, Exchange, Header, Reply, off_loop
from sardonyx.api.kserve.infer_reply import VALUE_BYTES, encode_reply, num_text_bytes
from sardonyx.api.kserve.infer_request import (
    HEADER_LENGTH,
    InferJson,
    ParsedRequest,
    header_length_of,
    num_slow_bytes,
    parse_request,
    raw_request,
    read_json,
)
from sardonyx.api.kserve.service import InferenceService
from sardonyx.errors import InvalidRequest, UnsupportedFeature

MIN_COMPRESSED_BYTES = 512
"""Smaller answers would grow."""

_EVENT_STREAM: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
)


class Inference:
    """The endpoints of the data plane."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def infer(self, exchange: Exchange) -> Reply:
        """One answer to one request."""
        body = await exchange.read_body()
        if encoding := exchange.headers.get("content-encoding"):
            body = await decompress(body, encoding, exchange.max_bytes)
        asked = await self._parse(exchange, body)
        exchange.request_id = asked.request.id
        answer = await exchange.while_connected(self._service.infer(asked.request))
        reply = await off_loop(num_text_bytes(answer, asked), lambda: encode_reply(answer, asked))
        accepted = exchange.headers.get("accept-encoding")
        return await _compressed(reply, accepted) if accepted else reply

    async def generate(self, exchange: Exchange) -> Reply:
        """The one answer to a JSON object that holds inputs and parameters side by side."""
        request = await self._read_generate(exchange)
        return await exchange.while_connected(self._only_answer(request))

    async def generate_stream(self, exchange: Exchange) -> Reply | None:
        """All answers, as server-sent events."""
        request = await self._read_generate(exchange)
        return await exchange.while_connected(self._stream(exchange, request), patience_s=0.0)

    async def _parse(self, exchange: Exchange, body: bytes) -> ParsedRequest:
        """What a decompressed body asks."""
        model = self._service.model(exchange.model, exchange.version)
        length = header_length_of(exchange.headers, len(body))
        if not length and HEADER_LENGTH in exchange.headers:
            return raw_request(
                body,
                model.inputs,
                model_name=exchange.model,
                model_version=exchange.version,
                has_batch_axis=model.config.max_batch_size > 0,
            )

        def parse(json: InferJson) -> ParsedRequest:
            return parse_request(
                json,
                body,
                length,
                model_name=exchange.model,
                model_version=exchange.version,
                max_bytes=exchange.max_bytes,
            )

        json = await off_loop(length, lambda: read_json(body, length))
        exchange.request_id = json.id
        return await off_loop(num_slow_bytes(json, length), lambda: parse(json))

    async def _read_generate(self, exchange: Exchange) -> WireRequest:
        if exchange.headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedFeature("Unsupported compression type")
        body = await exchange.read_body()
        model = self._service.model(exchange.model, exchange.version)
        request = await off_loop(
            len(body),
            lambda: generate.read_request(
                body, model.inputs, model_name=exchange.model, model_version=exchange.version
            ),
        )
        exchange.request_id = request.id
        return request

    async def _only_answer(self, request: WireRequest) -> Reply:
        only: WireReply | None = None
        async with aclosing(_generator(self._service.stream(request))) as answers:
            async for answer in answers:
                if answer.is_final and not answer.outputs:
                    continue
                if only is not None:
                    raise _not_one_answer()
                only = answer
        if only is None:
            raise _not_one_answer()
        return Reply(await _encoded(only), headers=(JSON_TYPE,))

    async def _stream(self, exchange: Exchange, request: WireRequest) -> None:
        """Errors before the first answer are raised; later ones, for which the status is sent already, are events."""
        try:
            async with aclosing(_generator(self._service.stream(request))) as answers:
                async for answer in answers:
                    if answer.is_final and not answer.outputs:
                        continue
                    event = b"data: %s\n\n" % await _encoded(answer)
                    if not exchange.has_begun:
                        await exchange.begin(_EVENT_STREAM)
                    await exchange.send_piece(event)
        except Exception as error:
            if not exchange.has_begun:
                raise
            exchange.log_failure(error)
            await exchange.send_piece(b"data: %s\n\n" % encode_error(error, exchange.request_id), is_last=True)
            return
        if not exchange.has_begun:
            await exchange.begin(_EVENT_STREAM)
        await exchange.send_piece(b"", is_last=True)


def _generator(answers: AsyncIterator[WireReply]) -> AsyncGenerator[WireReply, None]:
    """The service's streams are generators: closing one aborts."""
    return cast("AsyncGenerator[WireReply, None]", answers)


async def _encoded(answer: WireReply) -> bytes:
    return await off_loop(generate.num_values(answer) * VALUE_BYTES, lambda: generate.encode_answer(answer))


def _not_one_answer() -> InvalidRequest:
    return InvalidRequest(
        "generate expects model to produce exactly 1 response, use generate stream for model that generates various "
        "number of responses"
    )


async def _compressed(reply: Reply, accepted: str) -> Reply:
    """The answer in the encoding that the caller likes best."""
    encoding = choose_encoding(accepted)
    size = len(reply.body) + sum(map(len, reply.more))
    if encoding is None or size < MIN_COMPRESSED_BYTES:
        return reply
    body = await off_loop(size * 16, lambda: compress(b"".join((reply.body, *reply.more)), encoding))
    headers = (*reply.headers, (b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding"))
    return Reply(body, reply.status, headers)
