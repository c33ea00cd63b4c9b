"""The graph that samples beside a decoder for CUDA, so that a step's tokens need not come to the host to be drawn.

It draws as `sardonyx.runners.sampler` does: temperature; min_p; top_k; top_p, each on what the one before has left;
then the token at which the weights left, cumulated in the order of ids, pass the uniform number's share of their sum.
Where tokens are equally likely the lower id counts as likelier. So a row gets the same token here and there, unless its
number lies within float32's rounding of the border between two. Neighbours in the batch do not matter.

The filters look at the `MAX_CANDIDATES` likeliest tokens: a larger top_k, or a nucleus that is wider, is cut there.

It uses ONNX's own operators, of versions that CUDA has kernels for (ONNX Runtime 1.31), and no index that an operator
gives: CUDA's TopK breaks ties by thread, not by index as ONNX asks. Long sums are taken in two levels, blocks first,
because CUDA's CumSum adds every prefix up from its beginning.

Inputs (N rows, V tokens):
    logits (N, V) · temperature (N) · top_p (N) · min_p (N) · uniform (N), in [0, 1); float32
    top_k (N) int64, 0 for all
Outputs:
    token_ids (N) int64 · logprobs (N) float32, of the raw logits · is_finite (N) bool: false where a logit is not a
    number or the likeliest is infinite; the token then means nothing, but is one of the vocabulary
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sardonyx.runners.sampler import MIN_TEMPERATURE
from sardonyx_export.builders.graph import GraphWriter, element_type

SAMPLER_FILE = "sampler.onnx"
MAX_CANDIDATES = 1024
_OPSET = 18
"""ReduceMax has no kernel on CUDA for its version 20."""
_BLOCK = 256
_ALL = np.inf


def build_sampler(vocab_size: int, folder: Path) -> list[Path]:
    """Write the sampler of one vocabulary size.

    Args:
        vocab_size: width of the logits.
        folder: an existing one without these files.

    Returns:
        The graph. All its constants are small, so its data file is removed.
    """
    with GraphWriter(folder, SAMPLER_FILE, opset=_OPSET) as graph:
        _SamplerGraph(graph, vocab_size).write()
        model, data = graph.save("sampler")
    data.unlink()
    return [model]


class _SamplerGraph:
    """Nodes on rows: everything but the constants has N as first axis, and 1 or more columns."""

    def __init__(self, graph: GraphWriter, vocab_size: int) -> None:
        self._graph = graph
        self._vocab_size = vocab_size
        self._num_candidates = min(MAX_CANDIDATES, vocab_size)
        self._num_nodes = 0

    def write(self) -> None:
        """Add everything to the graph."""
        graph = self._graph
        graph.input("logits", np.float32, ["N", self._vocab_size])
        for name in ("temperature", "top_p", "min_p", "uniform"):
            graph.input(name, np.float32, ["N"])
        graph.input("top_k", np.int64, ["N"])
        graph.output("token_ids", np.int64, ["N"])
        graph.output("logprobs", np.float32, ["N"])
        graph.output("is_finite", np.bool_, ["N"])
        # A greedy row is one with a top_k of 1: the weights of one token leave nothing to chance.
        is_drawn = self._node("GreaterOrEqual", [self._column("temperature"), self._float(MIN_TEMPERATURE)])
        temperature, top_p, min_p, top_k = (
            self._node("Where", [is_drawn, self._column(name), self._float(greedy)])
            for name, greedy in (("temperature", 1), ("top_p", 1), ("min_p", 0), ("top_k", 1))
        )
        logits = self._padded(is_drawn)
        distances = self._node("Sub", [logits, self._reduced("ReduceMax", logits)])
        mass = self._reduced("ReduceSum", self._node("Exp", [distances]))
        scaled = self._node("Div", [distances, temperature])
        is_near = self._node("GreaterOrEqual", [scaled, self._node("Log", [min_p])])
        scaled = self._node("Where", [is_near, scaled, self._float(-_ALL)])
        weights = self._node("Exp", [scaled])
        cut, quota = self._cut(scaled, self._reduced("ReduceSum", weights), top_k, top_p)
        token = self._draw(scaled, weights, cut, quota)
        logprob = self._node("Sub", [self._gathered(distances, token), self._node("Log", [mass])])
        self._flat(token, "token_ids")
        self._flat(logprob, "logprobs")
        # Not a number anywhere makes it of the sum, which no comparison holds for; the peak adds 1 otherwise.
        self._flat(self._node("Greater", [mass, self._float(0)]), "is_finite")

    def _cut(self, scaled: str, total: str, top_k: str, top_p: str) -> tuple[str, str]:
        """top_k and top_p as a bound on (N, W) log weights, and how many of those that equal it are kept: (N, 1)."""
        has_k = self._node("Greater", [top_k, self._float(0)])
        has_p = self._node("Less", [top_p, self._float(1)])
        size = self._graph.constant("candidates", np.array([self._num_candidates], np.int64))
        nearest, _ = self._graph.node_with_outputs("TopK", [scaled, size], ["nearest", "nearest.unused"], axis=1)
        ranks = self._graph.constant("ranks", np.arange(self._num_candidates, dtype=np.float32)[None])
        is_ranked = self._node("Less", [ranks, self._node("Where", [has_k, top_k, self._float(_ALL)])])
        weights = self._node("Where", [is_ranked, self._node("Exp", [nearest]), self._float(0)])
        total = self._node("Where", [has_k, self._reduced("ReduceSum", weights), total])
        # Up to the token with which the share is reached; 1 is no filter, whatever the sums are rounded to.
        share = self._node("Where", [has_p, self._node("Mul", [top_p, total]), self._float(_ALL)])
        is_kept = self._node("And", [is_ranked, self._node("Less", [self._cumulated(weights, exclusive=True), share])])
        last = self._node("Sub", [self._counted(is_kept), self._float(1)])
        last = self._index(self._node("Max", [last, self._float(0)]))
        bound = self._gathered(nearest, last)
        quota = self._counted(self._node("And", [is_kept, self._node("Equal", [nearest, bound])]))
        is_limited = self._node("Or", [has_k, has_p])
        # Without a limit all are above the bound, those of weight 0 aside.
        return self._node("Where", [is_limited, bound, self._float(-_ALL)]), quota

    def _draw(self, scaled: str, weights: str, cut: str, quota: str) -> str:
        """The token's id (N, 1) int64: first the block in which the uniform number's share is passed, then inside."""
        is_above, is_cut = (self._node(kind, [scaled, cut]) for kind in ("Greater", "Equal"))
        above = self._block_sums(self._node("Where", [is_above, weights, self._float(0)]))
        num_cut = self._block_sums(self._as_float(is_cut))
        num_cut_before = self._cumulated(num_cut, exclusive=True)
        num_left = self._node("Max", [self._node("Sub", [quota, num_cut_before]), self._float(0)])
        kept_cut = self._node("Mul", [self._node("Min", [num_left, num_cut]), self._node("Exp", [cut])])
        cumulated = self._cumulated(self._node("Add", [above, kept_cut]))
        share = self._node("Mul", [self._column("uniform"), self._reduced("ReduceMax", cumulated)])
        block = self._passed(cumulated, share)

        # One place to the left, so that the first block begins with 0.
        before = self._node("Concat", [self._node("Mul", [share, self._float(0)]), cumulated], axis=1)
        rest = self._node("Sub", [share, self._gathered(before, self._index(block))])
        rest = self._node("Max", [rest, self._float(0)])
        first = self._node("Mul", [block, self._float(_BLOCK)])
        columns = self._graph.constant("columns", np.arange(_BLOCK, dtype=np.float32)[None])
        columns = self._index(self._node("Add", [first, columns]))
        inside = self._gathered(scaled, columns)
        is_above, is_cut = (self._node(kind, [inside, cut]) for kind in ("Greater", "Equal"))
        rank = self._cumulated(self._as_float(is_cut), exclusive=True)
        rank = self._node("Add", [rank, self._gathered(num_cut_before, self._index(block))])
        is_kept = self._node("And", [is_cut, self._node("Less", [rank, quota])])
        is_kept = self._node("Or", [is_above, is_kept])
        weights = self._node("Where", [is_kept, self._gathered(weights, columns), self._float(0)])
        token = self._node("Add", [first, self._passed(self._cumulated(weights), rest)])
        return self._index(self._node("Min", [token, self._float(self._vocab_size - 1)]))

    def _passed(self, cumulated: str, share: str) -> str:
        """How many entries come before the one that passes the share, or else before the last that adds anything."""
        is_before = self._node("LessOrEqual", [cumulated, share])
        is_short = self._node("Less", [cumulated, self._reduced("ReduceMax", cumulated)])
        return self._counted(self._node("And", [is_before, is_short]))

    def _padded(self, any_bool: str) -> str:
        """(N, V) → (N, W) of whole blocks, by impossible tokens.

        Args:
            any_bool: (N, 1); what it says does not matter: it gives the rows that a constant lacks.
        """
        short = -self._vocab_size % _BLOCK
        if not short:
            return "logits"
        pad = self._graph.constant("padding", np.full((1, short), -np.inf, np.float32))
        return self._node("Concat", ["logits", self._node("Where", [any_bool, pad, pad])], axis=1)

    def _column(self, name: str) -> str:
        """An input (N) as (N, 1) float32."""
        column = self._node("Unsqueeze", [name, self._axis])
        return self._as_float(column) if name == "top_k" else column

    def _flat(self, column: str, name: str) -> None:
        self._graph.node("Squeeze", [column, self._axis], name)

    def _block_sums(self, x: str) -> str:
        """(N, W) → (N, W / 256)."""
        shape = self._graph.constant("shape.blocks", np.array([0, -1, _BLOCK], np.int64))
        axis = self._graph.constant("axis.in_block", np.array([2], np.int64))
        return self._node("ReduceSum", [self._node("Reshape", [x, shape]), axis], keepdims=0)

    def _cumulated(self, x: str, *, exclusive: bool = False) -> str:
        axis = self._graph.constant("axis.cumulated", np.array(1, np.int64))
        return self._node("CumSum", [x, axis], exclusive=int(exclusive))

    def _reduced(self, kind: str, x: str) -> str:
        return self._node(kind, [x, self._axis], keepdims=1)

    def _counted(self, flags: str) -> str:
        return self._reduced("ReduceSum", self._as_float(flags))

    def _gathered(self, x: str, index: str) -> str:
        return self._node("GatherElements", [x, index], axis=1)

    def _index(self, x: str) -> str:
        """Whole float32 numbers, all below 2 ** 24, as int64."""
        return self._node("Cast", [x], to=element_type(np.int64))

    def _as_float(self, x: str) -> str:
        return self._node("Cast", [x], to=element_type(np.float32))

    @property
    def _axis(self) -> str:
        return self._graph.constant("axis.columns", np.array([1], np.int64))

    def _float(self, value: float) -> str:
        return self._graph.constant(f"float.{value}", np.array(value, np.float32))

    def _node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node named after its kind and number. `attributes` are the operator's, hence ``Any``."""
        self._num_nodes += 1
        return self._graph.node(kind, inputs, f"{kind}.{self._num_nodes}", **attributes)
