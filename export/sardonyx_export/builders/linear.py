"""The nodes of linear layers, by how their matrix is stored.

Whole matrices go through Gemm, which takes them as they lie in a checkpoint, (out, in). Those of 7 bits go through
MatMulIntegerToFloat, see `Linears._multiply_rows`. Others go through MatMulNBits, whose CPU kernels compute in two ways
(ONNX Runtime 1.32, ``matmul_nbits.cc``):

- rounding activations to int8 in blocks (accuracy level 4): the only one for 8-bit weights;
- keeping them in fp32 (accuracy level 1): 4-bit weights only.

Where exact activations are asked for, 8-bit weights get them from two passes of the first kind, see `Linears._split`.

CUDA's kernels keep 16-bit activations as they are and know no levels.
"""

import numpy as np

from sardonyx_export.builders.floats import FloatKind
from sardonyx_export.builders.graph import MICROSOFT, GraphWriter
from sardonyx_export.builders.weights import Matrix

_SAME_ACTIVATIONS, _FP32_ACTIVATIONS, _INT8_ACTIVATIONS = 0, 1, 4


class Linears:
    """Adds linear layers to a graph.

    Args:
        graph: receives the nodes.
        block_size: of all quantised matrices.
        has_exact_activations: activations keep their float32 precision.
        floats: type of the activations.
    """

    def __init__(
        self, graph: GraphWriter, block_size: int, *, has_exact_activations: bool, floats: FloatKind = "fp32"
    ) -> None:
        self._graph = graph
        self._block_size = block_size
        self._is_exact = has_exact_activations and floats == "fp32"
        self._floats: FloatKind = floats
        self._derived: set[str] = set()

    def apply(self, x: str, matrix: Matrix, *, bias: str = "", output: str | None = None) -> str:
        """``x @ matrix.T + bias``: (T, in) → (T, out).

        Args:
            x: name of the input.
            matrix: its initializers.
            bias: name of a vector (out), or empty.
            output: name of the result; by default the matrix's.
        """
        output = output or matrix.name
        if matrix.is_whole:
            return self._graph.node("Gemm", [x, matrix.codes, bias], output, transB=1)
        if matrix.bits == 7:
            return self._multiply_rows(x, matrix, bias, output)
        if self._is_exact and matrix.bits == 8 and matrix.num_columns % self._block_size == 0:
            return self._in_two_passes(x, matrix, bias, output)
        if not matrix.offsets:
            return self._multiply(x, matrix, bias, output)
        # The offset of a block times the sum of the activations there: a product of rank in / block_size, in fp32.
        product = self._multiply(x, matrix, bias, output + ".blocks")
        sums = self._block_sums(x, matrix.num_columns)
        return self._graph.node("Gemm", [sums, matrix.offsets, product], output, transB=1)

    def _multiply(self, x: str, matrix: Matrix, bias: str, output: str) -> str:
        level = _FP32_ACTIVATIONS if self._is_exact and matrix.bits == 4 else _INT8_ACTIVATIONS
        level = level if self._floats == "fp32" else _SAME_ACTIVATIONS
        return self._graph.node(
            "MatMulNBits",
            [x, matrix.codes, matrix.scales, matrix.zero_points, "", bias],
            output,
            domain=MICROSOFT,
            K=matrix.num_columns,
            N=matrix.num_rows,
            bits=matrix.bits,
            block_size=self._block_size,
            accuracy_level=level,
        )

    def _multiply_rows(self, x: str, matrix: Matrix, bias: str, output: str) -> str:
        """An integer product: uint8 rows, each as a share of its own maximum, by int8 weights.

        The kernel knows one scale for all rows, so each row's maximum is multiplied in behind it. What a row becomes
        depends on no other row.
        """
        rounded = self._rounded_rows(x)
        if not bias:
            return self._multiply_rounded(rounded, matrix, output)
        return self._graph.node("Add", [self._multiply_rounded(rounded, matrix, output + ".unbiased"), bias], output)

    def apply_shifted(self, x: str, shift: float, matrix: Matrix) -> str:
        """``(x + shift) @ matrix.T`` for x that is nowhere below ``-shift``: (T, in) float32 → (T, out).

        Such rows need no sign, so they are rounded twice as finely as `apply` rounds rows for an integer product. The
        caller takes ``shift`` times the matrix's row sums off the bias.

        Args:
            x: name of the input.
            shift: at least 0.
            matrix: 7 or 8 bits by channel.
        """
        return self._multiply_rounded(self._shifted_rows(x, shift), matrix, matrix.name)

    def _multiply_rounded(self, rounded: tuple[str, str, str, str], matrix: Matrix, output: str) -> str:
        rows, maxima, step, middle = rounded
        shares = self._graph.node(
            "MatMulIntegerToFloat",
            [rows, matrix.codes, step, matrix.scales, middle],
            output + ".shares",
            domain=MICROSOFT,
        )
        return self._graph.node("Mul", [shares, maxima], output)

    def _shifted_rows(self, x: str, shift: float) -> tuple[str, str, str, str]:
        """As `_rounded_rows`, of x + shift, in 255 steps from 0 to the row's maximum."""
        graph = self._graph
        step = graph.constant("shifted_rows.step", np.array(1 / 255, np.float32))
        bottom = graph.constant("shifted_rows.bottom", np.array(0, np.uint8))
        rows, maxima = x + ".rounded_rows", x + ".row_maxima"
        if rows not in self._derived:
            self._derived.add(rows)
            axis = graph.constant("axis.in_row", np.array([-1], np.int64))
            if shift:
                x = graph.node(
                    "Add", [x, graph.constant(f"shift.{shift}", np.array(shift, np.float32))], x + ".shifted"
                )
            graph.node("ReduceMax", [x, axis], maxima, keepdims=1)
            graph.node("QuantizeLinear", [graph.node("Div", [x, maxima], x + ".row_shares"), step, bottom], rows)
        return rows, maxima, step, bottom

    def _rounded_rows(self, x: str) -> tuple[str, str, str, str]:
        """(T, in) float32 → (T, in) uint8 and the rows' largest magnitudes (T, 1), for all matrices that read x.

        A row of zeros divides 0 by 0. No node guards against that: whatever bytes come of it, their product is finite
        and then multiplied by the row's maximum, 0.

        Returns:
            Names of rows, maxima, scale and zero point.
        """
        graph = self._graph
        step = graph.constant("rows.step", np.array(1 / 127, np.float32))
        middle = graph.constant("rows.middle", np.array(128, np.uint8))
        rows, maxima = x + ".rounded_rows", x + ".row_maxima"
        if rows not in self._derived:
            self._derived.add(rows)
            axis = graph.constant("axis.in_row", np.array([-1], np.int64))
            graph.node("ReduceMax", [graph.node("Abs", [x], x + ".magnitudes"), axis], maxima, keepdims=1)
            graph.node("QuantizeLinear", [graph.node("Div", [x, maxima], x + ".row_shares"), step, middle], rows)
        return rows, maxima, step, middle

    def _block_sums(self, x: str, num_columns: int) -> str:
        """(T, in) → (T, in / block_size): the sum of each block. One for all matrices that read x."""
        sums = x + ".block_sums"
        if sums not in self._derived:
            self._derived.add(sums)
            shape = np.array([-1, num_columns // self._block_size, self._block_size], np.int64)
            shape_name = self._graph.constant(f"shape.blocks_of.{num_columns}", shape)
            blocks = self._graph.node("Reshape", [x, shape_name], x + ".in_blocks")
            axis = self._graph.constant("axis.in_block", np.array([2], np.int64))
            self._graph.node("ReduceSum", [blocks, axis], sums, keepdims=0)
        return sums

    def _in_two_passes(self, x: str, matrix: Matrix, bias: str, output: str) -> str:
        """The kernel rounds its input, so it is given the input and, as further rows, what the rounding lost.

        Of the second part at most 1/254th is lost again. On one row this costs little, as the weights are read once.
        """
        both = self._split(x, matrix.num_columns)
        products = self._multiply(both, matrix, "", output + ".passes")
        halves = [output + ".pass_0", output + ".pass_1"]
        self._graph.node_with_outputs("Split", [products], halves, axis=0, num_outputs=2)
        if not bias:
            return self._graph.node("Add", halves, output)
        return self._graph.node("Add", [self._graph.node("Add", halves, output + ".unbiased"), bias], output)

    def _split(self, x: str, num_columns: int) -> str:
        """(T, in) → (2T, in): x, and below it x minus what the kernel makes of x.

        How the kernel rounds is asked of the kernel itself: a product with the identity, one block wide. So this stays
        right on processors whose kernels round differently, or not at all.
        """
        both = x + ".split"
        if both in self._derived:
            return both
        self._derived.add(both)
        graph, size = self._graph, self._block_size
        codes = np.full((size, 1, size), 128, np.uint8)
        codes[np.arange(size), 0, np.arange(size)] += 1
        identity = Matrix(
            name="identity",
            num_rows=size,
            num_columns=size,
            bits=8,
            codes=graph.constant("identity.codes", codes),
            scales=graph.constant("identity.scales", np.ones((size, 1), np.float32)),
        )
        blocks_shape = graph.constant("shape.block_rows", np.array([-1, size], np.int64))
        rows_shape = graph.constant(f"shape.rows_of.{num_columns}", np.array([-1, num_columns], np.int64))
        blocks = graph.node("Reshape", [x, blocks_shape], x + ".block_rows")
        rounded = self._multiply(blocks, identity, "", x + ".rounded")
        lost = graph.node("Sub", [blocks, rounded], x + ".lost")
        stacked = graph.node("Concat", [blocks, lost], x + ".stacked", axis=0)
        return graph.node("Reshape", [stacked, rows_shape], both)
