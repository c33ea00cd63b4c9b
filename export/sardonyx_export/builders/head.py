"""From a row's token vectors to its result: pooling, then a head's steps; in the packed graph or as one by itself.

Padding takes no part, whatever it holds: poolings pick a token, weigh tokens by a mask, or take the maximum of those
that are there.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sardonyx_export.builders.activation import activate
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.encoder_spec import Array, Dense, Head, Norm, Normalise, Pooling

HEAD_FILE = "head.onnx"
_OUTPUT = "embeddings"
_SHORTEST = 1e-12
_LOWEST = np.finfo(np.float32).min


def build_head(head: Head, hidden_size: int, folder: Path, file_name: str = HEAD_FILE) -> list[Path]:
    """Write the graph of a head, for token vectors that another graph made.

    Its inputs are token_embeddings (B, S, hidden_size) float32, seqlens (B) int32 and, where the head leaves the prompt
    out, num_prompt_tokens (B) int32; its output embeddings (B, width) float32.

    Args:
        head: poolings and steps.
        hidden_size: of a token's vector.
        folder: an existing one without these files.
        file_name: of the graph; the data file's is this and ``.data``.

    Returns:
        The graph, then its external data.
    """
    with GraphWriter(folder, file_name) as graph:
        graph.input("token_embeddings", np.float32, ["B", "S", hidden_size])
        declare_lengths(graph, head)
        graph.output(_OUTPUT, np.float32, ["B", head.width(hidden_size)])
        pooler = HeadGraph(graph, head, grid="token_embeddings")
        pooled = pooler.pool(lambda: "token_embeddings", pooler.pick)
        pooler.finish(pooled, _OUTPUT)
        return graph.save("head")


def declare_lengths(graph: GraphWriter, head: Head) -> None:
    """The inputs that say how long rows and their prompts are."""
    graph.input("seqlens", np.int32, ["B"])
    if not head.pools_prompt:
        graph.input("num_prompt_tokens", np.int32, ["B"])


class HeadGraph:
    """Adds the nodes of one head.

    Args:
        graph: receives nodes and weights.
        head: poolings and steps.
        grid: name of a tensor (B, S, ...), whose first axes are rows and their columns.
    """

    def __init__(self, graph: GraphWriter, head: Head, *, grid: str) -> None:
        self._graph = graph
        self._head = head
        self._grid = grid
        self._made: dict[str, str] = {}
        self._poolings: dict[Pooling, Callable[[str, str], str]] = {
            "mean": self._mean,
            "mean_sqrt_len_tokens": self._mean_sqrt_len,
            "weightedmean": self._weighted_mean,
            "max": self._max,
        }

    @property
    def picked(self) -> Pooling | None:
        """The pooling, if it is a single one and takes one token of each row as it is."""
        kinds = self._head.poolings
        return kinds[0] if len(kinds) == 1 and kinds[0] in ("cls", "lasttoken") else None

    def pick(self, kind: Pooling) -> str:
        """The grid's entry of each row's first or last token: (B, ...)."""
        graph = self._graph
        name = f"{kind}.entry"
        if kind == "cls" and self._head.pools_prompt:
            first = graph.constant("column.first", np.array(0, np.int64))
            return self._once(name, lambda: graph.node("Gather", [self._grid, first], name, axis=1))
        return self._once(name, lambda: self._pick_column(kind, name))

    def pool(self, padded: Callable[[], str], picked: Callable[[Pooling], str]) -> str:
        """All poolings side by side: (B, hidden size times poolings).

        Args:
            padded: adds what makes the padded view (B, S, E), unless it is there, and names it.
            picked: adds what makes the vectors (B, E) of cls or lasttoken, and names them.
        """
        pooled = []
        for kind in self._head.poolings:
            if kind in ("cls", "lasttoken"):
                pooled.append(picked(kind))
            else:
                pooled.append(self._poolings[kind](self._once("padded", padded), f"pooled.{kind}"))
        return pooled[0] if len(pooled) == 1 else self._graph.node("Concat", pooled, "pooled", axis=1)

    def finish(self, x: str, output: str) -> None:
        """The head's steps, from the pooled (B, ...) to the graph's output."""
        for i, step in enumerate(self._head.steps):
            name = f"head.{i}"
            if isinstance(step, Dense):
                x = self._dense(x, step, name)
            elif isinstance(step, Norm):
                vectors = [self._weight(f"{name}.weight", step.weight), self._weight(f"{name}.bias", step.bias)]
                x = self._graph.node("LayerNormalization", [x, *vectors], name, axis=-1, epsilon=step.epsilon)
            else:
                assert isinstance(step, Normalise), step
                x = self._normalise(x, name)
        self._graph.node("Identity", [x], output)

    def _dense(self, x: str, step: Dense, name: str) -> str:
        vectors = [self._weight(f"{name}.weight", step.weight), self._weight(f"{name}.bias", step.bias)]
        return activate(
            self._graph, step.activation, self._graph.node("Gemm", [x, *vectors], name, transB=1), f"{name}.active"
        )

    def _weight(self, name: str, values: Array | None) -> str:
        return "" if values is None else self._graph.weight(name, np.float32, values.shape, [values])

    def _normalise(self, x: str, name: str) -> str:
        graph = self._graph
        length = graph.node("ReduceL2", [x, self._axis(-1)], f"{name}.length", keepdims=1)
        shortest = graph.constant("length.shortest", np.array(_SHORTEST, np.float32))
        return graph.node("Div", [x, graph.node("Max", [length, shortest], f"{name}.divisor")], name)

    def _mean(self, x: str, output: str) -> str:
        return self._weigh(x, self._share(self._mask(), "mean.weights"), output)

    def _mean_sqrt_len(self, x: str, output: str) -> str:
        graph, mask = self._graph, self._mask()
        count = graph.node("ReduceSum", [mask, self._axis(-1)], f"{output}.count", keepdims=1)
        root = graph.node("Sqrt", [count], f"{output}.root")
        return self._weigh(x, graph.node("Div", [mask, root], f"{output}.weights"), output)

    def _weighted_mean(self, x: str, output: str) -> str:
        graph = self._graph
        numbers = graph.node("Cast", [self._columns()], "columns.float", to=1)
        numbers = graph.node("Add", [numbers, graph.constant("one", np.array(1, np.float32))], "columns.from_1")
        ramp = graph.node("Mul", [self._mask(), numbers], f"{output}.ramp")
        return self._weigh(x, self._share(ramp, f"{output}.weights"), output)

    def _share(self, weights: str, output: str) -> str:
        """Weights (B, S) that sum to 1 in each row."""
        total = self._graph.node("ReduceSum", [weights, self._axis(-1)], f"{output}.total", keepdims=1)
        return self._graph.node("Div", [weights, total], output)

    def _weigh(self, x: str, weights: str, output: str) -> str:
        """Weights (B, S) times vectors (B, S, E): (B, E)."""
        graph = self._graph
        row = graph.node("Unsqueeze", [weights, self._axis(1)], f"{output}.row_weights")
        return graph.node("Squeeze", [graph.node("MatMul", [row, x], f"{output}.row"), self._axis(1)], output)

    def _max(self, x: str, output: str) -> str:
        graph = self._graph
        is_there = graph.node("Unsqueeze", [self._is_pooled(), self._axis(-1)], f"{output}.is_there")
        lowest = graph.constant("lowest", np.array(_LOWEST, np.float32))
        return graph.node(
            "ReduceMax",
            [graph.node("Where", [is_there, x, lowest], f"{output}.masked"), self._axis(1)],
            output,
            keepdims=0,
        )

    def _pick_column(self, kind: Pooling, output: str) -> str:
        graph = self._graph
        if kind == "cls":
            column = self._start()
        else:
            one = graph.constant("one.int64", np.array(1, np.int64))
            column = graph.node("Sub", [self._lengths(), one], "column.last")
        return graph.node("GatherND", [self._grid, column], output, batch_dims=1)

    def _mask(self) -> str:
        """1 for each pooled token and 0 elsewhere, (B, S) float32."""
        return self._once("mask", lambda: self._graph.node("Cast", [self._is_pooled()], "mask", to=1))

    def _is_pooled(self) -> str:
        """(B, S) bool."""

        def make() -> str:
            graph = self._graph
            is_before_end = graph.node("Less", [self._columns(), self._lengths()], "is_before_end")
            if self._head.pools_prompt:
                return is_before_end
            is_after_prompt = graph.node("GreaterOrEqual", [self._columns(), self._start()], "is_after_prompt")
            return graph.node("And", [is_before_end, is_after_prompt], "is_pooled")

        return self._once("is_pooled", make)

    def _columns(self) -> str:
        """0 to S - 1, (S) int64."""

        def make() -> str:
            graph = self._graph
            size = graph.node("Shape", [self._grid], "num_columns", start=1, end=2)
            zero = graph.constant("zero.int64", np.array(0, np.int64))
            one = graph.constant("one.int64", np.array(1, np.int64))
            size = graph.node("Squeeze", [size], "num_columns.scalar")
            return graph.node("Range", [zero, size, one], "columns")

        return self._once("columns", make)

    def _lengths(self) -> str:
        """Tokens of each row, (B, 1) int64."""
        return self._once("lengths", lambda: self._as_column("seqlens", "lengths"))

    def _start(self) -> str:
        """The first pooled column of each row, (B, 1) int64; of a row that is all prompt the last."""

        def make() -> str:
            graph = self._graph
            one = graph.constant("one.int64", np.array(1, np.int64))
            last = graph.node("Sub", [self._lengths(), one], "start.last")
            return graph.node("Min", [self._as_column("num_prompt_tokens", "prompt_lengths"), last], "start")

        return self._once("start", make)

    def _as_column(self, name: str, output: str) -> str:
        wide = self._graph.node("Cast", [name], f"{output}.int64", to=7)
        return self._graph.node("Unsqueeze", [wide, self._axis(1)], output)

    def _axis(self, axis: int) -> str:
        return self._graph.constant(f"axis.{axis}", np.array([axis], np.int64))

    def _once(self, key: str, make: Callable[[], str]) -> str:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
