"""Scales, zero points and offsets of one block-quantised matrix: gathered as its codes go to disk, written behind them.

They are an eighth of the codes or less.
"""

import numpy as np
import numpy.typing as npt

from sardonyx_export.builders.blocks import Blocks, default_zero_point, pack
from sardonyx_export.builders.floats import DTYPES, FloatKind, as_floats
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.errors import ExportError

Floats = npt.NDArray[np.float32]


class BlockScales:
    """Gathers them.

    Where blocks have offsets, these become an own matrix in a float32 graph, for CPU's MatMulNBits takes whole zero
    points only; CUDA's takes any, so in a 16-bit graph they go into the zero points.

    Args:
        bits: of the codes.
        floats: type of the scales.
        has_offsets: some of the blocks have them.
    """

    def __init__(self, bits: int, floats: FloatKind, *, has_offsets: bool) -> None:
        self._bits = bits
        self._floats: FloatKind = floats
        self._has_offsets = has_offsets
        self._scales: list[Floats] = []
        self._points: list[npt.NDArray[np.uint8]] = []
        self._float_points: list[Floats] = []
        self._offsets: list[Floats] = []

    def add(self, blocks: Blocks, factor: np.float32, tensor_name: str) -> None:
        """The next rows. Call it before the codes are written, since it may change those of a flat block.

        Args:
            blocks: of some rows.
            factor: multiplies all weights.
            tensor_name: for messages.

        Raises:
            ExportError: a scale is infinite or no number.
        """
        scales = blocks.scales
        if not np.isfinite(scales).all():
            raise ExportError("holds a scale that is infinite or no number", field=tensor_name)
        if self._has_offsets and self._floats != "fp32":
            points = blocks.zero_points.astype(np.float32)
            if blocks.offsets is not None:
                scales, points = blocks.with_float_zero_points()
            self._float_points.append(points)
        elif self._has_offsets:
            self._offsets.append(np.zeros_like(scales) if blocks.offsets is None else blocks.offsets * factor)
        self._points.append(blocks.zero_points)
        self._scales.append(scales * factor)

    def write(self, graph: GraphWriter, name: str, num_rows: int, num_blocks: int) -> tuple[str, str, str]:
        """Names of scales, zero points and offsets; an empty one where there are none."""
        # A lent matrix (see `GraphWriter`) was never added to, and still has all but whole zero points.
        scales = self._write_floats(graph, f"{name}.scales", self._scales, num_rows, num_blocks)
        if not self._has_offsets:
            return scales, self._write_points(graph, name, num_rows, num_blocks), ""
        if self._floats == "fp32":
            points = self._write_points(graph, name, num_rows, num_blocks)
            return scales, points, self._write_floats(graph, f"{name}.offsets", self._offsets, num_rows, num_blocks)
        points = self._write_floats(graph, f"{name}.zero_points", self._float_points, num_rows, num_blocks)
        return scales, points, ""

    def _write_floats(self, graph: GraphWriter, name: str, parts: list[Floats], num_rows: int, num_blocks: int) -> str:
        pieces = (as_floats(part, self._floats, name) for part in parts)
        return graph.weight(name, DTYPES[self._floats], (num_rows, num_blocks), pieces)

    def _write_points(self, graph: GraphWriter, name: str, num_rows: int, num_blocks: int) -> str:
        """Whole zero points, unless all are the kernel's default."""
        if all((part == default_zero_point(self._bits)).all() for part in self._points):
            return ""
        shape = (num_rows, -(-num_blocks * self._bits // 8))
        pieces = (pack(part, self._bits) for part in self._points)
        return graph.weight(f"{name}.zero_points", np.uint8, shape, pieces)
