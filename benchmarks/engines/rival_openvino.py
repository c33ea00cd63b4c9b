"""OpenVINO GenAI's ContinuousBatchingPipeline on the GGUF itself.

Runs in an interpreter that has `openvino-genai`.
"""

import numpy as np
import openvino as ov
import openvino_genai as genai


class OpenVino:
    """`add_request` and `step` as they come; all but cache size and thread count is the library's default."""

    def __init__(
        self, gguf: str, *, threads: int, max_clients: int, max_tokens_each: int, prefix_caching: bool = False
    ) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB, above what 32 clients need; the default 0 grows in steps while it is timed
        scheduler.max_num_seqs = max_clients
        scheduler.enable_prefix_caching = prefix_caching
        self._pipeline = genai.ContinuousBatchingPipeline(gguf, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self._handles: dict[int, genai.GenerationHandle] = {}
        self._made: dict[int, list[int]] = {}

    def add(self, request: int, prompt: list[int], max_tokens: int) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        self._made[request] = []
        ids = ov.Tensor(np.array([prompt], dtype=np.int64))
        self._handles[request] = self._pipeline.add_request(request, ids, config)

    def step(self) -> dict[int, int]:
        self._pipeline.step()
        made = {}
        for request, handle in list(self._handles.items()):
            if not handle.can_read():
                continue
            for output in handle.read().values():
                new = list(output.generated_ids)
                self._made[request] += new
                made[request] = made.get(request, 0) + len(new)
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del self._handles[request]
        return made

    def tokens(self, request: int) -> list[int]:
        return self._made[request]
