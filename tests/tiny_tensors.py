"""Small tensor models for everybody's tests: graphs of a few nodes, and folders of a repository around them.

A graph function returns an `onnx.ModelProto`; `write_model` puts it into a repository. The same arguments give the
same bytes on every machine. Shapes are those of the config: without the batch axis, which `max_batch_size` adds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from sardonyx.runtime.dtypes import DATATYPES

OPSET = 17
IR_VERSION = 8
"""Opset 17's own, so that every ONNX Runtime that has the opset reads the file."""

Shape = Sequence[int | str | None]
"""A number, a symbol, or ``None`` and -1 for any size."""

# What the graph computes in, where ONNX Runtime's CPU kernels of Add and Sub lack the datatype itself.
_ARITHMETIC = {
    "INT8": "INT32",
    "INT16": "INT32",
    "UINT8": "INT32",
    "UINT16": "INT32",
    "UINT32": "INT64",
    "UINT64": "INT64",
    "FP16": "FP32",
    "BF16": "FP32",
    "BYTES": "INT32",
}


def add_sub(datatype: str = "INT32", *, shape: Shape = (16,), is_batched: bool = True) -> onnx.ModelProto:
    """OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1; integers wrap around. Not for BOOL.

    BYTES are decimal numbers; a request with another text makes the run fail.
    """
    assert datatype != "BOOL"
    compute = _ARITHMETIC.get(datatype, datatype)
    nodes = []
    operands = ["INPUT0", "INPUT1"]
    if compute != datatype:
        operands = ["a", "b"]
        nodes += [cast(f"INPUT{index}", name, compute) for index, name in enumerate(operands)]
    for index, operator in enumerate(("Add", "Sub")):
        result = f"OUTPUT{index}" if compute == datatype else operator
        nodes.append(helper.make_node(operator, operands, [result]))
        if compute != datatype:
            nodes.append(cast(result, f"OUTPUT{index}", datatype))
    ports = [(f"INPUT{index}", datatype, shape) for index in range(2)]
    return graph(nodes, ports, [(f"OUTPUT{index}", datatype, shape) for index in range(2)], is_batched=is_batched)


def identity(
    datatype: str = "FP32", *, shape: Shape = (-1,), is_batched: bool = True, num_tensors: int = 1
) -> onnx.ModelProto:
    """OUTPUT0 = INPUT0, and so on for `num_tensors`."""
    nodes = [helper.make_node("Identity", [f"INPUT{index}"], [f"OUTPUT{index}"]) for index in range(num_tensors)]
    inputs = [(f"INPUT{index}", datatype, shape) for index in range(num_tensors)]
    outputs = [(f"OUTPUT{index}", datatype, shape) for index in range(num_tensors)]
    return graph(nodes, inputs, outputs, is_batched=is_batched)


def slow(*, is_batched: bool = True) -> onnx.ModelProto:
    """OUTPUT = INPUT after as many turns of a loop as the largest INPUT (INT64 [1]) of the batch says.

    A turn takes some ten microseconds, and ONNX Runtime looks at `RunOptions.terminate` in each. So a test can hold a
    request in flight for as long as it takes to look: with a number that would run for hours, and an abort.
    """
    turn = helper.make_graph(
        [
            helper.make_node("Identity", ["condition"], ["condition_out"]),
            helper.make_node("Add", ["total", "one"], ["total_out"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn_number", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("total", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("condition_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("total_out", TensorProto.INT64, []),
        ],
    )
    nodes = [
        helper.make_node("ReduceMax", ["INPUT"], ["num_turns"], keepdims=0),
        helper.make_node("Loop", ["num_turns", "", "zero"], ["num_done"], body=turn),
        # The rows that wanted fewer turns than were made get their own number back.
        helper.make_node("Min", ["INPUT", "num_done"], ["OUTPUT"]),
    ]
    constants = [helper.make_tensor(name, TensorProto.INT64, [], [value]) for name, value in (("zero", 0), ("one", 1))]
    ports = [("INPUT", "INT64", (1,))]
    return graph(nodes, ports, [("OUTPUT", "INT64", (1,))], constants=constants, is_batched=is_batched)


def overridable() -> onnx.ModelProto:
    """OUTPUT0 = INPUT0 + BIAS, of FP32 [1] without batch axis; BIAS is 5 unless a run brings another."""
    ports = [("INPUT0", "FP32", (1,)), ("BIAS", "FP32", (1,))]
    bias = helper.make_tensor("BIAS", TensorProto.FLOAT, [1], [5.0])
    node = helper.make_node("Add", ["INPUT0", "BIAS"], ["OUTPUT0"])
    return graph([node], ports, [("OUTPUT0", "FP32", (1,))], constants=[bias], is_batched=False)


def unknown_operator() -> onnx.ModelProto:
    """A well-formed file that no runtime can load."""
    node = helper.make_node("Levitate", ["INPUT0"], ["OUTPUT0"], domain="test.nowhere")
    return graph([node], [("INPUT0", "FP32", (1,))], [("OUTPUT0", "FP32", (1,))], domains=("test.nowhere",))


def graph(
    nodes: list[onnx.NodeProto],
    inputs: Sequence[tuple[str, str, Shape]],
    outputs: Sequence[tuple[str, str, Shape]],
    *,
    constants: Sequence[onnx.TensorProto] = (),
    is_batched: bool = True,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model of nodes.

    Args:
        inputs: name, datatype and shape of each, without batch axis.
        outputs: the same.
        constants: initializers.
        is_batched: put a free axis in front of every input and output.
        domains: of operators, besides ONNX's own.
    """

    def port(name: str, datatype: str, shape: Shape) -> onnx.ValueInfoProto:
        sizes = [None if size == -1 else size for size in shape]
        return helper.make_tensor_value_info(name, element_type(datatype), [*["batch"] * is_batched, *sizes])

    body = helper.make_graph(
        nodes,
        "graph",
        [port(*values) for values in inputs],
        [port(*values) for values in outputs],
        initializer=list(constants),
    )
    opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="sardonyx tests")


def cast(source: str, target: str, datatype: str) -> onnx.NodeProto:
    """A node that converts a value to a datatype."""
    return helper.make_node("Cast", [source], [target], to=element_type(datatype))


def element_type(datatype: str) -> int:
    """ONNX's number of KServe's datatype."""
    return DATATYPES[datatype].element_type


def serialize(model: onnx.ModelProto) -> bytes:
    """The bytes of the file, the same on every machine."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def write_model(
    root: Path,
    name: str,
    model: onnx.ModelProto | bytes,
    *,
    version: int = 1,
    config: str | None = None,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a version of a model, and return the model's folder.

    Args:
        root: of the repository.
        model: bytes are written as they are, so that a file can be broken.
        config: text of ``config.pbtxt`` (see `config_text`); ``None`` leaves the file as it is, or out.
        files: more files by their path in the model's folder: labels, initial states.
    """
    folder = root / name
    (folder / str(version)).mkdir(parents=True, exist_ok=True)
    data = model if isinstance(model, bytes) else serialize(model)
    (folder / str(version) / "model.onnx").write_bytes(data)
    if config is not None:
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
    for path, content in (files or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def config_text(
    *,
    max_batch_size: int = 8,
    inputs: Sequence[tuple[str, str, Sequence[int]]] = (),
    outputs: Sequence[tuple[str, str, Sequence[int]]] = (),
    rest: str = "",
) -> str:
    """The text of a tensor model's ``config.pbtxt``.

    Args:
        max_batch_size: 0 for models that do not batch.
        inputs: name, KServe's datatype and dims of each, without batch axis; none: left to auto-completion.
        outputs: the same.
        rest: further fields as they stand, such as ``dynamic_batching { }``.
    """
    lines = ['platform: "onnxruntime_onnx"', f"max_batch_size: {max_batch_size}"]
    for field, ports in (("input", inputs), ("output", outputs)):
        for name, datatype, dims in ports:
            kind = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
            sizes = ", ".join(map(str, dims))
            lines.append(f'{field} {{ name: "{name}" data_type: {kind} dims: [ {sizes} ] }}')
    return "\n".join([*lines, rest, ""])


def truncated(model: onnx.ModelProto) -> bytes:
    """The first half of the file, as an interrupted copy leaves it."""
    data = serialize(model)
    return data[: len(data) // 2]
