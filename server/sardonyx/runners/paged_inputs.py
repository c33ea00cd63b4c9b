"""The tensors of a step over blocks: where each lies in the one stretch of memory that is copied to the device, and
what goes into it.

Floor 3. Pure numpy: no device, no sequences. Sizes are those of the tensors: a bucket's where rows fill one up.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx.runners.paged_draws import Draws
from sardonyx.runtime.device import Bytes, DeviceTensor, aligned
from sardonyx.runtime.dtypes import DATATYPES, Datatype

_INT32, _INT64, _FP32 = DATATYPES["INT32"], DATATYPES["INT64"], DATATYPES["FP32"]

FEED = ("tokens", "source")
DECODER = ("logits_index", "cumulative_sequence_length", "past_seqlens", "slot_mapping", "block_table")
METADATA = "attention_metadata"
SAMPLER = ("temperature", "top_k", "top_p", "min_p", "uniform")


class Bucket(NamedTuple):
    """The shape of a step that is captured: so many rows of one token, so many columns of the block table."""

    num_rows: int
    num_columns: int


class StepSizes(msgspec.Struct, frozen=True):
    """Of a step's tensors."""

    num_tokens: int
    """T."""
    num_rows: int
    """B."""
    num_logits: int
    """N."""
    num_draws: int
    """Rows of logits that the device draws from, the first ones; at most N."""
    num_columns: int
    """Of the block table."""

    @staticmethod
    def of(bucket: Bucket) -> "StepSizes":
        num_rows, num_columns = bucket
        return StepSizes(num_rows, num_rows, num_rows, num_rows, num_columns)


@dataclass(slots=True)
class StepRows:
    """A step's rows as arrays, without anything that fills a bucket up."""

    tokens: npt.NDArray[np.int64]
    """``(T,)`` ids; where `source` says otherwise, any."""
    source: npt.NDArray[np.int64]
    """``(T,)``: in which row of the sampler's last output the token is; -1: in `tokens`."""
    num_new: npt.NDArray[np.int64]
    """``(B,)``."""
    num_past: npt.NDArray[np.int64]
    """``(B,)``."""
    blocks: npt.NDArray[np.int32]
    """``(B, M)``, M the columns that the longest row needs; -1 behind a row's last block."""
    logits_index: npt.NDArray[np.int64]
    """``(N,)`` packed indices, at least one; first those that the device draws from."""
    draws: Draws

    @property
    def sizes(self) -> StepSizes:
        num_rows, num_columns = self.blocks.shape
        return StepSizes(len(self.tokens), num_rows, len(self.logits_index), len(self.draws.uniform), num_columns)


class StepLayout:
    """Where the tensors of a step of some sizes lie, all of them `ALIGNMENT` apart.

    The block table comes last, so that buckets of as many rows have all other tensors in the same place: they share
    the captured graphs of what reads no block table.
    """

    def __init__(self, sizes: StepSizes) -> None:
        tokens, rows, draws = (sizes.num_tokens,), (sizes.num_rows,), (sizes.num_draws,)
        parts: list[tuple[str, Datatype, tuple[int, ...]]] = [
            ("tokens", _INT64, tokens),
            ("source", _INT64, tokens),
            ("logits_index", _INT64, (sizes.num_logits,)),
            ("cumulative_sequence_length", _INT32, (sizes.num_rows + 1,)),
            ("past_seqlens", _INT32, rows),
            ("slot_mapping", _INT32, tokens),
            ("temperature", _FP32, draws),
            ("top_k", _INT64, draws),
            ("top_p", _FP32, draws),
            ("min_p", _FP32, draws),
            ("uniform", _FP32, draws),
            ("block_table", _INT32, (sizes.num_rows, sizes.num_columns)),
        ]
        self._parts: dict[str, DeviceTensor] = {}
        self.num_bytes = 0
        for name, datatype, shape in parts:
            tensor = DeviceTensor(self.num_bytes, shape, datatype)
            self._parts[name] = tensor
            self.num_bytes = aligned(self.num_bytes + tensor.num_bytes)

    def tensor(self, name: str, base: int) -> DeviceTensor:
        """A tensor where the whole begins at address `base`."""
        part = self._parts[name]
        return DeviceTensor(base + part.address, part.shape, part.datatype)

    def view(self, name: str, memory: Bytes) -> npt.NDArray[Any]:
        """An array where the whole begins with `memory`."""
        part = self._parts[name]
        return memory[part.address : part.address + part.num_bytes].view(part.datatype.array).reshape(part.shape)

    def fill(self, rows: StepRows, block_size: int, memory: Bytes) -> None:
        """Write a step. What the layout has beyond its rows becomes rows of one token 0 in block 0, which is nobody's.

        Their queries see that token alone; nothing that they give is looked at.
        """
        num_rows, num_tokens = len(rows.num_new), len(rows.tokens)
        self._put("tokens", rows.tokens, 0, memory)
        self._put("source", rows.source, -1, memory)
        self._put("logits_index", rows.logits_index, 0, memory)
        self._put("past_seqlens", rows.num_past, 0, memory)
        table = self.view("block_table", memory)
        table[:] = -1
        table[:num_rows, : rows.blocks.shape[1]] = rows.blocks
        table[num_rows:, 0] = 0
        starts = self.view("cumulative_sequence_length", memory)
        starts[0] = 0
        np.cumsum(rows.num_new, out=starts[1 : num_rows + 1])
        starts[num_rows + 1 :] = num_tokens + np.arange(1, len(starts) - num_rows)
        slots = self.view("slot_mapping", memory)
        slots[:num_tokens] = _slots(rows, block_size)
        slots[num_tokens:] = np.arange(len(slots) - num_tokens) % block_size
        draws = rows.draws
        for name, values in (
            ("temperature", draws.temperature),
            ("top_k", draws.top_k),
            ("top_p", draws.top_p),
            ("min_p", draws.min_p),
            ("uniform", draws.uniform),
        ):
            self._put(name, values, 1 if name == "top_p" else 0, memory)

    def _put(self, name: str, values: npt.NDArray[Any], filler: int, memory: Bytes) -> None:
        view = self.view(name, memory)
        view[: len(values)] = values
        view[len(values) :] = filler


def _slots(rows: StepRows, block_size: int) -> npt.NDArray[np.int64]:
    """``(T,)``: block * block_size + offset of each token's own position."""
    starts = rows.num_new.cumsum() - rows.num_new
    positions = np.repeat(rows.num_past - starts, rows.num_new) + np.arange(len(rows.tokens))
    indices = np.repeat(np.arange(len(rows.num_new)), rows.num_new)
    columns, offsets = np.divmod(positions, block_size)
    return rows.blocks[indices, columns].astype(np.int64) * block_size + offsets


class Buckets:
    """Which steps are captured: decodes alone, rows and columns both filled up to a power of two.

    Args:
        max_rows: of a step.
        max_columns: blocks of the longest sequence.
        max_graphs: so many are captured at most, those with few columns first; 0: none.
    """

    MIN_COLUMNS = 8

    def __init__(self, max_rows: int, max_columns: int, max_graphs: int) -> None:
        rows = [1 << power for power in range((max_rows - 1).bit_length() + 1)]
        wide = max(self.MIN_COLUMNS, 1 << (max_columns - 1).bit_length())
        columns = [1 << power for power in range(3, wide.bit_length())]
        every = [Bucket(num_rows, num_columns) for num_columns in columns for num_rows in rows]
        self.chosen: dict[Bucket, int] = {bucket: number for number, bucket in enumerate(every[:max_graphs], 1)}
        """The graph id of each, in the order in which they are to be captured."""
        self.max_rows = rows[-1]

    def find(self, num_rows: int, num_columns: int) -> Bucket | None:
        """The one that such a step fills up; ``None`` where it is not captured."""
        bucket = Bucket(1 << (num_rows - 1).bit_length(), max(self.MIN_COLUMNS, 1 << (num_columns - 1).bit_length()))
        return bucket if bucket in self.chosen else None

    def bounds(self, bucket: Bucket, block_size: int) -> tuple[int, int, int]:
        """`attention_metadata` that holds for every step of the bucket.

        A step's longest sequence has more blocks than the next smaller bucket's columns: it would be in that one.
        """
        num_columns = bucket.num_columns
        shorter = num_columns // 2 if num_columns > self.MIN_COLUMNS else 0
        return 1, num_columns * block_size, shorter * block_size + 1
