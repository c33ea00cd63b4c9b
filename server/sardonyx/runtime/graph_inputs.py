"""The inputs that a model file declares, read without opening a session.

Floor 2. TensorRT builds an engine while a session is opened, and wants to know before for which shapes.

Source: onnx.proto (ModelProto, GraphProto, ValueInfoProto, TypeProto, TensorShapeProto).
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.runtime.external_data import GraphReader

_GRAPH, _NODE, _INITIALIZER, _INPUT, _OUTPUT = 7, 1, 5, 11, 12
_OPERATOR = 4  # of a node
_NAME, _TYPE = 1, 2  # of a ValueInfoProto
_INITIALIZER_NAME = 8
_TENSOR_TYPE, _ELEMENT_TYPE, _SHAPE, _DIM, _DIM_VALUE = 1, 1, 2, 1, 1
_CONTEXT = b"EPContext"


class DeclaredTensor(msgspec.Struct, frozen=True):
    """An input or output of a graph."""

    name: str
    element_type: int
    """ONNX's number."""
    dims: tuple[int, ...]
    """-1 where any size goes."""
    is_initializer: bool = False
    """An input with a value of its own, which a run may override."""


class DeclaredGraph(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of its graph."""

    inputs: list[DeclaredTensor]
    outputs: list[DeclaredTensor]
    is_compiled: bool
    """It holds an engine, or names one, in place of operators."""


def read_graph(path: Path) -> DeclaredGraph:
    """Read the declarations of a model file that `check_external_data` has passed.

    Raises:
        ConfigError: no ONNX model, or inputs that are no tensors.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(GraphReader(data), len(data))
    except ConfigError as error:
        raise ConfigError(error.reason, file=path.name) from None
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        raise ConfigError("cannot be read", file=path.name) from error


def _read(reader: GraphReader, size: int) -> DeclaredGraph:
    inputs: list[DeclaredTensor] = []
    outputs: list[DeclaredTensor] = []
    initializers, operators = set(), set()
    for number, start, end in reader.fields(0, size):
        if number != _GRAPH:
            continue
        for inner, inner_start, inner_end in reader.fields(start, end):
            if inner in (_INPUT, _OUTPUT):
                (inputs if inner == _INPUT else outputs).append(_tensor(reader, inner_start, inner_end))
            elif inner == _INITIALIZER:
                initializers.add(_text(reader, _INITIALIZER_NAME, inner_start, inner_end))
            elif inner == _NODE:
                operators.add(_text(reader, _OPERATOR, inner_start, inner_end))
    named = [msgspec.structs.replace(each, is_initializer=each.name.encode() in initializers) for each in inputs]
    return DeclaredGraph(inputs=named, outputs=outputs, is_compiled=_CONTEXT in operators)


def _tensor(reader: GraphReader, start: int, end: int) -> DeclaredTensor:
    name = _text(reader, _NAME, start, end)
    element_type, dims = 0, []
    for type_start, type_end in _messages(reader, _TYPE, start, end):
        for tensor_start, tensor_end in _messages(reader, _TENSOR_TYPE, type_start, type_end):
            element_type = reader.number(_ELEMENT_TYPE, tensor_start, tensor_end) or 0
            for shape_start, shape_end in _messages(reader, _SHAPE, tensor_start, tensor_end):
                dims = [
                    reader.number(_DIM_VALUE, dim_start, dim_end)
                    for dim_start, dim_end in _messages(reader, _DIM, shape_start, shape_end)
                ]
    if not element_type:
        raise ConfigError(f"{name.decode(errors='replace')!r} is no tensor")
    try:
        return DeclaredTensor(name.decode(), element_type, tuple(dim if dim else -1 for dim in dims))
    except UnicodeDecodeError:
        raise ConfigError("names an input or an output in other bytes than UTF-8") from None


def _messages(reader: GraphReader, wanted: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    for number, inner_start, inner_end in reader.fields(start, end):
        if number == wanted:
            yield inner_start, inner_end


def _text(reader: GraphReader, wanted: int, start: int, end: int) -> bytes:
    text = b""
    for inner_start, inner_end in _messages(reader, wanted, start, end):
        text = reader.data(inner_start, inner_end)
    return text
