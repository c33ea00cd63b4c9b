"""Rows as the packed layout of `families.Encoder` takes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx.runtime.session import open_session
from sardonyx_export.stages.encoder_reference import EncodedRow

Array = npt.NDArray[np.float32]


def pack(rows: Sequence[EncodedRow]) -> dict[str, npt.NDArray[Any]]:
    """All inputs that a packed graph may declare. Behind a row's end lie the tokens of others."""
    lengths = np.array([len(row.token_ids) for row in rows])
    starts = np.cumsum(lengths) - lengths
    num_tokens, longest = lengths.sum(), lengths.max()
    positions = np.concatenate([np.arange(length) for length in lengths])
    types = [row.token_type_ids or [0] * len(row.token_ids) for row in rows]
    return {
        "input_ids": np.concatenate([row.token_ids for row in rows]).astype(np.int64),
        "token_type_ids": np.concatenate(types).astype(np.int64),
        "position_ids": positions,
        "row_gather": np.minimum(starts[:, None] + np.arange(longest), num_tokens - 1),
        "row_scatter": np.repeat(np.arange(len(rows)) * longest, lengths) + positions,
        "seqlens": lengths.astype(np.int32),
        "num_prompt_tokens": np.array([row.num_prompt_tokens for row in rows], np.int32),
    }


def run_packed(model: Path, *batches: Sequence[EncodedRow]) -> list[Array]:
    """Each batch's (rows, width), from a graph that knows its own inputs and has one output."""
    session = open_session(model, model_name="tiny")
    (output,) = session.outputs
    try:
        tensors = [pack(rows) for rows in batches]
        return [session.run({name: each[name] for name in session.inputs})[output].copy() for each in tensors]
    finally:
        session.close()
