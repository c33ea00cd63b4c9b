"""Runs Whisper models on a card: windows to keys and values, rows to tokens, tokens to where they are heard.

Floor 3. Owns the model's graphs and all that lies on the card. Windows and caches never leave it; logits do, since
their rules and draws are the host's. Each step is waited for: none is captured, and none is launched ahead.
"""

import logging
import time

import numpy as np
import numpy.typing as npt

from sardonyx.core import BatchRow, RunnerLimits
from sardonyx.errors import EngineError
from sardonyx.repository.families import Whisper
from sardonyx.runners.packing import ForwardRow
from sardonyx.runners.paged_graphs import check_num_rows
from sardonyx.runners.paged_inputs import METADATA
from sardonyx.runners.speech_reader import SpeechReader, request_of
from sardonyx.runners.whisper_graphs import WhisperGraphs, check_graphs
from sardonyx.runners.whisper_inputs import (
    Tensors,
    divide_rows,
    layout,
    max_step_bytes,
    step_tensors,
    write_tensors,
)
from sardonyx.runners.whisper_memory import WhisperMemory
from sardonyx.runtime.device import Bytes, DeviceBinding, DeviceTensor
from sardonyx.speech import Alignment, Placement, SpeechBatch, SpeechOutput, Window

_logger = logging.getLogger(__name__)

MAX_POSITIONS = 1024
"""Of the padded view of a run's rows. A row alone may have more: its whole prompt is read at once."""


class WhisperDeviceRunner:
    """A `core.Runner` of `SpeechBatch`es, on a card. Used by one thread at a time.

    A step's tensors, beside those of `PagedRunner`:
        position_ids       (T,)          int64
        row_gather         (B, S)        int64    packed index of each place of the padded view
        row_scatter        (T,)          int64    flat place in the padded view of each packed token
        cross.{i}.*        (B, H, P, D)  of the rows' windows

    A sequence that moves takes its window's keys and values along by a copy on the card, and its own by its slot's
    block table.

    Args:
        graphs: closed with the runner.
        model: the manifest's part, which the graphs are checked against.
        num_slots: sequences at once at most.

    Raises:
        ConfigError: a graph is not what the manifest says, or the caches do not fit the card.

    Source: com.microsoft.PagedAttention, com.microsoft.MultiHeadAttention (ONNX Runtime 1.31 schema).
    """

    def __init__(self, graphs: WhisperGraphs, model: Whisper, num_slots: int) -> None:
        check_graphs(graphs, model)
        check_num_rows(num_slots)
        assert model.kv.block_size is not None, "the cache has blocks"
        self._graphs = graphs
        self._model = model
        self._block_size = model.kv.block_size
        self._limits = RunnerLimits(
            num_slots=num_slots,
            max_model_len=model.max_model_len,
            max_chunk_tokens=model.max_model_len,
            vocab_size=model.vocab_size,
        )
        max_tokens = max(MAX_POSITIONS, model.max_model_len)
        columns = -(-model.max_model_len // self._block_size)
        self._memory = WhisperMemory(
            graphs.device,
            model,
            num_slots,
            input_bytes=max_step_bytes(num_slots, max_tokens, columns),
            num_logits=2 * num_slots,
        )
        self._encoder: DeviceBinding | None = graphs.encoder.new_binding()
        self._encoder.bind_input("mel", self._memory.mel)
        self._decoder: DeviceBinding | None = graphs.decoder.new_binding()
        self._memory.bind_past(self._decoder)
        self._aligner = graphs.aligner.new_binding() if graphs.aligner is not None else None
        self._reader = SpeechReader(model)

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    def execute(self, batch: SpeechBatch) -> SpeechOutput:
        """Do what one step asks for, and wait for it.

        Returns:
            Of a pass, for each row its next token, or the languages. Rows whose logits are not finite are in `failed`.

        Raises:
            EngineError: the card failed, or did not take all of the step.
        """
        try:
            return self._execute(batch)
        except EngineError:
            self._settle()
            raise

    def warm_up(self) -> None:
        """Run the largest steps once, so that the card's arenas grow now. Before the first step.

        Raises:
            EngineError: they do not run.
        """
        started_s = time.perf_counter()
        model, num_slots = self._model, self._limits.num_slots
        window = Window(np.zeros((model.num_mels, model.num_frames), np.float32), model.num_frames)
        self._encode([window])
        for slot in range(num_slots):
            self._place(Placement(slot, window))
        long = [model.start_id] * (model.max_model_len - 1)
        short = [model.start_id] * max(1, MAX_POSITIONS // num_slots)
        for token_ids, count in ((long, 1), (short[: len(long)], num_slots), ([model.start_id], num_slots)):
            wanted = [[0, len(token_ids) - 1]] * count
            self._forward([ForwardRow(slot, token_ids, 0) for slot in range(count)], wanted)
        if self._aligner is not None:
            self._align([model.start_id] * model.max_model_len, window)
        _logger.info("%s: warmed up in %.2f s", self._graphs.model_name, time.perf_counter() - started_s)

    def release(self) -> None:
        """Give back all memory but that of the graphs. Nothing may be executed afterwards. Idempotent."""
        # Bindings first: a session lives on in them, and it must be gone before its stream.
        self._encoder = self._decoder = self._aligner = None
        self._memory.close()

    def close(self) -> None:
        """`release`, and give back the graphs. Idempotent."""
        self.release()
        self._graphs.close()

    def _execute(self, batch: SpeechBatch) -> SpeechOutput:
        if batch.windows:
            self._encode(batch.windows)
        if batch.aligned is not None:
            window = request_of(batch.aligned).window
            return SpeechOutput(alignment=self._align(batch.aligned.token_ids, window))
        for placement in batch.placements:
            self._place(placement)
        return self._decode(batch.rows) if batch.rows else SpeechOutput()

    def _encode(self, windows: list[Window]) -> None:
        """(1, M, F) to the keys and values of every decoder layer, one window after the other.

        1,500 positions of a single one are work enough for a card, and each goes to a place of its own.
        """
        spectrograms = [np.ascontiguousarray(window.spectrogram, np.float32) for window in windows]
        try:
            for window, mel in zip(windows, spectrograms, strict=True):
                self._start_encoding(window, mel)
            self._graphs.device.mark().wait()
        except EngineError:
            for window in windows:
                window.cross = None
            raise

    def _start_encoding(self, window: Window, mel: npt.NDArray[np.float32]) -> None:
        binding, memory = self._opened(self._encoder), self._memory
        place = memory.windows.take(window)
        self._graphs.device.write(memory.mel.address, _bytes(mel))
        for name, tensor in memory.cross(place, 1).items():
            binding.bind_output(name, tensor)
        binding.run()
        window.cross = place

    def _place(self, placement: Placement) -> None:
        if placement.source is None:
            self._memory.fill(placement.slot, self._memory.windows.use(placement.window))
        else:
            self._memory.move(placement.source, placement.slot)

    def _align(self, token_ids: list[int], window: Window) -> Alignment:
        if self._graphs.aligner is None:
            raise EngineError(f"model {self._graphs.model_name} has no graph for word timestamps")
        binding, device, memory = self._opened(self._aligner), self._graphs.device, self._memory
        num_tokens = len(token_ids)
        tensors = {"input_ids": np.array([token_ids], np.int64), "position_ids": np.arange(num_tokens, dtype=np.int64)}
        self._write(binding, tensors)
        for name, tensor in memory.cross(memory.windows.use(window), 1).items():
            binding.bind_input(name, tensor)
        found = []
        for name, tensor in zip(("attention", "logprobs"), memory.alignment(num_tokens), strict=True):
            binding.bind_output(name, tensor)
            found.append((tensor, np.empty(tensor.shape, np.float32)))
        binding.run()
        for tensor, values in found:
            if values.size:
                device.read(tensor.address, _bytes(values))
        device.mark().wait()
        return Alignment(found[0][1], found[1][1])

    def _decode(self, rows: list[BatchRow]) -> SpeechOutput:
        """One packed pass, and a token for each row."""
        wanted = [self._reader.wanted(row) for row in rows]
        logits, firsts = self._forward([ForwardRow.of(row) for row in rows], wanted)
        return self._reader.read(rows, wanted, logits, firsts)

    def _forward(self, rows: list[ForwardRow], wanted: list[list[int]]) -> tuple[npt.NDArray[np.float32], list[int]]:
        """As `PackedPass.forward`. Rows are those of the slots 0, 1 ..."""
        assert [row.slot for row in rows] == list(range(len(rows))), "each slot below the last is taken"
        logits = self._memory.host_logits.view(np.float32).reshape(-1, self._model.vocab_size)
        counts = np.array([len(each) for each in wanted])
        firsts = (counts.cumsum() - counts).tolist()
        for part in divide_rows(rows, MAX_POSITIONS):
            start, end = firsts[part[0]], firsts[part[-1]] + int(counts[part[-1]])
            chosen = slice(part.start, part.stop)
            self._run(rows[chosen], wanted[chosen], logits[start:end])
        return logits, firsts

    def _run(self, rows: list[ForwardRow], wanted: list[list[int]], logits: npt.NDArray[np.float32]) -> None:
        """Neighbouring rows through the graph."""
        binding, device, memory = self._opened(self._decoder), self._graphs.device, self._memory
        slots = [row.slot for row in rows]
        tensors, metadata = step_tensors(rows, wanted, memory.blocks(slots), self._block_size)
        self._write(binding, tensors)
        binding.bind_input(METADATA, metadata)
        for name, tensor in memory.cross(slots[0], len(slots)).items():
            binding.bind_input(name, tensor)
        found: DeviceTensor = memory.logits(len(logits))
        binding.bind_output("logits", found)
        binding.run()
        device.read(found.address, _bytes(logits))
        device.mark().wait()

    def _write(self, binding: DeviceBinding, tensors: Tensors) -> None:
        """Give the device a run's inputs in one copy, and bind them."""
        memory = self._memory
        placed, num_bytes = layout(tensors, memory.inputs)
        write_tensors(tensors, memory.host_inputs)
        self._graphs.device.write(memory.inputs, memory.host_inputs[:num_bytes])
        for name, tensor in placed.items():
            binding.bind_input(name, tensor)

    def _opened(self, binding: DeviceBinding | None) -> DeviceBinding:
        if binding is None:
            raise EngineError(f"model {self._graphs.model_name} is unloaded")
        return binding

    def _settle(self) -> None:
        """After a step that was taken in part: wait, since the card may still read what the host would overwrite."""
        try:
            self._graphs.device.mark().wait()
        except EngineError as error:
            _logger.error("%s: the device does not answer: %s", self._graphs.model_name, error.message)


def _bytes(values: npt.NDArray[np.float32]) -> Bytes:
    return values.view(np.uint8).reshape(-1)
