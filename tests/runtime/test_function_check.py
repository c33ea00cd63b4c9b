from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from tests import tiny_tensors

from sardonyx.errors import ConfigError
from sardonyx.runtime.function_check import check_functions
from sardonyx.runtime.session import open_session


def function(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    """y = nodes(x)."""
    opsets = [helper.make_opsetid("", tiny_tensors.OPSET), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["x"], ["y"], nodes, opsets)


def chain(kinds: list[str], *, domain: str = "own") -> list[onnx.NodeProto]:
    """Nodes one behind the other, from x to y; plain operators begin with a capital letter."""
    names = ["x", *(f"t{n}" for n in range(len(kinds) - 1)), "y"]
    return [
        helper.make_node(kind, [names[n]], [names[n + 1]], domain="" if kind[0].isupper() else domain)
        for n, kind in enumerate(kinds)
    ]


def write(tmp_path: Path, last: str, *functions: onnx.FunctionProto) -> Path:
    port = ("FP32", (1,))
    node = helper.make_node(last, ["INPUT0"], ["OUTPUT0"], domain="own")
    model = tiny_tensors.graph([node], [("INPUT0", *port)], [("OUTPUT0", *port)], domains=("own",))
    model.functions.extend(functions)
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_tensors.serialize(model))
    return path


def doubling(count: int) -> list[onnx.FunctionProto]:
    """f0 is Neg twice; each of the others calls the one before twice."""
    return [function(f"f{n}", chain([f"f{n - 1}" if n else "Neg"] * 2)) for n in range(count)]


def test_functions_that_are_called_often_are_fine(tmp_path):
    path = write(tmp_path, "outer", function("inner", chain(["Neg"] * 3)), function("outer", chain(["inner"] * 11)))
    check_functions(path)
    session = open_session(path, model_name="m")
    assert session.run({"INPUT0": np.ones((1, 1), np.float32)})["OUTPUT0"].tolist() == [[-1.0]]


@pytest.mark.parametrize("count", [17, 40, 90])
def test_functions_that_unfold_without_end_are_refused_at_once(tmp_path, count):
    with pytest.raises(ConfigError, match=r"model\.onnx: has functions that unfold to more than 100,000 nodes"):
        open_session(write(tmp_path, f"f{count - 1}", *doubling(count)), model_name="m")


def test_calls_inside_of_branches_count(tmp_path):
    branch = helper.make_graph(
        [helper.make_node(f"f{n}", ["x"], [f"b{n}"], domain="own") for n in (15, 15)],
        "branch",
        [],
        [helper.make_tensor_value_info("b15", 1, None)],
    )
    condition = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", onnx.TensorProto.BOOL, [], [1]))
    chosen = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    path = write(tmp_path, "top", *doubling(16), function("top", [condition, chosen]))
    with pytest.raises(ConfigError, match="unfold"):
        check_functions(path)


@pytest.mark.parametrize(
    "functions",
    [
        [function("f", chain(["f"]))],
        [function("f", chain(["g"])), function("g", chain(["f"]))],
        [function("f" if n == 149 else f"f{n}", chain([f"f{n - 1}" if n else "Neg"])) for n in range(150)],
    ],
)
def test_functions_that_call_themselves_or_too_deep_are_refused(tmp_path, functions):
    with pytest.raises(ConfigError, match=r"model\.onnx: has functions that call each other more than 100 deep"):
        check_functions(write(tmp_path, "f", *functions))


def test_unused_functions_do_not_count(tmp_path):
    check_functions(write(tmp_path, "plain", function("plain", chain(["Neg"])), *doubling(40)))
