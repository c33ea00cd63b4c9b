"""What runs on every instance before a model is ready: Triton's ``model_warmup``.

Floor 1.
"""

import math
from typing import Any, Literal

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.config import FILE_NAME, is_plain_file_name
from sardonyx.repository.tensor_spec import TensorSpec

MAX_RUNS = 10_000
MAX_ELEMENTS = 1 << 30
"""Of one input with its batch. Loading would allocate them."""

_SOURCES: dict[str, Literal["zero", "random", "file"]] = {
    "zero_data": "zero",
    "random_data": "random",
    "input_data_file": "file",
}


class WarmupInput(msgspec.Struct, frozen=True, kw_only=True):
    """One input of a sample."""

    name: str
    data_type: int
    """Number of ModelConfig's enum."""
    dims: tuple[int, ...]
    """Without batch axis, all of them fixed. The same values go into each row of the batch."""
    source: Literal["zero", "random", "file"]
    """Strings are empty where it is random."""
    file_name: str | None = None
    """In the model's folder ``warmup``: raw little-endian bytes, as the binary extension has them."""


class WarmupSample(msgspec.Struct, frozen=True, kw_only=True):
    """One request that is run ahead of callers'."""

    name: str
    batch_size: int = 1
    """1 where the model does not batch."""
    count: int = 1
    """Runs, one after the other."""
    inputs: list[WarmupInput]


def read_warmup(config: ModelConfig, inputs: tuple[TensorSpec, ...], *, file: str = FILE_NAME) -> list[WarmupSample]:
    """Check and read the samples, in order.

    Args:
        config: completed.
        inputs: the model's, as `read_inputs` gives them.
        file: how errors call the config.

    Raises:
        ConfigError: a batch beyond the model's, an input that is missing, unknown or does not fit, a file elsewhere.
    """
    samples = []
    for index, sample in enumerate(config.model_warmup):
        where = f"model_warmup[{index}]"
        largest = max(config.max_batch_size, 1)
        if not 1 <= sample.batch_size <= largest:
            reason = f"is {sample.batch_size}; it must be from 1 to {largest}"
            raise ConfigError(reason, file=file, field=f"{where}.batch_size")
        if sample.count > MAX_RUNS:
            raise ConfigError(f"is above {MAX_RUNS:,}", file=file, field=f"{where}.count")
        missing = {spec.name for spec in inputs if not spec.is_optional} - set(sample.inputs)
        if missing:
            raise ConfigError(f"leaves out {', '.join(sorted(missing))}", file=file, field=f"{where}.inputs")
        samples.append(
            WarmupSample(
                name=sample.name,
                batch_size=sample.batch_size,
                count=max(sample.count, 1),
                inputs=[
                    _input(name, sample, inputs, f"{where}.inputs[{name!r}]", file) for name in sorted(sample.inputs)
                ],
            )
        )
    return samples


def _input(
    name: str, sample: Any, specs: tuple[TensorSpec, ...], where: str, file: str
) -> WarmupInput:  # a ModelWarmup: tritonclient is untyped
    item = sample.inputs[name]
    spec = next((spec for spec in specs if spec.name == name), None)
    if spec is None:
        raise ConfigError("is no input of the model", file=file, field=where)
    if item.data_type != spec.data_type:
        raise ConfigError("is not the input's own", file=file, field=f"{where}.data_type")
    dims = tuple(item.dims)
    fits = len(dims) == len(spec.dims) and all(wanted in {-1, dim} for wanted, dim in zip(spec.dims, dims, strict=True))
    if not fits or any(dim < 1 for dim in dims):
        reason = f"is {list(dims)}; it must be the input's dims {list(spec.dims)} with every size fixed"
        raise ConfigError(reason, file=file, field=f"{where}.dims")
    if math.prod(dims) * sample.batch_size > MAX_ELEMENTS:
        raise ConfigError(f"makes more than {MAX_ELEMENTS:,} elements", file=file, field=f"{where}.dims")
    chosen = item.WhichOneof("input_data_type")
    if chosen is None:
        raise ConfigError("needs zero_data, random_data or input_data_file", file=file, field=where)
    source = _SOURCES[chosen]
    if source == "file" and not is_plain_file_name(item.input_data_file):
        raise ConfigError("is not a plain file name", file=file, field=f"{where}.input_data_file")
    return WarmupInput(
        name=name,
        data_type=item.data_type,
        dims=dims,
        source=source,
        file_name=item.input_data_file if source == "file" else None,
    )
