"""One call of a text endpoint: start a generation, and answer with a whole body or a stream.

Floor 5. What completions and chats share; their bodies and frames differ.
"""

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from litestar import Request, Response

from sardonyx.api.disconnect import while_connected
from sardonyx.api.openai.logprobs import id_name, text_name
from sardonyx.api.openai.options import request_timeout_s
from sardonyx.api.openai.schemas import GenerationRequest
from sardonyx.api.openai.sse import EventStream, Frames, OpenStream
from sardonyx.serving.generation import Generation
from sardonyx.serving.options import Choice, TextChunk
from sardonyx.serving.text import TextModel

# An answer with so many token log-probabilities takes a millisecond to put together; beyond that a thread does it.
_MAX_LOGPROBS_ON_LOOP = 100

Body = TypeVar("Body", bound=GenerationRequest)


class TextCall(ABC, Generic[Body]):
    """From a body and a model to an answer. Used once.

    Args:
        receive: the request's, its body already read: tells when the client leaves.
    """

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, body: Body, model: TextModel, request: "Request[Any, Any, Any]") -> None:
        self.body = body
        self.model = model
        self.id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.name = id_name if body.return_tokens_as_token_ids else text_name
        self.timeout_s = request_timeout_s(request)
        self.generation: Generation
        self._receive = request.receive

    async def answer(self) -> Response[bytes]:
        """The whole answer, or the beginning of a stream.

        Raises:
            ServeError: nothing of an answer was sent, so the error can have its status.
        """
        return await while_connected(self._receive, self._answer())

    async def _answer(self) -> Response[bytes]:
        self.generation = await self.start()
        if self.body.stream:
            stream = OpenStream(self.generation)
            await stream.wait()
            return self._event_stream(stream)
        try:
            choices = await self.generation.collect()
            if self._num_logprobs(choices) > _MAX_LOGPROBS_ON_LOOP:
                content = await asyncio.to_thread(lambda: msgspec.json.encode(self.reply(choices)))
            else:
                content = msgspec.json.encode(self.reply(choices))
        finally:
            self.generation.abort()
        return Response(content, media_type="application/json", status_code=200)

    def _event_stream(self, stream: OpenStream[TextChunk]) -> EventStream[TextChunk]:
        options = self.body.stream_options
        include_usage = bool(options and options.include_usage)
        usage = self.generation.usage
        self.frames = Frames(
            self.head(self.chunk_object),
            include_usage=include_usage,
            usage=usage if options and options.continuous_usage_stats else None,
        )
        return EventStream(stream, frame=self.frame, last=lambda: self.frames.usage(usage) if include_usage else b"")

    def head(self, object_name: str) -> dict[str, Any]:
        """What every answer and chunk of this call begins with."""
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": system_fingerprint(self.model),
        }

    def _num_logprobs(self, choices: Sequence[Choice]) -> int:
        prompts = sum(len(prompt.logprobs or ()) for prompt in self.generation.prompts)
        return prompts + sum(len(choice.tokens) for choice in choices)

    @abstractmethod
    async def start(self) -> Generation:
        """Begin generating."""

    @abstractmethod
    def reply(self, choices: Sequence[Choice]) -> msgspec.Struct:
        """The whole answer. May run in another thread."""

    @abstractmethod
    def frame(self, chunk: TextChunk) -> bytes:
        """The frames of a chunk; none where it shows nothing."""


def system_fingerprint(model: TextModel) -> str:
    """Changes with the weights: equal seeds promise equal texts only where this is equal, too."""
    files = next((graph.data or [graph.model] for graph in model.manifest.graphs.values()), [])
    return f"fp_{files[0].sha256[:12]}" if files else "fp_unknown"
