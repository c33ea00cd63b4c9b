"""ONNX Runtime's own operators in numpy: a decoder for CUDA runs in `onnx.reference` where there is no card.

Numbers are computed in float32 and rounded where an operator ends, to the type that the graph has there. Shares nothing
with the builders.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.external_data_helper import ExternalDataInfo
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sardonyx_export.stages.attention_operator import (
    MICROSOFT,
    Floats,
    PagedAttention,
    Tensor,
    given,
    present,
    rms_norm,
)


class MappedEvaluator(ReferenceEvaluator):
    """A graph whose weights stay on disk until a node reads them, ready to ``run(None, feeds)``.

    Caches are updated in place, as CUDA does: each ``present`` that comes back is the array that was given as past.
    bfloat16 is `ml_dtypes.bfloat16`.

    Args:
        path: of the graph, its external data beside it.
        operators: that the graph may have beside ONNX's own; ``None``: those of decoders.
    """

    def __init__(self, path: Path, operators: list[type[OpRun]] | None = None) -> None:
        self._folder = path.parent
        super().__init__(onnx.load(path, load_external_data=False), new_ops=operators or OPERATORS)

    @staticmethod
    def dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
        """Of an input or output."""
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))

    def retrieve_external_data(self, initializer: onnx.TensorProto) -> Tensor:
        """Called by onnx for each weight."""
        info = ExternalDataInfo(initializer)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type)
        shape = tuple(initializer.dims)
        return np.memmap(self._folder / info.location, dtype, mode="r", offset=info.offset or 0, shape=shape)


class SimplifiedLayerNormalization(OpRun):
    """RMS norm of the last axis."""

    op_domain = ""

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x, weight = inputs
        assert attributes.get("axis", -1) in (-1, x.ndim - 1)
        return (rms_norm(x, weight, attributes.get("epsilon", 1e-5)).astype(x.dtype),)


class SkipSimplifiedLayerNormalization(OpRun):
    """RMS norm of a sum, and the sum as fourth output."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x, skip, weight = inputs
        total = (x.astype(np.float32) + skip.astype(np.float32)).astype(x.dtype)
        empty = np.empty(0, np.float32)
        return rms_norm(total, weight, attributes.get("epsilon", 1e-12)).astype(x.dtype), empty, empty, total


class QuickGelu(OpRun):
    """``x * sigmoid(alpha * x)``."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x = inputs[0].astype(np.float32)
        # As tanh: exp would overflow for large negative x.
        sigmoid = 0.5 * (1 + np.tanh(0.5 * np.float32(attributes.get("alpha", 1.702)) * x))
        return ((x * sigmoid).astype(inputs[0].dtype),)


class FastGelu(OpRun):
    """GELU by its tanh formula."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x = inputs[0].astype(np.float32)
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
        return ((0.5 * x * (1 + np.tanh(inner))).astype(inputs[0].dtype),)


class Gemm(OpRun):
    """ONNX's own, in float32 whatever the datatype: onnx's adds 16-bit products up in 16 bits."""

    op_domain = ""

    def _run(self, *inputs: Tensor | None, **attributes: Any) -> tuple[Tensor, ...]:
        inputs = tuple(present(self, inputs))
        a, b = (given(x).astype(np.float32) for x in inputs[:2])
        a = a.T if attributes.get("transA") else a
        product = np.float32(attributes.get("alpha", 1.0)) * (a @ (b.T if attributes.get("transB") else b))
        if len(inputs) > 2 and inputs[2] is not None:
            product = product + np.float32(attributes.get("beta", 1.0)) * inputs[2].astype(np.float32)
        return (product.astype(given(inputs[0]).dtype),)


class MatMulNBits(OpRun):
    """A product with block-quantised weights of 4 or 8 bits; zero points packed, of the activations' type or none."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor | None, **attributes: Any) -> tuple[Tensor, ...]:
        named: list[Tensor | None] = [*present(self, inputs), *[None] * (6 - len(inputs))]
        x, bits, num_rows = given(named[0]), attributes["bits"], attributes["N"]
        codes, scales, zero_points, bias = *named[1:4], named[5]
        assert given(scales).dtype == x.dtype, "scales have the datatype of the activations"
        steps = _unpack(given(codes), bits).reshape(num_rows, -1, attributes["block_size"]).astype(np.float32)
        points: Floats = np.full(steps.shape[:2], 1 << (bits - 1), np.float32)
        if zero_points is not None and zero_points.dtype == x.dtype:
            points = zero_points.astype(np.float32)
        elif zero_points is not None:
            points = _unpack(zero_points, bits)[:, : steps.shape[1]].astype(np.float32)
        weights = (steps - points[..., None]) * given(scales).astype(np.float32).reshape(points.shape)[..., None]
        product = x.astype(np.float32) @ weights.reshape(num_rows, -1)[:, : attributes["K"]].T
        return ((product if bias is None else product + bias.astype(np.float32)).astype(x.dtype),)


class GatherBlockQuantized(OpRun):
    """Rows of a block-quantised table of 4 or 8 bits, with its default zero point."""

    op_domain = MICROSOFT

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        table, indices, scales = inputs
        bits, block_size = attributes["bits"], attributes["block_size"]
        assert (attributes.get("gather_axis", 0), attributes.get("quantize_axis", 1)) == (0, 1)
        steps = _unpack(table[indices], bits).astype(np.float32) - (1 << (bits - 1))
        wide = np.repeat(scales[indices].astype(np.float32), block_size, axis=-1)[..., : steps.shape[-1]]
        return ((steps * wide).astype(scales.dtype),)


OPERATORS: list[type[OpRun]] = [
    PagedAttention,
    SimplifiedLayerNormalization,
    SkipSimplifiedLayerNormalization,
    QuickGelu,
    FastGelu,
    Gemm,
    MatMulNBits,
    GatherBlockQuantized,
]


def _unpack(packed: Tensor, bits: int) -> npt.NDArray[np.uint8]:
    """Codes along the last axis; of 4 bits, the low half first."""
    assert bits in (4, 8), f"not implemented: {bits} bits"
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
