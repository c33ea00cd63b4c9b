"""llama.cpp with several sequences in one context: decodes first, prompts fill the batch, as its own server does.

Runs in an interpreter that has `llama-cpp-python`.
"""

import ctypes
from collections.abc import Iterator

import llama_cpp
import numpy as np

N_BATCH = 512
"""Tokens a decode call, llama-server's own `--ubatch-size`."""


class LlamaCpp:
    """Greedy decoding through `llama_decode`, argmax on the host."""

    def __init__(self, gguf: str, *, threads: int, max_clients: int, max_tokens_each: int) -> None:
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(gguf.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_clients * max_tokens_each
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_seq_max = max_clients
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._num_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        self._free = list(range(max_clients))
        self._sequence: dict[int, int] = {}
        self._known: dict[int, list[int]] = {}
        self._computed: dict[int, int] = {}
        self._target: dict[int, int] = {}
        self._prompt_len: dict[int, int] = {}

    def add(self, request: int, prompt: list[int], max_tokens: int) -> None:
        self._sequence[request] = self._free.pop()
        self._known[request] = list(prompt)
        self._computed[request] = 0
        self._prompt_len[request] = len(prompt)
        self._target[request] = len(prompt) + max_tokens

    def step(self) -> dict[int, int]:
        self._batch.n_tokens = 0
        ends: list[tuple[int, int]] = []
        for request, num_new in self._plan():
            first = self._computed[request]
            for position in range(first, first + num_new):
                self._push(self._known[request][position], position, self._sequence[request])
            self._computed[request] = first + num_new
            if self._computed[request] == len(self._known[request]):
                self._batch.logits[self._batch.n_tokens - 1] = 1
                ends.append((request, self._batch.n_tokens - 1))
        if llama_cpp.llama_decode(self._context, self._batch) != 0:
            raise RuntimeError("llama_decode failed")
        made = {}
        for request, index in ends:
            row = llama_cpp.llama_get_logits_ith(self._context, index)
            logits = np.ctypeslib.as_array(row, shape=(self._num_vocab,))
            self._known[request].append(int(logits.argmax()))
            made[request] = 1
            if len(self._known[request]) == self._target[request]:
                self._finish(request)
        return made

    def tokens(self, request: int) -> list[int]:
        return self._known[request][self._prompt_len[request] :]

    def _plan(self) -> Iterator[tuple[int, int]]:
        budget = N_BATCH
        pending = {request: len(self._known[request]) - self._computed[request] for request in self._sequence}
        for request in sorted(pending, key=lambda r: pending[r] > 1):
            num_new = min(pending[request], budget)
            if num_new:
                budget -= num_new
                yield request, num_new

    def _push(self, token: int, position: int, sequence: int) -> None:
        index = self._batch.n_tokens
        self._batch.token[index] = token
        self._batch.pos[index] = position
        self._batch.n_seq_id[index] = 1
        self._batch.seq_id[index][0] = sequence
        self._batch.logits[index] = 0
        self._batch.n_tokens = index + 1

    def _finish(self, request: int) -> None:
        sequence = self._sequence.pop(request)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), sequence, -1, -1)
        self._free.append(sequence)


@llama_cpp.llama_log_callback
def _silent(level: int, message: bytes, user_data: ctypes.c_void_p) -> None:
    """llama.cpp logs each load to stderr; the benchmark's table goes there."""
