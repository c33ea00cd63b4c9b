"""A loaded language model as callers see it: text or messages in, chunks of text out.

Floor 4, transport-neutral. Used from one event loop.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from sardonyx.engine.stats import LoopStats
from sardonyx.errors import DeadlineExceeded, EngineDead, InvalidRequest, ModelNotReady
from sardonyx.metrics import ModelMetrics
from sardonyx.processing.chat_encoding import encode_chat
from sardonyx.serving.admission import Admission, estimate_tokens
from sardonyx.serving.calls import Call, make_requests, num_each
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.generation import Generation, TextRuntime
from sardonyx.serving.options import Choice, GenerationOptions, PromptInfo, TextChunk, TokenInfo, Usage
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.prompts import BYTES_PER_POSITION, PromptEncoder, num_text_bytes, require_template
from sardonyx.serving.text_version import TextEngine, TextLimits, TextVersion

__all__ = [
    "Choice",
    "Generation",
    "GenerationOptions",
    "PromptInfo",
    "TextChunk",
    "TextLimits",
    "TextModel",
    "TextVersion",
    "TokenInfo",
    "Usage",
]

MAX_TOKENIZE_BYTES = 1 << 20
"""Text that `TextModel.tokenize` takes, at least: half a second of a worker thread (`Tokenizer.encode`)."""


class TextModel:
    """One version of a language model with its engine.

    Args:
        version: what was loaded.
        engine: started; its `deliver` is the dispatch's.
        dispatch: connected to the engine.
        admission: shared by all models.
        pool: shared by all models.
        metrics: this model's.
        on_close: called once, when the engine is closed.
    """

    def __init__(
        self,
        version: TextVersion,
        engine: TextEngine,
        dispatch: EventDispatch,
        *,
        admission: Admission,
        pool: WorkerPool,
        metrics: ModelMetrics,
        limits: TextLimits,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = version.name
        self.version = version.version
        self.manifest = version.manifest
        self.max_model_len = version.max_model_len
        self.tokenizer = version.tokenizer
        self.chat_template = version.chat_template
        self.created = version.created
        self.size_bytes = version.size_bytes
        self._engine = engine
        self._admission = admission
        self._pool = pool
        self._metrics = metrics
        self._limits = limits
        self._encoder = PromptEncoder(
            version.tokenizer, max_model_len=version.max_model_len, vocab_size=version.vocab_size
        )
        self._runtime = TextRuntime(
            model_name=version.name,
            tokenizer=version.tokenizer,
            eos_token_ids=version.eos_token_ids,
            dispatch=dispatch,
            pool=pool,
            metrics=metrics,
            retry_after_s=admission.retry_after_s,
        )
        self._clock = dispatch.clock
        self._calls: dict[str, Generation | None] = {}
        """By request id, in the order of arrival; ``None`` until the prompts are tokenised."""
        self._serials = itertools.count()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False
        self._on_close = on_close
        self._is_closed = False
        self._stats = engine.stats  # one bound method, so that detach finds what attach got
        metrics.attach(self._stats)

    @property
    def num_active(self) -> int:
        """API calls that were accepted and have not ended."""
        return len(self._calls)

    @property
    def is_alive(self) -> bool:
        """The engine takes requests."""
        return self._engine.is_alive

    def stats(self) -> LoopStats:
        """What the engine counts."""
        return self._stats()

    async def start(
        self, prompts: Sequence[str | list[int]], options: GenerationOptions, *, request_id: str
    ) -> Generation:
        """Admit, tokenise, check and submit one API call.

        Args:
            prompts: at least one; strings, lists of token ids, or a mix. Token ids are taken as they are.
            options: the same for all prompts.
            request_id: unique among the calls under way.

        Raises:
            InvalidRequest: an empty prompt without a BOS or EOS token to stand for it, a token id outside of the
                vocabulary, too many choices, text that is not Unicode.
            ContextLengthExceeded: prompt + max_tokens over `max_model_len`, or text too long to be worth tokenising.
            Overloaded: admission said no.
            ModelNotReady: the model is being unloaded.
            DeadlineExceeded: the time was over while the call waited for the tokenizer.
            EngineDead: the engine stopped.
        """
        if not prompts:
            raise InvalidRequest("at least one prompt is needed", param="prompt")
        self._encoder.check(options)
        num_tokens = sum(
            estimate_tokens(self._encoder.measure(prompt)) if isinstance(prompt, str) else len(prompt)
            for prompt in prompts
        )
        return await self._start(
            partial(self._encoder.encode, prompts, options), options, request_id, len(prompts), num_tokens
        )

    async def start_chat(
        self,
        messages: list[dict[str, Any]],
        options: GenerationOptions,
        *,
        request_id: str,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> Generation:
        """Render the messages with the model's chat template, then as `start` with that one prompt.

        `GenerationOptions.add_special_tokens` has no effect: templates write their own BOS.

        Args:
            messages: OpenAI's, as plain JSON values.
            options: as for `start`.
            request_id: as for `start`.
            tools: OpenAI's tool objects.
            template_kwargs: more variables for the template (``chat_template_kwargs``).
            continue_final_message: the completion goes on inside the last message.
            add_generation_prompt: the prompt ends with the head of an assistant message.

        Raises:
            UnsupportedFeature: the model has no chat template, or a message has a part that is not text.
            InvalidRequest: the template refused the messages; otherwise what `start` raises.
        """
        template = require_template(self.chat_template)
        self._encoder.check(options)
        num_tokens = estimate_tokens(self._encoder.measure(*_texts(messages), param="messages"))
        encode = partial(
            self._encoder.encode_chat,
            template,
            messages,
            options,
            tools=tools,
            variables=template_kwargs,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
        )
        return await self._start(encode, options, request_id, 1, num_tokens)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            InvalidRequest: the text is longer than a tokenizer is lent for, or not Unicode.
            Overloaded: too many calls wait for the tokenizer.
        """
        most = max(MAX_TOKENIZE_BYTES, BYTES_PER_POSITION * self.max_model_len)
        if len(text) > most or num_text_bytes(text) > most:
            raise InvalidRequest(f"at most {most:,} bytes are tokenised at once", param="prompt")
        return await self._pool.run_bounded(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def tokenize_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of the prompt that `start_chat` would use. Raises as `start_chat` and `tokenize`."""
        return await self._pool.run_bounded(
            encode_chat,
            self.tokenizer,
            require_template(self.chat_template),
            messages,
            tools=tools,
            variables=template_kwargs,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
        )

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids; those without a token add nothing.

        Raises:
            Overloaded: too many calls wait for the tokenizer.
        """
        return await self._pool.run_bounded(self.tokenizer.decode, token_ids, skip_special_tokens=skip_special_tokens)

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt that `start_chat` would use. Raises as `start_chat` and `tokenize`."""
        return await self._pool.run_bounded(
            require_template(self.chat_template).render,
            messages,
            tools=tools,
            variables=template_kwargs,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
        )

    def stop_generation(self, request_id: str | None = None) -> int:
        """End one call, or all of them, as CANCELLED with what they have. Returns how many were ended."""
        chosen = [call for key, call in self._calls.items() if call is not None and request_id in {None, key}]
        for call in chosen:
            call.abort()
        return len(chosen)

    async def drain(self, timeout_s: float) -> None:
        """Take no more calls, and wait until the accepted ones have ended, so long at most."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            return

    async def close(self) -> None:
        """End what is left with ModelNotReady, and free the engine. Idempotent."""
        self._is_draining = True
        for call in list(self._calls.values()):
            if call is not None:
                call.abort(ModelNotReady(f"model {self.name} was unloaded before the request was finished"))
        if not self._is_closed:
            self._is_closed = True
            try:
                await asyncio.to_thread(self._engine.close)
            finally:
                self._metrics.detach(self._stats)
                self._on_close()

    async def _start(
        self,
        encode: Callable[[], list[PromptInfo]],
        options: GenerationOptions,
        request_id: str,
        num_prompts: int,
        num_tokens: int,
    ) -> Generation:
        """What `start` and `start_chat` share. `num_tokens` is the estimate for one choice of each prompt."""
        arrival_s = self._clock()
        self._check_open(request_id)
        count = num_each(options)
        if num_prompts * count > self._limits.max_choices:
            raise InvalidRequest(
                f"{num_prompts * count:,} choices (prompts times n); at most {self._limits.max_choices:,}",
                param="n",
            )
        reservation = self._admission.reserve(num_prompts * count, num_tokens * count)
        self._calls[request_id] = None
        self._is_idle.clear()
        try:
            timeout_s = self._limits.request_timeout_s
            if options.timeout_s is not None:
                timeout_s = min(options.timeout_s, timeout_s)
            prompts = await self._encode(encode, timeout_s)
            reservation.correct(count * sum(len(prompt.token_ids) for prompt in prompts))
            if self._is_closed:
                raise ModelNotReady(f"model {self.name} was unloaded before the request was started")
            call = self._call(request_id, prompts, options, arrival_s, timeout_s)
            generation = Generation(call, self._runtime, reservation, self._forget)
            self._calls[request_id] = generation
            generation.submit()
            return generation
        except BaseException:
            reservation.release()
            self._remove(request_id)
            raise

    async def _encode(self, encode: Callable[[], list[PromptInfo]], timeout_s: float) -> list[PromptInfo]:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._pool.run(encode)
        except TimeoutError:
            raise DeadlineExceeded("the request's time was over before it was started") from None

    def _call(
        self, request_id: str, prompts: list[PromptInfo], options: GenerationOptions, arrival_s: float, timeout_s: float
    ) -> Call:
        requests = make_requests(
            # Numbered, because the engine may still hold an aborted call whose id comes again.
            f"{request_id}#{next(self._serials)}",
            prompts,
            [self._encoder.max_tokens(len(prompt.token_ids), options) for prompt in prompts],
            options,
            eos_token_ids=self._runtime.eos_token_ids,
            deadline_s=arrival_s + timeout_s,
            start_by_s=arrival_s + min(self._limits.queue_timeout_s, timeout_s),
        )
        return Call(
            id=request_id,
            prompts=prompts,
            requests=requests,
            options=options,
            arrival_s=arrival_s,
            deadline_s=arrival_s + timeout_s,
        )

    def _check_open(self, request_id: str) -> None:
        if self._is_draining:
            raise ModelNotReady(f"model {self.name} is being unloaded")
        if not self._engine.is_alive:
            raise EngineDead(f"the engine of model {self.name} stopped")
        if request_id in self._calls:
            raise InvalidRequest("a request with this id is under way", param="request_id")

    def _forget(self, generation: Generation) -> None:
        self._remove(generation.id)

    def _remove(self, request_id: str) -> None:
        self._calls.pop(request_id, None)
        if not self._calls:
            self._is_idle.set()


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    rest = [value]  # no recursion: what is too deep is refused later, with a reason
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            rest += item.values()
        elif isinstance(item, list | tuple):
            rest += item
