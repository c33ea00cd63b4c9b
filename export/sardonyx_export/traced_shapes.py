"""Sizes that a trace computes anew in every run, though they follow from what is reshaped: made constants.

A trace reads the number of rows from one tensor and reshapes another by it, so that no optimiser knows what a reshape
does. On CUDA each of these computations is a detour by way of the host: with NHWC convolutions ONNX Runtime 1.31.1
places them on the card, and a small UNet's step had 62 copies of single numbers. What a size is, is seen by running the
graph at several sizes: that of the tensor's own axis, a number, or what is left.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sardonyx.runtime.session import open_session

Ints = npt.NDArray[np.int64]
_SHAPE = "shape of "
_KEPT, _REST = 0, -1
"""In the shape that a reshape takes: as the tensor's own axis, and what is left."""


def settle_shapes(path: Path, runnable: Path, trials: Sequence[Mapping[str, npt.NDArray[Any]]]) -> None:
    """Rewrite a graph whose sizes follow from what it reshapes.

    Args:
        path: of the graph; its data stays as it is.
        runnable: of the same graph as the CPU can run it, with the same names.
        trials: inputs, in every axis that may differ of different sizes.
    """
    model = ir.load(path)
    wanted = {name for node in model.graph for name in _measured(node)}
    if not wanted:
        return
    found = _measure(runnable, sorted(wanted), trials)
    for node in list(model.graph):
        if node.op_type == "Reshape" and not _is_constant(node.inputs[1]):
            before, after = ([each[_shape_of(value)] for each in found] for value in (node.inputs[0], node.outputs[0]))
            shape = reshape_by(before, after)
            if shape is not None:
                _replace_input(model.graph, node, 1, shape)
        elif node.op_type == "Slice":
            _settle_slice(model.graph, node, found)
        elif node.op_type == "Expand":
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None
            is_same = all(np.array_equal(each[_shape_of(x)], each[_shape_of(y)]) for each in found)
            if is_same and not y.is_graph_output():
                ir.convenience.replace_all_uses_with(y, x)
    RemoveUnusedNodesPass()(model)
    ir.save(model, path)


def _settle_slice(graph: ir.Graph, node: ir.Node, found: Sequence[Mapping[str, Ints]]) -> None:
    """Ends that are always the same, as those of a tensor's halves."""
    for index, value in enumerate(node.inputs):
        if not index or value is None or _is_constant(value):
            continue
        values = [each[str(value.name)] for each in found]
        if all(np.array_equal(values[0], other) for other in values):
            _replace_input(graph, node, index, values[0])


def reshape_by(before: Sequence[Ints], after: Sequence[Ints]) -> Ints | None:
    """The constant by which tensors of these shapes become those; ``None``: there is none that they tell."""
    if len({len(shape) for shape in before}) > 1 or len({len(shape) for shape in after}) > 1:
        return None
    made = []
    for axis in range(len(after[0])):
        sizes = {int(shape[axis]) for shape in after}
        if all(axis < len(old) and old[axis] == new[axis] for old, new in zip(before, after, strict=True)):
            made.append(_KEPT)
        else:
            made.append(sizes.pop() if len(sizes) == 1 else _REST)
    return np.array(made, np.int64) if made.count(_REST) <= 1 else None


def _measured(node: ir.Node) -> list[str]:
    """What is to be known of a node: names of values, and of shapes."""
    if node.op_type == "Expand" or (node.op_type == "Reshape" and not _is_constant(node.inputs[1])):
        return [_shape_of(node.inputs[0]), _shape_of(node.outputs[0])]
    if node.op_type == "Slice":
        return [str(value.name) for value in node.inputs[1:] if value is not None and not _is_constant(value)]
    return []


def _measure(
    runnable: Path, names: Sequence[str], trials: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> list[dict[str, Ints]]:
    """These values and shapes in each trial."""
    model = ir.load(runnable)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    values |= {str(value.name): value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for name in names:
        source = values[name.removeprefix(_SHAPE)]
        node = ir.node("Shape" if name.startswith(_SHAPE) else "Identity", [source])
        node.outputs[0].name = f"measured.{name}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    probe = runnable.with_name(f"{runnable.stem}.probe.onnx")
    try:
        ir.save(model, probe)
        session = open_session(probe, model_name=runnable.stem)
        try:
            found = [session.run(trial, [f"measured.{name}" for name in names]) for trial in trials]
        finally:
            session.close()
    finally:
        probe.unlink(missing_ok=True)
    return [{name: each[f"measured.{name}"].copy() for name in names} for each in found]


def _shape_of(value: ir.Value | None) -> str:
    assert value is not None
    return f"{_SHAPE}{value.name}"


def _is_constant(value: ir.Value | None) -> bool:
    if value is None:
        return True
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def _replace_input(graph: ir.Graph, node: ir.Node, index: int, values: Ints) -> None:
    constant = ir.node("Constant", [], attributes={"value": ir.tensor(values)})
    graph.insert_before(node, constant)
    node.replace_input_with(index, constant.outputs[0])
