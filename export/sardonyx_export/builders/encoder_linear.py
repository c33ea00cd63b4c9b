"""Linear layers of an encoder: products of floats or integers, their biases left to operators that add them free."""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.weights import WeightWriter

_BITS = 7
# Of matrices whose input has a lower bound: activations, mostly small, so that AVX2's sums of two products hardly ever
# leave int16. Of all-MiniLM-L6-v2 and 60 texts, 1 to 2 sums of 10,000 differ from exact ones, by 2 % of the largest at
# most. The worst cosine of 120 embeddings to float32's is 0.9940 with this kernel and with an exact one (uint8 weights,
# a fifth slower), and 0.9861 with 7 bits.
_SHIFTED_BITS = 8


class Linear(msgspec.Struct, frozen=True, kw_only=True):
    """A linear layer of the checkpoint."""

    name: str
    """In the graph."""
    tensors: Sequence[str]
    """Names before ``.weight`` and ``.bias``, stacked in this order."""
    num_rows: int
    """Of the stack: the layer's outputs."""
    num_columns: int
    has_bias: bool


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """What a linear layer gave."""

    values: str
    """(T, out)"""
    bias: str = ""
    """A vector (out) that is still to be added; empty: none."""


class EncoderLinears:
    """Adds linear layers to a graph.

    Args:
        graph: receives the nodes.
        weights: of the checkpoint.
        linears: adds the products.
        is_quantised: by integer products of rounded rows of float32; else of the weights' own type of floats.
    """

    def __init__(self, graph: GraphWriter, weights: WeightWriter, linears: Linears, *, is_quantised: bool) -> None:
        self._graph = graph
        self._weights = weights
        self._linears = linears
        self._is_quantised = is_quantised

    def apply(self, x: str, linear: Linear, *, lowest: float | None = None) -> Product:
        """One layer: (T, in) → (T, out).

        Args:
            x: name of the input.
            linear: the layer.
            lowest: a number that no value of x falls below; ``None``: not known. At most 0.
        """
        if not self._is_quantised:
            bias = self._bias(linear)
            bits, size = self._weights.float_bits, (linear.num_rows, linear.num_columns)
            matrix = self._weights.matrix(linear.name, _weights(linear), *size, bits=bits)
            return Product(values=self._linears.apply(x, matrix, bias=bias))
        if lowest is None:
            bias = self._bias(linear)
            matrix, _ = self._weights.channels(
                linear.name, _weights(linear), linear.num_rows, linear.num_columns, _BITS
            )
            return Product(values=self._linears.apply(x, matrix), bias=bias)
        matrix, sums = self._weights.channels(
            linear.name, _weights(linear), linear.num_rows, linear.num_columns, _SHIFTED_BITS
        )
        return Product(
            values=self._linears.apply_shifted(x, -lowest, matrix),
            bias=self._shifted_bias(linear, np.float32(lowest) * sums),
        )

    def add_bias(self, product: Product) -> str:
        """The layer's result, for operators that add no bias."""
        if not product.bias:
            return product.values
        return self._graph.node("Add", [product.values, product.bias], f"{product.values}.biased")

    def _bias(self, linear: Linear) -> str:
        if not linear.has_bias:
            return ""
        return self._weights.vector([f"{tensor}.bias" for tensor in linear.tensors], linear.num_rows)

    def _shifted_bias(self, linear: Linear, offset: npt.NDArray[np.float32]) -> str:
        if linear.has_bias:
            return self._weights.vector([f"{linear.tensors[0]}.bias"], linear.num_rows, offset=offset)
        return self._graph.weight(f"{linear.name}.offset", np.float32, offset.shape, [offset])


def _weights(linear: Linear) -> list[str]:
    return [f"{tensor}.weight" for tensor in linear.tensors]
