"""What of a traced graph is CUDA's: attention and group norms as kernels of its own, and the same graph for the CPU.

ONNX's ``InstanceNormalization`` of opset 22, as which torch writes a group norm, has no kernel on CUDA (ONNX Runtime
1.31.1), so these graphs keep opset 20, and have ``com.microsoft`` operators where newer ones would be:

- MultiHeadAttention, rows of heads as they come out of the products before it;
- GroupNorm with channels last, in float32 inside, the SiLU behind it included. With CUDA's NHWC convolutions around it
  (``prefer_nhwc``) no pixel is moved between them.

The CPU has no GroupNorm: `write_check_graph` takes it apart, so that all the rest of the very graph can be run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"
_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
_FLOAT = int(ir.DataType.FLOAT)


@contextmanager
def cuda_operators() -> Iterator[None]:
    """Scaled dot-product attention and group norms become CUDA's own operators in what is traced meanwhile."""
    import torch.nn.functional

    from sardonyx_export import cuda_functions

    functional: Any = torch.nn.functional
    replaced = {name: getattr(functional, name) for name in ("scaled_dot_product_attention", "group_norm")}
    try:
        for name in replaced:
            setattr(functional, name, getattr(cuda_functions, name))
        yield
    finally:
        for name, own in replaced.items():
            setattr(functional, name, own)


def fuse_activations(model: ir.Model) -> None:
    """Let group norms do the SiLU that follows them, ``x * sigmoid(x)``."""
    for node in list(model.graph):
        if (node.domain, node.op_type) != (MICROSOFT, "GroupNorm"):
            continue
        transposes = _users(node.outputs[0])
        if [user.op_type for user in transposes] != ["Transpose"]:
            continue
        x = transposes[0].outputs[0]
        users = {user.op_type: user for user in _users(x)}
        if set(users) != {"Sigmoid", "Mul"} or len(_users(x)) != 2:
            continue
        sigmoid, product = users["Sigmoid"], users["Mul"]
        is_silu = {*product.inputs} == {x, sigmoid.outputs[0]} and _users(sigmoid.outputs[0]) == [product]
        if is_silu and not product.outputs[0].is_graph_output():
            node.attributes["activation"] = ir.AttrInt64("activation", 1)
            ir.convenience.replace_all_uses_with(product.outputs[0], x)
            model.graph.remove([product, sigmoid], safe=True)


def _users(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def write_check_graph(path: Path) -> Path:
    """The same graph as one that the CPU runs: its group norms in parts, its weights those of the same data file.

    Args:
        path: of a graph for CUDA.

    Returns:
        The path of another file in the same folder, which whoever asked for it removes.
    """
    model = ir.load(path)
    for node in list(model.graph):
        if (node.domain, node.op_type) == (MICROSOFT, "GroupNorm"):
            _take_apart(model.graph, node)
    check = path.with_name(f"{path.stem}.check{path.suffix}")
    ir.save(model, check)
    return check


def _take_apart(graph: ir.Graph, node: ir.Node) -> None:
    """A group norm of (B, y, x, C) by ONNX's operators, in float32 as the kernel computes."""
    groups, epsilon = node.attributes["groups"].as_int(), node.attributes["epsilon"].as_float()
    x, gamma, beta = node.inputs
    made: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        made.append(ir.node(op, list(inputs), attributes=attributes))
        return made[-1].outputs[0]

    def constant(values: Any, dtype: type[np.generic]) -> ir.Value:
        return add("Constant", value=ir.tensor(np.array(values, dtype)))

    wide = add("Transpose", add("Cast", x, to=_FLOAT), perm=_TO_FIRST)
    by_group = add("Reshape", wide, constant([0, groups, -1], np.int64))
    ones, zeros = constant([1] * groups, np.float32), constant([0] * groups, np.float32)
    normed = add("InstanceNormalization", by_group, ones, zeros, epsilon=epsilon)
    channels_last = add("Transpose", add("Reshape", normed, add("Shape", wide)), perm=_TO_LAST)
    result = add("Add", add("Mul", channels_last, gamma), beta)
    if node.attributes["activation"].as_int():
        result = add("Mul", result, add("Sigmoid", result))
    result = add("CastLike", result, x)
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, [result])
