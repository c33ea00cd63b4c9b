"""Steps of encoder models: rows of any lengths through the graph ``encoder``, and where there is one, ``head``.

Floor 3. `repository.families.Encoder` describes the two layouts. Instances share a session: ONNX Runtime runs it from
several threads at once.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx.errors import ConfigError, EngineError, ServeError
from sardonyx.repository.families import Encoder
from sardonyx.runners.lone import LoneRuns
from sardonyx.runtime.session import Session
from sardonyx.tensors import InferenceTimes, TensorBatch, TensorOutput, TensorRequest

Array = npt.NDArray[Any]

OUTPUT = "values"
"""What a row's result is called, (width,) float32."""

_TYPES = {
    "input_ids": "INT64",
    "token_type_ids": "INT64",
    "position_ids": "INT64",
    "attention_mask": "INT64",
    "row_gather": "INT64",
    "row_scatter": "INT64",
    "token_offset": "INT32",
    "cumulative_sequence_length": "INT32",
    "seqlens": "INT32",
    "num_prompt_tokens": "INT32",
    "token_embeddings": "FP32",
}
_PACKED = frozenset(
    {
        *("input_ids", "token_type_ids", "position_ids", "seqlens", "num_prompt_tokens"),
        *("row_gather", "row_scatter", "token_offset", "cumulative_sequence_length"),
    }
)
_PADDED = frozenset({"input_ids", "token_type_ids", "position_ids", "attention_mask"})
_HEAD = frozenset({"token_embeddings", "seqlens", "num_prompt_tokens"})
_HEAD_OUTPUT = "embeddings"


@dataclass(frozen=True, slots=True)
class EncoderGraphs:
    """The sessions that a step runs on."""

    encoder: Session
    head: Session | None = None

    @property
    def takes_types(self) -> bool:
        """Which of two texts a token belongs to matters."""
        return "token_type_ids" in self.encoder.inputs

    @property
    def takes_prompt_lengths(self) -> bool:
        """Tokens of a prompt are not pooled."""
        sessions = (self.encoder,) if self.head is None else (self.encoder, self.head)
        return any("num_prompt_tokens" in session.inputs for session in sessions)

    def close(self) -> None:
        """Free both."""
        self.encoder.close()
        if self.head is not None:
            self.head.close()


class EncoderRunner:
    """A `tensors.TensorRunner`: each request is a row of ``input_ids`` (t) int64, at least one.

    A request may bring ``token_type_ids`` (t) int64, zeros if left out, and ``num_prompt_tokens`` () or (1) int32, 0 if
    left out. Its result is `OUTPUT`. A row depends on no other row, but for rounding.

    Args:
        graphs: of each instance; the same object for those that share it. Closed by `close`.
        encoder: from the manifest.

    Raises:
        ConfigError: a graph has not the inputs and outputs of its layout.
    """

    def __init__(self, graphs: Sequence[EncoderGraphs], encoder: Encoder) -> None:
        self._graphs = list(graphs)
        self._encoder = encoder
        self._wide: EncoderGraphs | None = None
        self._lone = LoneRuns()
        for each in set(self._graphs):
            _check(each, encoder)

    def use_alone(self, graphs: EncoderGraphs) -> None:
        """Run on these, on any instance, while steps follow each other one by one. Before the first step."""
        _check(graphs, self._encoder)
        self._wide = graphs

    def warm_up(self) -> None:
        """Run every session once, so that the first request does not wait for what ONNX Runtime does then.

        Raises:
            ConfigError: a graph does not run, or gives something else than its manifest says.
        """
        ids = np.zeros(min(2, self._encoder.max_model_len), np.int64)
        row = TensorRequest(id=0, inputs={"input_ids": ids}, outputs=(OUTPUT,))
        for graphs in self._opened():
            try:
                self._run(self._pack([row, row], graphs), 2, graphs)
            except EngineError as error:
                raise ConfigError(f"does not run: {error.message}", field="graphs") from error

    def execute(self, batch: TensorBatch, instance: int) -> TensorOutput:
        """Run one step. Where it fails, each row is run again alone, for what one holds may be what fails.

        Raises:
            EngineError: the session failed for all of them.
        """
        if self._wide is None:
            return self._execute(batch.requests, self._graphs[instance])
        with self._lone.run() as is_alone:
            return self._execute(batch.requests, self._wide if is_alone else self._graphs[instance])

    def close(self) -> None:
        """Free the sessions."""
        for graphs in self._opened():
            graphs.close()

    def _opened(self) -> list[EncoderGraphs]:
        """Each once."""
        return list(dict.fromkeys([*self._graphs, *([self._wide] if self._wide is not None else [])]))

    def _execute(self, rows: list[TensorRequest], graphs: EncoderGraphs) -> TensorOutput:
        try:
            return self._step(rows, graphs)
        except EngineError:
            if len(rows) == 1:
                raise
            output = self._one_by_one(rows, graphs)
            if all(isinstance(result, ServeError) for result in output.results):
                raise
            return output

    def _one_by_one(self, rows: list[TensorRequest], graphs: EncoderGraphs) -> TensorOutput:
        """Rows of a step that failed, each alone; an error is its row's."""
        results: list[dict[str, Array] | ServeError] = []
        started_ns = time.perf_counter_ns()
        for row in rows:
            try:
                results += self._step([row], graphs).results
            except EngineError as error:
                results.append(error)
        return TensorOutput(results, InferenceTimes(compute_infer_ns=time.perf_counter_ns() - started_ns))

    def _step(self, rows: list[TensorRequest], graphs: EncoderGraphs) -> TensorOutput:
        started_ns = time.perf_counter_ns()
        tensors = self._pack(rows, graphs)
        packed_ns = time.perf_counter_ns()
        values = self._run(tensors, len(rows), graphs)
        ran_ns = time.perf_counter_ns()
        results = self._results(values)
        times = InferenceTimes(packed_ns - started_ns, ran_ns - packed_ns, time.perf_counter_ns() - ran_ns)
        return TensorOutput(results, times)

    def _results(self, values: Array) -> list[dict[str, Array] | ServeError]:
        """A row each. A number that is not finite is that row's failure, and would not survive JSON."""
        is_good = np.all(np.isfinite(values), axis=1).tolist()
        return [
            {OUTPUT: row} if good else EngineError("the model gave a number that is not finite")
            for row, good in zip(values, is_good, strict=True)
        ]

    def _pack(self, rows: list[TensorRequest], graphs: EncoderGraphs) -> dict[str, Array]:
        """What the layout has and the graphs take, by name."""
        types = _type_ids(rows) if graphs.takes_types else None
        is_packed = self._encoder.layout == "packed"
        tensors = packed_tensors(rows, types) if is_packed else _padded(rows, types, self._encoder.pad_token_id)
        if graphs.takes_prompt_lengths:
            tensors["num_prompt_tokens"] = _prompt_lengths(rows)
        return tensors

    def _run(self, tensors: dict[str, Array], num_rows: int, graphs: EncoderGraphs) -> Array:
        """(B, width) float32."""
        session, output = graphs.encoder, self._encoder.output
        values = session.run({name: tensors[name] for name in session.inputs}, [output])[output]
        if graphs.head is not None:
            tensors["token_embeddings"] = values
            session, output = graphs.head, _HEAD_OUTPUT
            values = session.run({name: tensors[name] for name in session.inputs}, [output])[output]
        if values.shape != (num_rows, self._encoder.width):
            raise EngineError(
                f"output {output!r} of model {session.model_name} has the shape {list(values.shape)}; "
                f"[{num_rows}, {self._encoder.width}] was expected"
            )
        return values


def packed_tensors(rows: Sequence[TensorRequest], types: Array | None = None) -> dict[str, Array]:
    """The tensors of the packed layout. No work is done token by token.

    Args:
        rows: of a step.
        types: of all tokens, one row after the other; ``None``: the graph takes none.
    """
    ids = [row.inputs["input_ids"] for row in rows]
    lengths = np.array([len(each) for each in ids], np.int64)
    starts = np.cumsum(lengths) - lengths
    num_tokens, longest = int(lengths.sum()), int(lengths.max())
    row_starts = np.arange(len(rows), dtype=np.int64) * longest
    tokens = np.arange(num_tokens, dtype=np.int64)
    row_scatter = tokens + np.repeat(row_starts - starts, lengths)
    is_padding = np.arange(longest) >= lengths[:, None]
    offsets = np.concatenate([row_scatter, np.flatnonzero(is_padding)]).astype(np.int32)
    tensors = {
        "input_ids": np.concatenate(ids) if len(ids) > 1 else ids[0],
        "position_ids": tokens - np.repeat(starts, lengths),
        # Behind a row's end any token does: attention and pooling do not look there.
        "row_gather": np.minimum(starts[:, None] + np.arange(longest, dtype=np.int64), num_tokens - 1),
        "row_scatter": row_scatter,
        "token_offset": offsets.reshape(is_padding.shape),
        "cumulative_sequence_length": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "seqlens": lengths.astype(np.int32),
    }
    if types is not None:
        tensors["token_type_ids"] = types
    return tensors


def _padded(rows: list[TensorRequest], types: Array | None, pad_token_id: int) -> dict[str, Array]:
    """The tensors of the padded layout, and what the head reads."""
    ids = [row.inputs["input_ids"] for row in rows]
    lengths = np.array([len(each) for each in ids], np.int64)
    columns = np.arange(int(lengths.max()), dtype=np.int64)
    is_token = columns < lengths[:, None]
    tensors: dict[str, Array] = {
        "input_ids": np.full(is_token.shape, pad_token_id, np.int64),
        "attention_mask": is_token.astype(np.int64),
        "position_ids": np.tile(columns, (len(rows), 1)),
        "seqlens": lengths.astype(np.int32),
    }
    tensors["input_ids"][is_token] = np.concatenate(ids)
    if types is not None:
        tensors["token_type_ids"] = np.zeros(is_token.shape, np.int64)
        tensors["token_type_ids"][is_token] = types
    return tensors


def _type_ids(rows: list[TensorRequest]) -> Array:
    """Of all tokens, one row after the other."""
    given = [row.inputs.get("token_type_ids") for row in rows]
    lengths = [len(row.inputs["input_ids"]) for row in rows]
    if all(each is None for each in given):
        return np.zeros(sum(lengths), np.int64)
    parts = [np.zeros(length, np.int64) if each is None else each for each, length in zip(given, lengths, strict=True)]
    return np.concatenate(parts)


def _prompt_lengths(rows: list[TensorRequest]) -> Array:
    """(B) int32."""
    given = [row.inputs.get("num_prompt_tokens") for row in rows]
    return np.array([0 if each is None else each.item() for each in given], np.int32)


def _check(graphs: EncoderGraphs, encoder: Encoder) -> None:
    """The graphs' inputs and outputs against the layout."""
    allowed = _PACKED if encoder.layout == "packed" else _PADDED
    _check_graph("encoder", graphs.encoder, allowed, encoder.output, f"the {encoder.layout} layout")
    if graphs.head is None:
        return
    if encoder.layout == "packed":
        raise ConfigError("belongs to the padded layout; a packed graph ends with its head", field="graphs['head']")
    _check_graph("head", graphs.head, _HEAD, _HEAD_OUTPUT, "a head")


def _check_graph(role: str, session: Session, allowed: frozenset[str], output: str, layout: str) -> None:
    field = f"graphs[{role!r}]"
    for name, spec in session.inputs.items():
        if name not in allowed:
            known = ", ".join(sorted(allowed))
            raise ConfigError(f"takes an input {name!r}, which {layout} does not have; it has {known}", field=field)
        if spec.datatype.name != _TYPES[name]:
            raise ConfigError(f"takes {name!r} as {spec.datatype.name}; {layout} has {_TYPES[name]}", field=field)
    found = session.outputs.get(output)
    if found is None:
        raise ConfigError(f"has no output {output!r}; its outputs are {', '.join(session.outputs)}", field=field)
    if found.datatype.name != "FP32":
        raise ConfigError(f"gives {output!r} as {found.datatype.name}; FP32 is needed", field=field)
