"""A runner that draws scripted tokens, and text models on it: real policy, step loop, tokenizer and event loop."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.core import Batch, RunnerLimits, Sequence, StepOutput, TokenLogprobs
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.engine.loop import StepLoop
from sardonyx.metrics import ModelMetrics
from sardonyx.processing.chat_template import ChatTemplate
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.repository import layout
from sardonyx.serving.admission import Admission
from sardonyx.serving.dispatch import EventDispatch
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.served import LoadedModel
from sardonyx.serving.text import TextLimits, TextModel, TextVersion
from sardonyx.serving.text_tensors import TextTensorModel
from sardonyx.statistics import InferenceStatistics

Script = Callable[[Sequence], int]
"""The next token of a sequence."""


def logprob_of(token_id: int, position: int) -> float:
    """Any function that tells tokens and positions apart."""
    return -((token_id * 31 + position * 7) % 97) / 10 - 0.1


class ScriptRunner:
    """Runner that follows a script."""

    def __init__(self, script: Script, limits: RunnerLimits) -> None:
        self.script = script
        self.limits = limits
        self.gate = threading.Event()
        """Steps wait while it is clear."""
        self.gate.set()
        self.error: Exception | None = None
        """Raised by the next steps."""
        self.batches: list[list[tuple[str, int]]] = []
        """Of each step the request ids and their new tokens."""
        self.requests: dict[str, Sequence] = {}
        self.is_closed = False

    def execute(self, batch: Batch) -> StepOutput:
        self.gate.wait()
        self.batches.append([(row.sequence.request.id, row.num_new_tokens) for row in batch.rows])
        if self.error is not None:
            raise self.error
        output = StepOutput(token_ids=[], logprobs=[], prompt_logprobs=[])
        for row in batch.rows:
            sequence, request = row.sequence, row.sequence.request
            self.requests[request.id] = sequence
            token_id = self.script(sequence) if row.is_sampled else None
            position = len(sequence.token_ids)
            num_top = request.sampling.num_logprobs
            scored = token_id is not None and num_top is not None
            output.token_ids.append(token_id)
            output.logprobs.append(_logprobs(token_id, position, num_top) if scored else None)
            output.prompt_logprobs.append(
                [
                    _logprobs(sequence.token_ids[n], n, request.num_prompt_logprobs)
                    for n in range(
                        sequence.num_computed_tokens + 1, sequence.num_computed_tokens + row.num_new_tokens + 1
                    )
                    if n < sequence.num_prompt_tokens
                ]
                if request.num_prompt_logprobs is not None
                else []
            )
        return output

    def close(self) -> None:
        self.is_closed = True


def _logprobs(token_id: int, position: int, num_top: int) -> TokenLogprobs:
    top = [(token_id, logprob_of(token_id, position)), *((100 + n, -20.0 - n) for n in range(19))]
    return TokenLogprobs(token_id, logprob_of(token_id, position), top[:num_top])


def spell(ids: list[int], *, end: int | None = None) -> Script:
    """Every sequence gets `ids`, then `end` (or `ids` from the start again)."""

    def script(sequence: Sequence) -> int:
        position = sequence.num_completion_tokens
        if position >= len(ids) and end is not None:
            return end
        return ids[position % len(ids)]

    return script


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until another thread or task has brought it about."""
    while not condition():  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.001)  # and not 0: the thread that is waited for needs the interpreter


class Served:
    """A text model on a `ScriptRunner`, with all its parts in reach."""

    def __init__(
        self,
        folder: Path,
        script: Script,
        *,
        num_slots: int = 4,
        max_model_len: int = 256,
        limits: TextLimits | None = None,
        admission: Admission | None = None,
        max_num_seqs: int = 32,
        name: str = "tiny",
        version: int = 1,
    ) -> None:
        manifest = layout.read_manifest(folder)
        assert manifest is not None
        assert manifest.llm is not None
        self.tokenizer = Tokenizer.load(folder)
        assert self.tokenizer.chat_template is not None
        self.runner = ScriptRunner(
            script,
            RunnerLimits(
                num_slots=num_slots,
                max_model_len=max_model_len,
                max_chunk_tokens=64,
                vocab_size=manifest.llm.vocab_size,
            ),
        )
        self.later_s = 0.0
        """How far the model's clock is ahead."""
        self.dispatch = EventDispatch(lambda: time.monotonic() + self.later_s)
        self.policy = ContinuousPolicy(self.runner.limits, ContinuousOptions(max_num_seqs=max_num_seqs))
        self.engine = StepLoop(name, self.policy, self.runner, self.dispatch.deliver, clock=self.dispatch.clock)
        self.dispatch.connect(self.engine)
        self.engine.start()
        self.admission = admission or Admission(64, 10_000)
        self.pool = WorkerPool()
        self.metrics = ModelMetrics(name)
        self.model = TextModel(
            TextVersion(
                name=name,
                version=version,
                manifest=manifest,
                created=0,
                size_bytes=0,
                max_model_len=max_model_len,
                vocab_size=manifest.llm.vocab_size,
                eos_token_ids=frozenset(manifest.llm.eos_token_ids),
                tokenizer=self.tokenizer,
                chat_template=ChatTemplate(self.tokenizer.chat_template, special_tokens=self.tokenizer.special_tokens),
            ),
            self.engine,
            self.dispatch,
            admission=self.admission,
            pool=self.pool,
            metrics=self.metrics,
            limits=limits or TextLimits(),
        )

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    async def finish(self) -> None:
        """Until the engine has no work left."""
        await until(lambda: not self.engine.stats().has_work)

    def assert_idle(self) -> None:
        """Nothing is reserved, active or running."""
        assert self.admission.num_sequences == 0
        assert self.admission.num_tokens == 0
        assert self.model.num_active == 0
        stats = self.engine.stats()
        assert stats.num_running == 0
        assert stats.num_waiting == 0


def loaded(model: TextModel) -> LoadedModel:
    """A text model as a loader gives it to the registry."""
    statistics = InferenceStatistics(model.name, model.version)
    served = TextTensorModel(model, ModelConfig(name=model.name), statistics)
    return LoadedModel(versions={model.version: served})


@asynccontextmanager
async def serving(folder: Path, script: Script, **options: object):
    served = Served(folder, script, **options)
    try:
        yield served
    finally:
        served.runner.gate.set()
        await served.model.close()
        served.pool.close()
