"""An exported encoder, run as the server will run it, against what it was made of."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sardonyx.repository.families import Encoder, Labels
from sardonyx.repository.manifest import Parity
from sardonyx.runners.encoder import OUTPUT, EncoderGraphs, EncoderRunner, packed_tensors
from sardonyx.runtime.session import open_session
from sardonyx.tensors import TensorBatch, TensorRequest, TensorRow
from sardonyx_export.encoder_spec import Array
from sardonyx_export.errors import ExportError
from sardonyx_export.stages.encoder_operators import ENCODER_OPERATORS
from sardonyx_export.stages.encoder_reference import EncodedRow
from sardonyx_export.stages.operators import MappedEvaluator

MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.995, "int8": 0.99}
"""Of an embedding with its reference, by precision. Measured on all-MiniLM-L6-v2: fp32 1 - 1e-7; int8 0.994, the worst
of 120 sentences."""
MAX_SCORE_ERROR = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.1}
"""Of a score in [0, 1]; bare logits count as a share of the largest one."""


def run_graph(
    graph: Path, head: Path | None, name: str, encoder: Encoder, batches: Sequence[Sequence[EncodedRow]]
) -> list[Array]:
    """The rows' results, from the graphs in the server's own sessions and runner.

    Args:
        graph: the encoder's.
        head: the head's, where there is one.
        name: of the model, for messages.
        encoder: what the manifest will say of it.
        batches: each is one step.

    Returns:
        One (rows, width) array for each batch.

    Raises:
        ConfigError: a graph cannot be opened, or is not of the layout.
        EngineError: a step failed, or gave numbers that are not finite.
    """
    sessions = [open_session(path, model_name=name) for path in (graph, head) if path is not None]
    runner = EncoderRunner([EncoderGraphs(*sessions)], encoder)
    try:
        return [_run(runner, rows) for rows in batches]
    finally:
        runner.close()


def run_in_numpy(graph: Path, output: str, batches: Sequence[Sequence[EncodedRow]]) -> list[Array]:
    """The rows' results from a graph for CUDA: all of its nodes and weights, but in numpy (`stages.encoder_operators`).

    Its operators exist on CUDA only. So wiring, weights and their rounding are verified, and CUDA's own kernels are
    not.

    Args:
        graph: the encoder's, of the packed layout.
        output: its.
        batches: each is one step.

    Returns:
        One (rows, width) array for each batch.
    """
    evaluator = MappedEvaluator(graph, ENCODER_OPERATORS)
    values: list[Array] = []
    for rows in batches:
        requests = _requests(rows)
        types = np.concatenate([each.inputs.get("token_type_ids", 0 * each.inputs["input_ids"]) for each in requests])
        tensors = packed_tensors(requests, types)
        tensors["num_prompt_tokens"] = np.array([row.num_prompt_tokens for row in rows], np.int32)
        (found,) = evaluator.run([output], {name: tensors[name] for name in evaluator.input_names})
        values.append(np.asarray(found, np.float32))
    return values


def _requests(rows: Sequence[EncodedRow]) -> list[TensorRequest]:
    return [
        TensorRequest(id=number, inputs=_inputs(row), outputs=(OUTPUT,), num_tokens=len(row.token_ids))
        for number, row in enumerate(rows)
    ]


def _run(runner: EncoderRunner, rows: Sequence[EncodedRow]) -> Array:
    output = runner.execute(TensorBatch([TensorRow(request) for request in _requests(rows)]), 0)
    values = []
    for result in output.results:
        if not isinstance(result, dict):
            raise result
        values.append(result[OUTPUT])
    return np.stack(values)


def _inputs(row: EncodedRow) -> dict[str, np.ndarray]:
    inputs = {"input_ids": np.array(row.token_ids, np.int64)}
    if row.token_type_ids is not None:
        inputs["token_type_ids"] = np.array(row.token_type_ids, np.int64)
    return inputs


def compare_embeddings(expected: Array, actual: Array, precision: str, reference: str) -> Parity:
    """How far embeddings are from their reference. (rows, width) both.

    Raises:
        ExportError: farther than `MIN_COSINE` allows.
    """
    lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(actual, axis=1)
    cosine = float(((expected * actual).sum(axis=1) / np.maximum(lengths, 1e-12)).min())
    limit = MIN_COSINE[precision]
    error = float(np.abs(expected - actual).max())
    if not cosine >= limit:
        raise ExportError(
            f"the exported graph is not what its source says: cosine {cosine:.5f} with {reference}; {precision} has to "
            f"keep {limit}. Nothing was published"
        )
    return Parity(
        reference=reference,
        max_abs_error=error,
        min_cosine=cosine,
        num_positions=len(expected),
        tolerance=f"min_cosine >= {limit:g}",
    )


def compare_scores(expected: Array, actual: Array, labels: Labels, precision: str, reference: str) -> Parity:
    """How far scores are from their reference. (rows, labels) both, before the activation.

    Raises:
        ExportError: farther than `MAX_SCORE_ERROR` allows.
    """
    scores, wanted = _activated(actual, labels), _activated(expected, labels)
    error = float(np.abs(scores - wanted).max())
    limit = MAX_SCORE_ERROR[precision]
    if labels.activation == "none":
        limit *= max(1.0, float(np.abs(wanted).max()))
    agreement = float((scores.argmax(axis=1) == wanted.argmax(axis=1)).mean()) if scores.shape[1] > 1 else None
    if not error <= limit:
        raise ExportError(
            f"the exported graph is not what its source says: a score differs by {error:.3g} from {reference}; "
            f"{precision} has to keep {limit:.3g}. Nothing was published"
        )
    return Parity(
        reference=reference,
        max_abs_error=error,
        top1_agreement=agreement,
        num_positions=len(expected),
        tolerance=f"max_abs_error <= {limit:g}",
    )


def _activated(values: Array, labels: Labels) -> Array:
    match labels.activation:
        case "sigmoid":
            return np.asarray(1 / (1 + np.exp(-values)), np.float32)
        case "softmax":
            shares = np.exp(values - values.max(axis=1, keepdims=True))
            return np.asarray(shares / shares.sum(axis=1, keepdims=True), np.float32)
        case _:
            return values
