"""The nodes of activation functions, and how low each of them reaches."""

from collections.abc import Mapping
from typing import Any

from sardonyx_export.builders.graph import MICROSOFT, GraphWriter
from sardonyx_export.encoder_spec import Activation

LOWEST: Mapping[Activation, float] = {
    "gelu": -0.17,
    "gelu_tanh": -0.1701,
    "relu": 0.0,
    "silu": -0.2785,
}
"""Of the functions whose results are mostly small, with a few large ones: a number just under their minimum."""

# ``QuickGelu`` is x * sigmoid(alpha * x).
_OPERATORS: Mapping[Activation, tuple[str, str, dict[str, Any]]] = {
    "gelu": ("Gelu", "", {}),
    "gelu_tanh": ("Gelu", "", {"approximate": "tanh"}),
    "relu": ("Relu", "", {}),
    "silu": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
    "tanh": ("Tanh", "", {}),
    "sigmoid": ("Sigmoid", "", {}),
}
# These add a vector on the way.
_WITH_BIAS: Mapping[Activation, str] = {"gelu": "BiasGelu", "gelu_tanh": "FastGelu"}


def activate(graph: GraphWriter, kind: Activation, x: str, output: str, *, bias: str = "") -> str:
    """``kind(x + bias)``, of x's shape.

    Args:
        graph: receives the nodes.
        kind: of function.
        x: name of the input.
        output: name of the result; the identity without bias gives `x` itself.
        bias: name of a vector as long as x's last axis, or empty.
    """
    if bias and kind in _WITH_BIAS:
        return graph.node(_WITH_BIAS[kind], [x, bias], output, domain=MICROSOFT)
    if kind == "identity":
        return graph.node("Add", [x, bias], output) if bias else x
    if bias:
        x = graph.node("Add", [x, bias], f"{output}.biased")
    operator, domain, attributes = _OPERATORS[kind]
    return graph.node(operator, [x], output, domain=domain, **attributes)
