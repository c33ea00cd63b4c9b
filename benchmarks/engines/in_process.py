"""Our own step loop without HTTP, tokenizer or event loop: what the server's front end is measured against."""

import queue
from pathlib import Path

from sardonyx.core import Request, RunnerLimits, SamplingParams, SequenceEvent
from sardonyx.engine.continuous import ContinuousOptions, ContinuousPolicy
from sardonyx.engine.loop import StepLoop
from sardonyx.repository.layout import Repository, read_manifest
from sardonyx.runners.decoder import DecoderRunner
from sardonyx.runtime.session import configure_threads, open_session
from sardonyx.settings import Settings


class InProcess:
    """The newest version of a model folder, with the server's default settings."""

    def __init__(self, folder: str, *, threads: int) -> None:
        settings = Settings()
        path = Path(folder)
        entry = Repository(path.parent).entry(path.name)
        version = entry.version_path(entry.versions[-1])
        manifest = read_manifest(version)
        assert manifest is not None
        assert manifest.llm is not None
        configure_threads(threads, allow_spinning=settings.allow_spinning)
        session = open_session(version / manifest.graphs["decoder"].model.path, model_name=path.name)
        limits = RunnerLimits(
            num_slots=settings.max_num_seqs,
            max_model_len=manifest.llm.max_model_len,
            max_chunk_tokens=settings.max_chunk_tokens,
            vocab_size=manifest.llm.vocab_size,
        )
        runner = DecoderRunner(session, manifest.llm, limits)
        runner.warm_up()
        options = ContinuousOptions(
            max_num_seqs=settings.max_num_seqs,
            max_batch_tokens=settings.max_batch_tokens,
            max_step_ms=settings.max_step_ms,
        )
        self._steps: queue.SimpleQueue[list[SequenceEvent]] = queue.SimpleQueue()
        self._tokens: dict[int, list[int]] = {}
        self._loop = StepLoop(path.name, ContinuousPolicy(limits, options), runner, self._steps.put)
        self._loop.start()

    def add(self, request: int, prompt: list[int], max_tokens: int) -> None:
        self._tokens[request] = []
        sampling = SamplingParams(temperature=0.0)
        self._loop.submit(Request(id=str(request), prompt_ids=prompt, max_tokens=max_tokens, sampling=sampling))

    def step(self) -> dict[int, int]:
        made = {}
        for event in self._steps.get():
            request = int(event.request_id)
            self._tokens[request] += event.token_ids
            made[request] = len(event.token_ids)
        return made

    def tokens(self, request: int) -> list[int]:
        return self._tokens[request]
