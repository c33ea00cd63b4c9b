"""The packed layout that steps of encoders have, against a naive reading of it."""

import numpy as np
import pytest

from sardonyx.runners.encoder import OUTPUT, packed_tensors
from sardonyx.tensors import TensorRequest


@pytest.mark.parametrize("lengths", [(1,), (4,), (2, 2), (3, 1, 5), (1, 7, 1, 1)])
def test_offsets_name_each_token_then_each_position_of_padding(lengths: tuple[int, ...]) -> None:
    tensors = packed_tensors([row(length) for length in lengths])
    longest = max(lengths)
    tokens = [b * longest + s for b, length in enumerate(lengths) for s in range(length)]
    padding = [b * longest + s for b, length in enumerate(lengths) for s in range(length, longest)]
    offsets, ends = tensors["token_offset"], tensors["cumulative_sequence_length"]
    assert (offsets.dtype, offsets.shape) == (np.int32, (len(lengths), longest))
    assert offsets.reshape(-1).tolist() == tokens + padding
    assert tensors["row_scatter"].tolist() == tokens
    assert ends.dtype == np.int32
    assert ends.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]


def row(length: int) -> TensorRequest:
    return TensorRequest(id=0, inputs={"input_ids": np.arange(length, dtype=np.int64)}, outputs=(OUTPUT,))
