"""Writes the graphs of the example models in `model_repository`; their configs are written by hand.

    python -m tests.make_examples

The names of models and tensors are those of Triton's example repository, so that its client examples run unchanged.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests import tiny_tensors
from tests.tiny_tensors import cast, graph

REPOSITORY = Path(__file__).parents[1] / "model_repository"

_NUMBER = ("INT32", (1,))
_ONE = helper.make_tensor("one", TensorProto.INT32, [1], [1])


def simple_sequence() -> onnx.ModelProto:
    """OUTPUT = INPUT + START, and 0 in slots that are not READY."""
    nodes = [
        helper.make_node("Add", ["INPUT", "START"], ["sum"]),
        helper.make_node("Mul", ["sum", "READY"], ["OUTPUT"]),
    ]
    inputs = [(name, *_NUMBER) for name in ("INPUT", "START", "READY")]
    return graph(nodes, inputs, [("OUTPUT", *_NUMBER)])


def simple_dyna_sequence() -> onnx.ModelProto:
    """OUTPUT = INPUT + START, and the correlation id more at the END."""
    nodes = [
        helper.make_node("Add", ["INPUT", "START"], ["sum"]),
        cast("CORRID", "id", "INT32"),
        helper.make_node("Mul", ["id", "END"], ["id_at_end"]),
        helper.make_node("Add", ["sum", "id_at_end"], ["total"]),
        helper.make_node("Mul", ["total", "READY"], ["OUTPUT"]),
    ]
    inputs = [(name, *_NUMBER) for name in ("INPUT", "START", "END", "READY")]
    return graph(nodes, [*inputs, ("CORRID", "UINT64", (1,))], [("OUTPUT", *_NUMBER)])


def simple_string_dyna_sequence() -> onnx.ModelProto:
    """OUTPUT = the sum of a sequence's inputs so far, and the correlation id, a decimal text, more at the END."""
    nodes = [
        *_running_total(),
        cast("CORRID", "id", "INT32"),
        helper.make_node("Mul", ["id", "END"], ["id_at_end"]),
        helper.make_node("Add", ["STATE_OUT", "id_at_end"], ["OUTPUT"]),
    ]
    inputs = [(name, *_NUMBER) for name in ("INPUT", "STATE_IN", "START", "END")]
    return graph(
        nodes,
        [*inputs, ("CORRID", "BYTES", (1,))],
        [(name, *_NUMBER) for name in ("OUTPUT", "STATE_OUT")],
        constants=[_ONE],
    )


def simple_accumulate() -> onnx.ModelProto:
    """OUTPUT = the sum of a sequence's inputs so far, carried in a state."""
    return graph(
        [*_running_total(), helper.make_node("Identity", ["STATE_OUT"], ["OUTPUT"])],
        [(name, *_NUMBER) for name in ("INPUT", "STATE_IN", "START")],
        [(name, *_NUMBER) for name in ("OUTPUT", "STATE_OUT")],
        constants=[_ONE],
    )


def simple_classes() -> onnx.ModelProto:
    """SCORES (rising, level, falling) of READINGS, four in a row: are the last two above the first two?"""
    weights = np.array([[-1, 0, 1], [-1, 0, 1], [1, 0, -1], [1, 0, -1]], np.float32)
    # "level" wins where the difference is smaller than 1.
    bias = np.array([0, 1, 0], np.float32)
    nodes = [
        helper.make_node("MatMul", ["READINGS", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Softmax", ["sum"], ["SCORES"], axis=-1),
    ]
    constants = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")]
    return graph(nodes, [("READINGS", "FP32", (4,))], [("SCORES", "FP32", (3,))], constants=constants)


def _running_total() -> list[onnx.NodeProto]:
    """STATE_OUT = INPUT, and STATE_IN more except at the START."""
    return [
        helper.make_node("Sub", ["one", "START"], ["is_later"]),
        helper.make_node("Mul", ["STATE_IN", "is_later"], ["before"]),
        helper.make_node("Add", ["INPUT", "before"], ["STATE_OUT"]),
    ]


EXAMPLES: dict[str, Callable[[], onnx.ModelProto]] = {
    "simple": tiny_tensors.add_sub,
    "simple_int8": lambda: tiny_tensors.add_sub("INT8"),
    "simple_string": lambda: tiny_tensors.add_sub("BYTES"),
    "simple_identity": lambda: tiny_tensors.identity("BYTES"),
    "simple_sequence": simple_sequence,
    "simple_dyna_sequence": simple_dyna_sequence,
    "simple_string_dyna_sequence": simple_string_dyna_sequence,
    "simple_accumulate": simple_accumulate,
    "simple_classes": simple_classes,
}
"""By model. `simple_ensemble` has no graph of its own: an empty version folder and a config."""


def main() -> None:
    for name, make in EXAMPLES.items():
        path = REPOSITORY / name / "1" / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny_tensors.serialize(make()))


if __name__ == "__main__":
    main()
