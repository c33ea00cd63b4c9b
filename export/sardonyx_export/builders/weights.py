"""A checkpoint's tensors as a graph's initializers: read one at a time, converted in chunks of rows, written at once.

Decides what becomes of each stored format and keeps account of it for the manifest. Adds no node.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx_export.builders import gguf_blocks
from sardonyx_export.builders.block_scales import BlockScales
from sardonyx_export.builders.blocks import Blocks, fit, fit_channels, pack, widen
from sardonyx_export.builders.floats import DTYPES, FloatKind, as_floats
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.checkpoint import Checkpoint, StoredTensor
from sardonyx_export.errors import ExportError

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
MatrixKind = Precision | Literal["int7_channels"]
"""``int7_channels``: 7 bits and one scale for a row of the matrix, an output channel."""
Progress = Callable[[int, int], None]

_BITS: dict[MatrixKind, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4, "int7_channels": 7}
# CUDA's product of 16-bit activations with blocks (ONNX Runtime 1.32, ``fpA_intB``) wants the out axis in steps of:
_FUSED_ROWS = {8: 32, 4: 64}
# Block formats whose writer spent more than 4 bits on a tensor, because it is worth them: int4 keeps it at 8.
_FINE_FORMATS = ("Q5_", "Q6_", "Q8_")
# Weights converted at once: numpy's passes over them stay in the processor's cache (a quarter faster than 1 << 22).
_CHUNK_WEIGHTS = 1 << 18


class Matrix(msgspec.Struct, frozen=True, kw_only=True):
    """A weight matrix inside the graph, (out, in): names of its initializers."""

    name: str
    num_rows: int
    num_columns: int
    bits: int
    """32 or 16: `codes` are the weights themselves. 7: `codes` are int8 as (in, out), `scales` are (out)."""
    codes: str
    scales: str = ""
    zero_points: str = ""
    """Empty: the kernel's default."""
    offsets: str = ""
    """(out, blocks) float32, added to all weights of a block; empty: none."""

    @property
    def is_whole(self) -> bool:
        """`codes` are the weights themselves."""
        return self.bits in (16, 32)


class WeightWriter:
    """Writes weights and remembers which were read.

    Args:
        graph: receives the initializers.
        checkpoint: holds the tensors.
        block_size: weights that share a scale.
        progress: called with the number of weights written and of all; may be ``None``.
        floats: what the graph computes in: the type of whole weights and of scales.
    """

    def __init__(
        self,
        graph: GraphWriter,
        checkpoint: Checkpoint,
        block_size: int,
        progress: Progress | None = None,
        *,
        floats: FloatKind = "fp32",
    ) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._block_size = block_size
        self._progress = progress
        self._floats: FloatKind = floats
        self._num_written = 0
        self._num_weights = sum(math.prod(checkpoint.tensor(name).shape) for name in checkpoint.names())
        self._outcomes: dict[str, dict[str, None]] = {}
        self._used: set[str] = set()

    @property
    def float_bits(self) -> int:
        """Of a whole weight: 32 or 16."""
        return _BITS[self._floats]

    def vector(
        self,
        names: Sequence[str | int],
        size: int,
        *,
        offset: float | npt.NDArray[np.float32] = 0.0,
        scale: float = 1.0,
    ) -> str:
        """Norm weights or biases, one tensor after the other, each plus `offset` and times `scale`.

        An array is an offset for each value of a single tensor. A name that stands several times in a row is read once
        and laid down as often. A number stands for as many zeros; the first one is a name.
        """
        pieces, first = [], str(names[0])
        for name, group in itertools.groupby(names):
            if isinstance(name, int):
                pieces.append(np.zeros(name, DTYPES[self._floats]))
                continue
            values = (self._read(self._tensor(name, None)) + np.asarray(offset, np.float32)) * np.float32(scale)
            pieces += [as_floats(values, self._floats, name)] * len(list(group))
        num_values = sum(map(len, pieces))
        if num_values != size:
            raise ExportError(f"has {num_values} values; the configuration asks for {size}", field=first)
        return self._graph.weight(first, DTYPES[self._floats], (size,), pieces)

    def array(self, name: str, shape: tuple[int, ...]) -> str:
        """A tensor as it is, in float32 whatever the graph's floats are: a convolution's weights.

        Raises:
            ExportError: it is missing, or the configuration asks for another shape.
        """
        tensor = self._checkpoint.tensor(name)
        if tensor.shape != shape:
            raise ExportError(f"is {tensor.shape}; the configuration asks for {shape}", field=name)
        self._used.add(name)
        self._account(tensor.storage, "fp32")
        return self._graph.weight(name, np.float32, shape, [self._read(tensor)])

    def bits(self, names: Sequence[str], kind: MatrixKind, num_rows: int, num_columns: int) -> int:
        """Bits that a stack of tensors gets: those of `kind`, but 8 instead of 4 where its source has more.

        In a 16-bit graph a shape that the fused kernel refuses stays whole: CUDA would make floats of all its weights
        in every step.
        """
        bits = _BITS[kind]
        is_fine = any(self._checkpoint.tensor(name).storage.startswith(_FINE_FORMATS) for name in names)
        bits = 8 if bits == 4 and is_fine else bits
        is_fused = num_rows % _FUSED_ROWS.get(bits, 1) == 0 and num_columns % self._block_size == 0
        return bits if self._floats == "fp32" or is_fused else 16

    def matrix(
        self, name: str, tensor_names: Sequence[str], num_rows: int, num_columns: int, bits: int, scale: float = 1.0
    ) -> Matrix:
        """Stack tensors of (out, in) into one matrix.

        Args:
            name: of the matrix in the graph.
            tensor_names: in the order of their rows.
            num_rows: of the stack.
            num_columns: of each.
            bits: 4, 7, 8, or those of the graph's floats, see `Matrix`.
            scale: multiplies all weights.

        Raises:
            ExportError: a tensor is missing or the configuration asks for another shape.
        """
        tensors = self._stack(tensor_names, num_rows, num_columns)
        writers = {32: self._write_floats, 16: self._write_floats, 7: self._write_channels}
        write = writers.get(bits, self._write_blocks)
        return write(name, tensors, num_rows, num_columns, bits, np.float32(scale))

    def channels(
        self, name: str, tensor_names: Sequence[str], num_rows: int, num_columns: int, bits: int
    ) -> tuple[Matrix, npt.NDArray[np.float32]]:
        """Stack tensors of (out, in) into one matrix of 7 or 8 bits with a scale for each row.

        Returns:
            The matrix, and the sum of each row of what it stands for, (out) float32.

        Raises:
            ExportError: a tensor is missing or the configuration asks for another shape.
        """
        tensors = self._stack(tensor_names, num_rows, num_columns)
        codes, scales = self._fit_stack(tensors, num_rows, num_columns, bits)
        matrix = self._write_codes(name, codes, scales, bits)
        return matrix, codes.sum(axis=0, dtype=np.int64).astype(np.float32) * scales

    def table(self, name: str, tensor_name: str, rows: Sequence[int] | npt.NDArray[np.int64], num_columns: int) -> str:
        """Rows of a tensor in the graph's floats, (rows, num_columns), in any order and as often as they are named.

        Raises:
            ExportError: the tensor is missing, has other columns or fewer rows.
        """
        tensor = self._tensor(tensor_name, num_columns)
        needed = int(np.max(rows)) + 1
        if tensor.shape[0] < needed:
            raise ExportError(f"has {tensor.shape[0]} rows; the configuration asks for {needed}", field=tensor_name)
        self._account(tensor.storage, self._floats)
        values = as_floats(self._read(tensor)[rows], self._floats, tensor_name)
        return self._graph.weight(name, DTYPES[self._floats], (len(rows), num_columns), [values])

    def summary(self) -> str:
        """What became of each stored format: ``Q4_1 -> int4 ..., lossless; Q8_0 -> int8 ..., lossless``."""
        return "; ".join(f"{storage} -> {' and '.join(made)}" for storage, made in sorted(self._outcomes.items()))

    def check_all_used(self, ignored: Callable[[str], bool]) -> None:
        """Refuse a checkpoint with a tensor that the graph does not hold.

        Raises:
            ExportError: names the tensor.
        """
        for name in self._checkpoint.names():
            if name in self._used:
                continue
            if not ignored(name):
                raise ExportError("is a tensor that this architecture does not have", field=name)
            self._advance(math.prod(self._checkpoint.tensor(name).shape))

    def _stack(self, tensor_names: Sequence[str], num_rows: int, num_columns: int) -> list[StoredTensor]:
        tensors = [self._tensor(tensor_name, num_columns) for tensor_name in tensor_names]
        if sum(tensor.shape[0] for tensor in tensors) != num_rows:
            shapes = ", ".join(str(tensor.shape) for tensor in tensors)
            raise ExportError(f"is {shapes}; the configuration asks for {num_rows} rows", field=tensor_names[0])
        return tensors

    def _tensor(self, name: str, num_columns: int | None) -> StoredTensor:
        tensor = self._checkpoint.tensor(name)
        expected_rank = 1 if num_columns is None else 2
        if len(tensor.shape) != expected_rank or (num_columns is not None and tensor.shape[1] != num_columns):
            wanted = "one axis" if num_columns is None else f"{num_columns} columns"
            raise ExportError(f"is {tensor.shape}; the configuration asks for {wanted}", field=name)
        self._used.add(name)
        return tensor

    def _read(self, tensor: StoredTensor) -> npt.NDArray[np.float32]:
        values = tensor.read()
        if not np.isfinite(np.sum(values, dtype=np.float64)):
            raise ExportError("holds an infinite value or one that is no number", field=tensor.name)
        self._advance(values.size)
        return values

    def _advance(self, num_weights: int) -> None:
        self._num_written += num_weights
        if self._progress is not None:
            self._progress(self._num_written, self._num_weights)

    def _account(self, storage: str, made: str) -> None:
        self._outcomes.setdefault(storage, {})[made] = None

    def _write_floats(
        self, name: str, tensors: Sequence[StoredTensor], num_rows: int, num_columns: int, bits: int, scale: np.float32
    ) -> Matrix:
        def rounded(rows: npt.NDArray[np.float32], tensor_name: str) -> npt.NDArray[Any]:
            return as_floats(rows * scale if scale != 1 else rows, self._floats, tensor_name)

        def pieces() -> Iterator[npt.NDArray[Any]]:
            step = max(1, _CHUNK_WEIGHTS // num_columns)
            for tensor in tensors:
                self._account(tensor.storage, self._floats)
                values, name = self._read(tensor), tensor.name
                parts = (values[start : start + step] for start in range(0, len(values), step))
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    yield from pool.map(rounded, parts, itertools.repeat(name))

        codes = self._graph.weight(name + ".weight", DTYPES[self._floats], (num_rows, num_columns), pieces())
        return Matrix(name=name, num_rows=num_rows, num_columns=num_columns, bits=bits, codes=codes)

    def _write_blocks(
        self, name: str, tensors: Sequence[StoredTensor], num_rows: int, num_columns: int, bits: int, scale: np.float32
    ) -> Matrix:
        num_blocks = -(-num_columns // self._block_size)
        has_offsets = any(
            self._is_kept(tensor, bits) and tensor.storage in gguf_blocks.OFFSET_FORMATS for tensor in tensors
        )
        side = BlockScales(bits, self._floats, has_offsets=has_offsets)

        def pieces() -> Iterator[npt.NDArray[np.uint8]]:
            for tensor in tensors:
                for blocks in self._blocks(tensor, bits):
                    side.add(blocks, scale, tensor.name)
                    yield pack(blocks.codes, bits)

        bytes_per_block = self._block_size * bits // 8
        codes = self._graph.weight(name + ".codes", np.uint8, (num_rows, num_blocks, bytes_per_block), pieces())
        scales, zero_points, offsets = side.write(self._graph, name, num_rows, num_blocks)
        return Matrix(
            name=name,
            num_rows=num_rows,
            num_columns=num_columns,
            bits=bits,
            codes=codes,
            scales=scales,
            zero_points=zero_points,
            offsets=offsets,
        )

    def _write_channels(
        self, name: str, tensors: Sequence[StoredTensor], num_rows: int, num_columns: int, bits: int, scale: np.float32
    ) -> Matrix:
        codes, scales = self._fit_stack(tensors, num_rows, num_columns, bits)
        return self._write_codes(name, codes, scales * scale, bits)

    def _fit_stack(
        self, tensors: Sequence[StoredTensor], num_rows: int, num_columns: int, bits: int
    ) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """Codes (in, out) and scales (out).

        Rows become columns, as the kernel takes them, so a stack's codes are held whole: a byte for each weight.
        """
        codes = np.empty((num_columns, num_rows), np.int8)
        scales = np.empty(num_rows, np.float32)
        step = max(1, _CHUNK_WEIGHTS // num_columns)
        start = 0
        for tensor in tensors:
            self._account(tensor.storage, f"int8 per channel ({bits} bits), re-quantised")
            weights = self._read(tensor)
            for first in range(0, len(weights), step):
                part, part_scales = fit_channels(weights[first : first + step], bits)
                codes[:, start : start + len(part)] = part.T
                scales[start : start + len(part)] = part_scales
                start += len(part)
        return codes, scales

    def _write_codes(
        self, name: str, codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float32], bits: int
    ) -> Matrix:
        num_columns, num_rows = codes.shape
        return Matrix(
            name=name,
            num_rows=num_rows,
            num_columns=num_columns,
            bits=bits,
            codes=self._graph.weight(name + ".codes", np.int8, codes.shape, [codes]),
            scales=self._graph.weight(name + ".scales", np.float32, scales.shape, [scales]),
        )

    def _is_kept(self, tensor: StoredTensor, bits: int) -> bool:
        """The tensor's own blocks fit into `bits` without rounding."""
        if self._block_size != gguf_blocks.BLOCK_SIZE:
            return False
        kept = {4: gguf_blocks.FOUR_BIT_FORMATS, 8: frozenset({"Q8_0", "Q4_0"})}
        return tensor.storage in kept[bits]

    def _blocks(self, tensor: StoredTensor, bits: int) -> Iterator[Blocks]:
        num_columns = tensor.shape[1]
        step = max(1, _CHUNK_WEIGHTS // num_columns)
        is_kept = self._is_kept(tensor, bits)
        kind = f"int{bits} in blocks of {self._block_size}"
        self._account(tensor.storage, f"{kind}, lossless" if is_kept else f"{kind}, re-quantised")
        if not is_kept:
            weights = self._read(tensor)
            parts = (weights[start : start + step] for start in range(0, len(weights), step))
            # numpy lets go of the interpreter while it computes, so threads are enough.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                scale_dtype = DTYPES[self._floats]
                yield from pool.map(lambda part: fit(part, bits, self._block_size, scale_dtype), parts)
            return
        raw = tensor.blocks()
        for start in range(0, len(raw), step):
            blocks = gguf_blocks.decode(tensor.storage, raw[start : start + step], num_columns)
            yield widen(blocks) if blocks.bits < bits else blocks
        self._advance(math.prod(tensor.shape))
