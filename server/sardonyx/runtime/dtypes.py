"""Tensor element types by all their names: KServe's, numpy's, ONNX's and ONNX Runtime's.

Floor 2. One table; every other file looks names up here.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sardonyx.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Datatype:
    """One element type."""

    name: str
    """KServe's: ``FP32``, ``BYTES``. The word used everywhere else in the project."""
    array: np.dtype[np.generic]
    """What host arrays hold. BF16 travels as its bits in uint16, since numpy has no such type; BYTES as objects."""
    element_type: int
    """``onnx.TensorProto.DataType``."""
    ort_name: str
    """What ONNX Runtime calls a tensor of it."""


def _datatype(name: str, array: npt.DTypeLike, element_type: int, ort_name: str) -> Datatype:
    return Datatype(name=name, array=np.dtype(array), element_type=element_type, ort_name=f"tensor({ort_name})")


DATATYPES: dict[str, Datatype] = {
    datatype.name: datatype
    for datatype in (
        _datatype("BOOL", np.bool_, 9, "bool"),
        _datatype("UINT8", np.uint8, 2, "uint8"),
        _datatype("UINT16", np.uint16, 4, "uint16"),
        _datatype("UINT32", np.uint32, 12, "uint32"),
        _datatype("UINT64", np.uint64, 13, "uint64"),
        _datatype("INT8", np.int8, 3, "int8"),
        _datatype("INT16", np.int16, 5, "int16"),
        _datatype("INT32", np.int32, 6, "int32"),
        _datatype("INT64", np.int64, 7, "int64"),
        _datatype("FP16", np.float16, 10, "float16"),
        _datatype("FP32", np.float32, 1, "float"),
        _datatype("FP64", np.float64, 11, "double"),
        _datatype("BF16", np.uint16, 16, "bfloat16"),
        _datatype("BYTES", np.object_, 8, "string"),
    )
}
"""By KServe's name.

Source: KServe V2 protocol, "Tensor Data Types"; onnx.proto, TensorProto.DataType.
"""

FP8 = _datatype("FP8", np.uint8, 17, "float8e4m3fn")
"""e4m3, as its bits in uint8. For KV caches on CUDA; KServe has no such datatype, so no tensor is served in it."""
KV_DATATYPES = {name: DATATYPES[name] for name in ("FP32", "FP16", "BF16", "INT8")} | {FP8.name: FP8}
"""What a KV cache may hold, by name."""

_BY_ORT_NAME = {datatype.ort_name: datatype for datatype in (*DATATYPES.values(), FP8)}


def from_ort_name(ort_name: str) -> Datatype:
    """The datatype of a session's input or output.

    Raises:
        ConfigError: it is no tensor (a sequence, a map, an optional), or of an element type that neither the protocol
            nor a KV cache has.
    """
    try:
        return _BY_ORT_NAME[ort_name]
    except KeyError:
        raise not_served(ort_name) from None


def not_served(ort_name: str) -> ConfigError:
    """What is said of an input or output whose type the protocol lacks."""
    return ConfigError(f"type {ort_name} cannot be served; tensors of {', '.join(DATATYPES)} can")
