"""Runs Whisper models: windows to keys and values, rows to tokens, tokens to where they are heard.

Floor 3. Owns the model's sessions and the caches of its slots. Which sequence holds which slot, and when, is the
engine's decision.
"""

import logging
import time

import numpy as np

from sardonyx.core import BatchRow, RunnerLimits
from sardonyx.errors import ConfigError, EngineError
from sardonyx.repository.families import KvLayout, Whisper
from sardonyx.runners.packed_pass import PackedPass
from sardonyx.runners.packing import ForwardRow
from sardonyx.runners.speech_reader import SpeechReader, request_of
from sardonyx.runtime.kv_cache import KvCache, bytes_per_slot
from sardonyx.runtime.session import Binding, Session
from sardonyx.speech import (
    Alignment,
    CrossLayer,
    Floats,
    Placement,
    SpeechBatch,
    SpeechOutput,
    Window,
)

_logger = logging.getLogger(__name__)

MAX_PADDING = 16
"""Padded positions that sharing a session run may add. Cross-attention computes for each of them; see `plan_runs`."""


def slot_bytes(model: Whisper) -> int:
    """Memory of one slot: its own cache, its window's keys and values there, and once more with the window itself.

    On a card the slot's own cache are whole blocks.
    """
    block_size = model.kv.block_size or 1
    own = bytes_per_slot(model.kv, -(-model.max_model_len // block_size) * block_size)
    return own + 2 * bytes_per_slot(model.kv, model.num_frames // 2)


class WhisperSessions:
    """The graphs of one version; closed together."""

    def __init__(self, encoder: Session, decoder: Session, aligner: Session | None) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self.aligner = aligner

    def close(self) -> None:
        """Free all of them."""
        for session in (self.encoder, self.decoder, self.aligner):
            if session is not None:
                session.close()


class WhisperRunner:
    """A `core.Runner` of `SpeechBatch`es, on the CPU. Used by one thread.

    Args:
        sessions: closed with the runner.
        model: the manifest's part, which the graphs are checked against.
        num_slots: sequences at once at most.

    Raises:
        ConfigError: a graph is not what the manifest says.
    """

    def __init__(self, sessions: WhisperSessions, model: Whisper, num_slots: int) -> None:
        _check_graphs(sessions, model)
        self._sessions = sessions
        self._model = model
        self._limits = RunnerLimits(
            num_slots=num_slots,
            max_model_len=model.max_model_len,
            max_chunk_tokens=model.max_model_len,
            vocab_size=model.vocab_size,
        )
        self._cache = KvCache(model.kv, num_slots, model.max_model_len)
        self._cross = _CrossCache(model.kv, num_slots, model.num_frames // 2)
        self._pass = PackedPass(
            sessions.decoder,
            self._limits,
            self._cache,
            total_length=model.max_model_len,
            max_padding=MAX_PADDING,
            max_logits=2 * num_slots,
            bind_more=self._cross.bind,
            pays_for_idle=True,
        )
        self._reader = SpeechReader(model)

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    def execute(self, batch: SpeechBatch) -> SpeechOutput:
        """Do what one step asks for.

        Returns:
            Of a pass, for each row its next token, or the languages. Rows whose logits are not finite are in `failed`.

        Raises:
            EngineError: a session failed; the message names the model, and ONNX Runtime's text goes to the log.
        """
        if batch.windows:
            self._encode(batch.windows)
        if batch.aligned is not None:
            return SpeechOutput(alignment=self._align(batch.aligned.token_ids, request_of(batch.aligned).window))
        for placement in batch.placements:
            self._place(placement)
        return self._decode(batch.rows) if batch.rows else SpeechOutput()

    def warm_up(self) -> None:
        """Run each graph once, so that no request pays for ONNX Runtime's first allocations. Before the first step."""
        started_s = time.perf_counter()
        model = self._model
        window = Window(np.zeros((model.num_mels, model.num_frames), np.float32), model.num_frames)
        self._encode([window])
        self._place(Placement(0, window))
        self._pass.forward([ForwardRow(0, [model.start_id], 0)], [[0]])
        if self._sessions.aligner is not None:
            self._align([model.start_id, model.no_timestamps_id, model.end_id], window)
        _logger.info("%s: warmed up in %.2f s", self._sessions.decoder.model_name, time.perf_counter() - started_s)

    def close(self) -> None:
        """Give back sessions and caches. Nothing may be executed afterwards."""
        self._pass.close()
        self._sessions.close()
        self._cache.close()
        self._cross.close()

    def _encode(self, windows: list[Window]) -> None:
        """(B, M, F) to the keys and values of every decoder layer; each window keeps its own."""
        mel = np.stack([window.spectrogram for window in windows])
        found = self._sessions.encoder.run({"mel": mel})
        for index, window in enumerate(windows):
            window.cross = [
                CrossLayer(found[f"cross.{i}.key"][index : index + 1], found[f"cross.{i}.value"][index : index + 1])
                for i in range(self._model.kv.num_layers)
            ]

    def _place(self, placement: Placement) -> None:
        if placement.source is not None:
            self._cache.copy(placement.source, placement.slot, placement.num_tokens)
        self._cross.fill(placement.slot, _cross_of(placement.window))

    def _align(self, token_ids: list[int], window: Window) -> Alignment:
        if self._sessions.aligner is None:
            raise EngineError(f"model {self._sessions.decoder.model_name} has no graph for word timestamps")
        inputs = {"input_ids": np.array([token_ids], np.int64)}
        for i, layer in enumerate(_cross_of(window)):
            inputs[f"cross.{i}.key"], inputs[f"cross.{i}.value"] = layer.key, layer.value  # type: ignore[assignment]  # floats
        found = self._sessions.aligner.run(inputs)
        return Alignment(found["attention"], found["logprobs"])

    def _decode(self, rows: list[BatchRow]) -> SpeechOutput:
        """One packed pass, and a token for each row.

        Tensors bound for the session, beside those of `DecoderRunner.execute`:
            position_ids       (T,)          int64
            cross.{i}.key      (B, H, D, P)  float32, of the slots' windows
            cross.{i}.value    (B, H, P, D)  float32
        """
        wanted = [self._reader.wanted(row) for row in rows]
        logits, firsts = self._pass.forward([ForwardRow.of(row) for row in rows], wanted)
        return self._reader.read(rows, wanted, logits, firsts)


class _CrossCache:
    """Keys and values of the windows in all slots; layer by layer (slots, H, D, P) and (slots, H, P, D)."""

    def __init__(self, layout: KvLayout, num_slots: int, num_positions: int) -> None:
        self._cache = KvCache(layout, num_slots, num_positions)

    def _keys(self, layer: int, first_slot: int, num_slots: int) -> Floats:
        keys = self._cache.keys(layer, first_slot, num_slots)
        slots, heads, positions, size = keys.shape
        return keys.reshape(slots, heads, size, positions)

    def fill(self, slot: int, cross: list[CrossLayer]) -> None:
        """Copy a window's into a slot: 18 MB of the base model."""
        for i, layer in enumerate(cross):
            self._keys(i, slot, 1)[:] = layer.key
            self._cache.values(i, slot, 1)[:] = layer.value

    def bind(self, binding: Binding, first_slot: int, num_slots: int) -> None:
        for i in range(self._cache.layout.num_layers):
            binding.bind_input(f"cross.{i}.key", self._keys(i, first_slot, num_slots))
            binding.bind_input(f"cross.{i}.value", self._cache.values(i, first_slot, num_slots))

    def close(self) -> None:
        self._cache.close()


def _cross_of(window: Window) -> list[CrossLayer]:
    assert isinstance(window.cross, list), "the engine has windows encoded first"
    return window.cross


def _check_graphs(sessions: WhisperSessions, model: Whisper) -> None:
    """Raise ConfigError unless the graphs have the tensors that the manifest's docstring names, in its sizes."""
    kv, positions = model.kv, model.num_frames // 2
    cross = {f"cross.{i}.{side}" for i in range(kv.num_layers) for side in ("key", "value")}
    past = {f"past_key_values.{i}.{side}" for i in range(kv.num_layers) for side in ("key", "value")}
    small = {"input_ids", "position_ids", "row_gather", "row_scatter", "seqlens_k", "query_seqlens"}
    needed = {"encoder": {"mel"}, "decoder": small | {"total_sequence_length", "logits_index"} | past | cross}
    made = {"encoder": cross, "decoder": {"logits", *(name.replace("past_key_values", "present") for name in past)}}
    graphs = {"encoder": sessions.encoder, "decoder": sessions.decoder}
    if sessions.aligner is not None:
        graphs["aligner"] = sessions.aligner
        needed["aligner"], made["aligner"] = {"input_ids"} | cross, {"attention", "logprobs"}
    for role, session in graphs.items():
        odd = sorted((needed[role] ^ session.inputs.keys()) | (made[role] ^ session.outputs.keys()))
        if odd:
            raise ConfigError(f"is no {role} of a Whisper model: see {', '.join(odd[:4])}", file=f"{role}.onnx")
    key = sessions.decoder.inputs["cross.0.key"].shape[1:]
    if key != (kv.num_kv_heads, kv.head_size, positions):
        raise ConfigError(f"has cross.0.key of {key}, unlike the manifest", file="decoder.onnx", field="kv")
    if sessions.decoder.outputs["logits"].shape[-1] != model.vocab_size:
        raise ConfigError("is not the manifest's vocabulary", file="decoder.onnx", field="logits")
    if sessions.encoder.inputs["mel"].shape[1:] != (model.num_mels, model.num_frames):
        raise ConfigError("is not the manifest's window", file="encoder.onnx", field="mel")
