"""The floating-point types that a graph may compute in."""

from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sardonyx_export.errors import ExportError

FloatKind = Literal["fp32", "fp16", "bf16"]

DTYPES: dict[FloatKind, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


def as_floats(values: npt.NDArray[np.float32], kind: FloatKind, name: str) -> npt.NDArray[Any]:
    """Round finite values to a type of floats.

    Args:
        values: any shape.
        kind: of the result.
        name: of the tensor, for the message.

    Raises:
        ExportError: fp16 cannot hold one of them.
    """
    if kind == "fp32":
        return values
    with np.errstate(over="ignore"):
        rounded = values.astype(DTYPES[kind])
    if kind == "fp16" and not np.isfinite(rounded).all():
        largest = float(np.abs(values).max())
        raise ExportError(f"holds {largest:.3g}, and fp16 ends at 65,504; bf16 can hold it", field=name)
    return rounded
