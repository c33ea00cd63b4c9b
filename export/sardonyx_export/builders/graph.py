"""An ONNX graph under construction: nodes in memory, weights straight to the external data file.

Owns a graph's two files, ``model.onnx`` and ``model.onnx.data`` by default, and knows nothing of models. A weight is
written as soon as it is handed over and never held, so that an export needs memory for one tensor, not for the model.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

MODEL_FILE = "model.onnx"

MICROSOFT = "com.microsoft"
_OPSET = 21
_MICROSOFT_OPSET = 1
_IR_VERSION = 10
# ONNX Runtime maps external tensors into memory; for that the ONNX specification asks for offsets on page borders.
_PAGE_BYTES = 4096
_SMALL_BYTES = 1 << 16
_SMALL_ALIGNMENT = 64


class GraphWriter:
    """Collects nodes and streams weights; `save` writes the graph. Use it as a context manager.

    Args:
        folder: where the two files go; it exists and holds neither.
        file_name: of the graph; the data file's is this and ``.data``.
        lender: a graph of the same folder that holds all weights of this one under the same names, so that both have
            one data file. ``None``: this graph has its own.
        opset: of ONNX's own operators.
    """

    def __init__(
        self,
        folder: Path,
        file_name: str = MODEL_FILE,
        *,
        lender: "GraphWriter | None" = None,
        opset: int = _OPSET,
    ) -> None:
        self._opset = opset
        self._path = folder / file_name
        self._lender = lender
        self._data_path: Path = folder / f"{file_name}.data" if lender is None else lender._data_path
        self._data = self._data_path.open("xb" if lender is None else "rb")
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declare a graph input; a string in `shape` is a free dimension of that name."""
        self._inputs.append(helper.make_tensor_value_info(name, element_type(dtype), list(shape)))
        return name

    def output(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declare a graph output, which a node must produce under this name."""
        self._outputs.append(helper.make_tensor_value_info(name, element_type(dtype), list(shape)))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output's name.

        Args:
            op: operator.
            inputs: names; an empty one skips an optional input.
            output: name of the result, and of the node.
            domain: of the operator.
            attributes: whatever the operator has, hence ``Any``.
        """
        return self.node_with_outputs(op, inputs, [output], domain=domain, **attributes)[0]

    def node_with_outputs(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> Sequence[str]:
        """Add a node with several outputs; it takes the first one's name. An empty output is not computed."""
        inputs = list(inputs)
        while not inputs[-1]:
            inputs.pop()
        self._nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """A small initializer kept inside the graph file. The same name twice is the same constant."""
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int], pieces: Iterable[npt.NDArray[Any]]) -> str:
        """Append an initializer to the data file, piece after piece.

        Args:
            name: of the initializer, new to this graph.
            dtype: numpy's type of the whole.
            shape: of the whole.
            pieces: row-major parts in order, together exactly `shape`; each is written before the next is asked for.
                Where the weight is lent, none is asked for.
        """
        assert name not in self._initializers, name
        dtype = np.dtype(dtype)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self._lender is not None:
            lent = self._lender._initializers[name]
            assert (lent.data_type, list(lent.dims)) == (element_type(dtype), list(shape)), name
            self._initializers[name] = lent
            return name
        alignment = _PAGE_BYTES if num_bytes >= _SMALL_BYTES else _SMALL_ALIGNMENT
        start = -(-self._data.tell() // alignment) * alignment
        self._data.write(bytes(start - self._data.tell()))
        for piece in pieces:
            assert piece.dtype == dtype, (name, piece.dtype, dtype)
            # As bytes: bfloat16 is no type that Python's buffers know.
            self._data.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        assert self._data.tell() - start == num_bytes, (name, self._data.tell() - start, num_bytes)
        self._initializers[name] = _external_tensor(self._data_path.name, name, dtype, shape, start, num_bytes)
        return name

    def share(self, name: str, source: str, shape: Sequence[int]) -> str:
        """Another initializer over the bytes of weight `source`, under another shape. Costs nothing in the file."""
        tensor = TensorProto()
        tensor.CopyFrom(self._initializers[source])
        tensor.name = name
        tensor.dims[:] = shape
        self._initializers[name] = tensor
        return name

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        """Give a weight another shape over the same bytes."""
        self._initializers[name].dims[:] = shape
        return name

    def save(self, graph_name: str) -> list[Path]:
        """Write the graph file and return both files' paths."""
        if self._lender is None:
            self._data.flush()
        graph = helper.make_graph(
            self._nodes, graph_name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", self._opset), helper.make_opsetid(MICROSOFT, _MICROSOFT_OPSET)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="sardonyx", doc_string=""
        )
        self._path.write_bytes(model.SerializeToString())
        return [self._path, self._data_path]


def element_type(dtype: npt.DTypeLike) -> int:
    """ONNX's number for a type of numpy or ml_dtypes."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _external_tensor(
    file_name: str, name: str, dtype: np.dtype[Any], shape: Sequence[int], offset: int, length: int
) -> TensorProto:
    tensor = TensorProto(name=name, data_type=element_type(dtype), dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file_name), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
