"""Whisper's decoder once more, for a text that is known: where in the window each token was heard, and how sure it is.

    input_ids (1, S) int64: a whole sequence, from ``<|startoftranscript|>`` on
    cross.{i}.key (1, H, D, P) · cross.{i}.value (1, H, P, D) float32, of the window
    attention (A, S, P) float32: scaled products before the softmax, of the alignment heads
    logprobs (S - 1) float32: of each token given those before it, among the tokens below `end_id`

All weights are the decoder's, and lie in its data file. Tokens from `end_id` on get some finite number.
"""

import itertools

import msgspec
import numpy as np

from sardonyx_export.builders.graph import MICROSOFT
from sardonyx_export.builders.whisper_decoder import WhisperDecoderGraph


class Alignment(msgspec.Struct, frozen=True, kw_only=True):
    """What an aligner has to know besides sizes."""

    heads: list[list[int]]
    """Layer and head of the cross-attention that follows the sound, at least one."""
    end_id: int
    """``<|endoftext|>``; every token below it is text."""


class WhisperAlignerGraph(WhisperDecoderGraph):
    """Writes one aligner. One row, no cache: its attention needs neither gathers nor lengths."""

    def write_aligner(self, alignment: Alignment) -> None:
        """Add everything to the graph."""
        spec, graph = self._spec, self._graph
        self._declare_aligner(len(alignment.heads))
        flat = graph.constant("shape.flat", np.array([-1], np.int64))
        ids = graph.node("Reshape", ["input_ids", flat], "input_ids.flat")
        self._number(ids)
        head, stream = self._embed(ids)
        for i in range(spec.num_decoder_layers):
            stream = self._layer(i, stream)
        self._attention(alignment.heads)
        before = self._slice(stream, "before", 0, -1, axis=0)
        self._logprobs(self._logits(before, head), ids, alignment.end_id)

    def _declare_aligner(self, num_heads: int) -> None:
        graph, spec = self._graph, self._spec
        graph.input("input_ids", np.int64, [1, "S"])
        for i in range(spec.num_decoder_layers):
            graph.input(f"cross.{i}.key", np.float32, [1, spec.num_decoder_heads, spec.head_size, spec.num_positions])
            graph.input(f"cross.{i}.value", np.float32, [1, spec.num_decoder_heads, spec.num_positions, spec.head_size])
        graph.output("attention", np.float32, [num_heads, "S", spec.num_positions])
        graph.output("logprobs", np.float32, ["S - 1"])

    def _number(self, ids: str) -> None:
        """``position_ids`` (S), from 0."""
        graph = self._graph
        count = graph.node("Squeeze", [graph.node("Shape", [ids], "count.shape")], "count")
        first, step = (graph.constant(f"position.{name}", np.array(i, np.int64)) for i, name in enumerate("ab"))
        graph.node("Range", [first, count, step], "position_ids")

    def _attention(self, heads: list[list[int]]) -> None:
        graph, parts = self._graph, []
        for number, (layer, group) in enumerate(itertools.groupby(heads, key=lambda pair: pair[0])):
            chosen = graph.constant(f"heads.{number}", np.array([head for _, head in group], np.int64))
            logits = f"model.decoder.layers.{layer}.encoder_attn.logits"
            parts.append(graph.node("Gather", [logits, chosen], f"attention.{number}", axis=1))
        row = graph.constant("axis.row", np.array([0], np.int64))
        graph.node("Squeeze", [graph.node("Concat", parts, "attention.row", axis=1), row], "attention")

    def _logprobs(self, logits: str, ids: str, end_id: int) -> None:
        """From logits (S - 1, V)."""
        graph = self._graph
        texts = self._slice(logits, "logits.texts", 0, end_id, axis=1)
        axis = graph.constant("axis.vocabulary", np.array([1], np.int64))
        total = graph.node("ReduceLogSumExp", [texts, axis], "logits.total", keepdims=1)
        highest = graph.constant("highest", np.array(end_id - 1, np.int64))
        following = graph.node(
            "Min", [self._slice(ids, "following", 1, np.iinfo(np.int64).max, axis=0), highest], "next"
        )
        column = graph.node("Unsqueeze", [following, axis], "next.column")
        found = graph.node("GatherElements", [texts, column], "logits.found", axis=1)
        graph.node("Squeeze", [graph.node("Sub", [found, total], "logprobs.column"), axis], "logprobs")

    def _slice(self, x: str, output: str, start: int, stop: int, *, axis: int) -> str:
        bounds = [
            self._graph.constant(f"{output}.{name}", np.array([value], np.int64))
            for name, value in (("start", start), ("stop", stop), ("axis", axis))
        ]
        return self._graph.node("Slice", [x, *bounds], output)

    def _self_attention(self, index: int, hidden: str) -> str:
        """(S, E) → (S, E); each token sees itself and those before it."""
        prefix = f"model.decoder.layers.{index}.self_attn."
        sides = [self._padded(side) for side in self._sides(hidden, prefix)]
        attended = self._graph.node(
            "MultiHeadAttention",
            sides,
            f"{prefix}output",
            domain=MICROSOFT,
            num_heads=self._spec.num_decoder_heads,
            unidirectional=1,
        )
        return self._layers.project(self._packed(attended), f"{prefix}out_proj")

    def _sides(self, hidden: str, prefix: str) -> list[str]:
        """Queries, keys and values, (S, E) each."""
        return [self._layers.project(hidden, f"{prefix}{side}_proj", has_bias=side != "k") for side in "qkv"]

    def _padded(self, x: str) -> str:
        """(S, E) → (1, S, E)."""
        axis = self._graph.constant("axis.row", np.array([0], np.int64))
        return self._graph.node("Unsqueeze", [x, axis], f"{x}.padded")

    def _packed(self, x: str) -> str:
        """(1, S, ...) of E values a token → (S, E)."""
        rows = self._graph.constant("shape.rows", np.array([-1, self._spec.hidden_size], np.int64))
        return self._graph.node("Reshape", [x, rows], f"{x}.packed")
