"""Inputs and outputs of a plain tensor model, as its config states them.

Floor 1. The texts of refusals are Triton's where it has one.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput

from sardonyx.errors import ConfigError
from sardonyx.repository.config import FILE_NAME, is_plain_file_name

_WILDCARD = -1


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output."""

    name: str
    data_type: int
    """Number of ModelConfig's enum: ``TYPE_FP32`` is 11."""
    dims: tuple[int, ...]
    """What callers send or get, without batch axis; -1 where any size goes. Never empty."""
    reshape: tuple[int, ...] | None = None
    """What the graph has in place of `dims`, without batch axis; empty: the batch axis alone. ``None``: as `dims`."""
    is_optional: bool = False
    """An input that requests may leave out."""
    label_filename: str | None = None
    """An output's class names, a file in the model's folder with one a line."""


def read_inputs(config: ModelConfig, *, file: str = FILE_NAME) -> tuple[TensorSpec, ...]:
    """Check and read the inputs.

    Raises:
        ConfigError: no name, data type or dims; a dimension of 0; a reshape with another number of elements; an image
            format without 3 dims; a name twice.
    """
    specs = tuple(_read(config, "input", file))
    for index, item in enumerate(config.input):
        if item.format != ModelInput.FORMAT_NONE and len(item.dims) != 3:
            reason = f"model input NHWC/NCHW require 3 dims for {config.name}"
            raise ConfigError(reason, file=file, field=f"input[{index}].format")
    return specs


def read_outputs(config: ModelConfig, *, file: str = FILE_NAME) -> tuple[TensorSpec, ...]:
    """Check and read the outputs.

    Raises:
        ConfigError: as `read_inputs`; a label file that is no plain name; no output at all.
    """
    if not config.output:
        raise ConfigError(f"must specify 'output' for {config.name}", file=file, field="output")
    for index, item in enumerate(config.output):
        if item.label_filename and not is_plain_file_name(item.label_filename):
            raise ConfigError("is not a plain file name", file=file, field=f"output[{index}].label_filename")
    return tuple(_read(config, "output", file))


def _read(config: ModelConfig, side: str, file: str) -> Iterator[TensorSpec]:
    seen = set()
    for index, item in enumerate(getattr(config, side)):
        where = f"{side}[{index}]"
        if problem := _problem(item, config.max_batch_size):
            part, text = problem
            named = f"model {side} '{item.name}' " if item.name else f"model {side} "
            raise ConfigError(f"{named}{text} for {config.name}", file=file, field=f"{where}.{part}")
        if item.name in seen:
            raise ConfigError(f"{item.name!r} is there twice", file=file, field=f"{where}.name")
        seen.add(item.name)
        yield TensorSpec(
            name=item.name,
            data_type=item.data_type,
            dims=tuple(item.dims),
            reshape=tuple(item.reshape.shape) if item.HasField("reshape") else None,
            is_optional=side == "input" and item.optional,
            label_filename=(item.label_filename or None) if side == "output" else None,
        )


def _problem(item: Any, max_batch_size: int) -> tuple[str, str] | None:  # ModelInput or ModelOutput, both untyped
    """The field at fault and what is wrong with it."""
    if not item.name:
        return "name", "must specify 'name'"
    if not item.data_type:
        return "data_type", "must specify 'data_type'"
    if not item.dims:
        return "dims", "must specify 'dims'"
    if not _are_sizes(item.dims):
        return "dims", "dimension must be integer >= 1, or -1 to indicate a variable-size dimension"
    if not item.HasField("reshape"):
        return None
    shape = item.reshape.shape
    if not shape and max_batch_size == 0:
        text = "cannot have empty reshape for non-batching model as scalar tensors are not supported"
        return "reshape", text
    if not _are_sizes(shape):
        return "reshape", "reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension"
    outside, inside = _element_counts(item.dims), _element_counts(shape)
    if len(outside) != len(inside):
        return "reshape", "has different number of variable-size dimensions for dims and reshape"
    return None if outside == inside else ("reshape", "has different size for dims and reshape")


def _are_sizes(dims: Iterable[int]) -> bool:
    return all(dim >= 1 or dim == _WILDCARD for dim in dims)


def _element_counts(dims: Iterable[int]) -> list[int]:
    """Elements before, between and behind the dimensions of any size: what a reshape must keep piece by piece."""
    pieces: list[list[int]] = [[]]
    for dim in dims:
        if dim == _WILDCARD:
            pieces.append([])
        else:
            pieces[-1].append(dim)
    return [math.prod(piece) for piece in pieces]
