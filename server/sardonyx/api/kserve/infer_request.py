"""The body of an inference request over HTTP: JSON, perhaps with the tensors' bytes behind it.

Floor 5. Parsing only: what the model wants is checked by the service.

Source: KServe V2 protocol, "Inference Request JSON Object"; Triton, docs/protocol/extension_binary_data.md.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from sardonyx.api.kserve.body import over_limit
from sardonyx.api.kserve.calls import RegionSlice, SharedInput, WantedOutput, WireRequest
from sardonyx.api.kserve.codec import MAX_ELEMENTS, element_count, from_raw
from sardonyx.api.kserve.json_tensor import from_json
from sardonyx.api.kserve.json_text import check_containers, decode_json
from sardonyx.errors import InvalidRequest
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.tensors import Parameter, Tensor, TensorMetadata

HEADER_LENGTH = "inference-header-content-length"
"""The HTTP header that says how long the JSON is where tensors follow on it."""

_SLOWER_STRINGS = 16
_STRING_BYTES = 64
"""What Python keeps for a string besides its characters: 55 MB of short ones took 4 GB."""
_NUMBER = re.compile(r"[+-]?[0-9]{1,19}")
_ONE_FIELD = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. "
)


class TensorParameters(msgspec.Struct, frozen=True):
    """``parameters`` of an input or output; members that the protocol does not define mean nothing."""

    binary_data_size: int | None = None
    binary_data: bool | None = None
    classification: int = 0
    shared_memory_region: str | None = None
    shared_memory_offset: int = 0
    shared_memory_byte_size: int | None = None


class InputJson(msgspec.Struct, frozen=True):
    """A member of ``inputs``."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    parameters: TensorParameters | None = None
    data: msgspec.Raw = msgspec.Raw()
    """Read once the datatype is known."""


class OutputJson(msgspec.Struct, frozen=True):
    """A member of ``outputs``."""

    name: str
    parameters: TensorParameters | None = None


class InferJson(msgspec.Struct, frozen=True):
    """The JSON of a request."""

    inputs: list[InputJson]
    id: str = ""
    outputs: list[OutputJson] | None = None
    parameters: dict[str, Parameter] | None = None


class ParsedRequest(NamedTuple):
    """A request, and how its answer is to be written."""

    request: WireRequest
    binary: dict[str, bool]
    """Of the outputs that say so themselves: as bytes or as JSON."""
    is_binary: bool
    """All others."""


_NO_PARAMETERS = TensorParameters()
_DECODER = msgspec.json.Decoder(InferJson)


def header_length_of(headers: Mapping[str, str], num_bytes: int) -> int:
    """Bytes of the JSON in a body of so many; 0 stands for a body of nothing but one tensor.

    Raises:
        InvalidRequest: the header is no number or goes beyond the body.
    """
    text = headers.get(HEADER_LENGTH)
    if text is None:
        return num_bytes
    if not _NUMBER.fullmatch(text.strip()):
        raise InvalidRequest(f"Unable to parse Inference-Header-Content-Length, got: {text[:32]}")
    length = int(text)
    if not 0 <= length <= num_bytes:
        raise InvalidRequest(f"inference header size should be in range (0, {num_bytes}), got: {length}")
    return length


def read_json(body: bytes, length: int) -> InferJson:
    """The JSON at a body's begin.

    Raises:
        InvalidRequest: as `decode_json`.
        PayloadTooLarge: too many objects.
    """
    text: bytes | memoryview = body if length == len(body) else memoryview(body)[:length]
    check_containers(text, b"{")
    return decode_json(text, _DECODER)


def num_slow_bytes(json: InferJson, length: int) -> int:
    """How much of a body is converted value by value; for choosing where to parse it.

    The JSON counts, and strings in bytes many times, since each takes as long as a lot of JSON and four bytes at least.
    """
    sizes = (each.parameters.binary_data_size for each in json.inputs if each.datatype == "BYTES" and each.parameters)
    return length + _SLOWER_STRINGS * sum(size or 0 for size in sizes)


def parse_request(
    json: InferJson, body: bytes, length: int, *, model_name: str, model_version: str, max_bytes: int
) -> ParsedRequest:
    """The request that a body holds.

    Args:
        json: what `read_json` made of its begin.
        body: all of it.
        length: bytes of the JSON.
        model_name: from the path.
        model_version: from the path.
        max_bytes: of the tensors that take more than their part of the body: JSON and strings.

    Raises:
        InvalidRequest: an input has no data or several kinds of it, sizes do not add up, a name comes twice, an
            output's parameters contradict each other.
        PayloadTooLarge: data opens too many lists, or the tensors are over the limit.
    """
    parameters = json.parameters or {}
    is_binary = parameters.get("binary_data_output", False)
    if not isinstance(is_binary, bool):
        raise InvalidRequest("'binary_data_output' must be a boolean", param="parameters.binary_data_output")
    _check_expanded(json.inputs, max_bytes)
    inputs = _read_inputs(json.inputs, body, length, model_name)
    outputs = [_wanted(output, output.parameters or _NO_PARAMETERS) for output in json.outputs or ()]
    if len({tensor.name for tensor in inputs}) != len(inputs):
        raise InvalidRequest(f"input '{_repeated(tensor.name for tensor in inputs)}' already exists in request")
    if len({output.name for output in outputs}) != len(outputs):
        name = _repeated(output.name for output in outputs)
        raise InvalidRequest(
            f"Duplicate output name '{name}' is not allowed in a request: output '{name}' already exists in request"
        )
    request = WireRequest(
        model_name=model_name,
        model_version=model_version,
        id=json.id,
        inputs=inputs,
        outputs=outputs,
        parameters={name: value for name, value in parameters.items() if name != "binary_data_output"},
    )
    binary = {
        output.name: output.parameters.binary_data
        for output in json.outputs or ()
        if output.parameters is not None and output.parameters.binary_data is not None
    }
    return ParsedRequest(request, binary, is_binary)


def raw_request(
    body: bytes, inputs: Sequence[TensorMetadata], *, model_name: str, model_version: str, has_batch_axis: bool
) -> ParsedRequest:
    """The request of a body that is nothing but its only input's bytes (header length 0).

    Args:
        body: the bytes; of BYTES the one element, without its length.
        inputs: the model's.
        model_name: from the path.
        model_version: from the path.
        has_batch_axis: axis 0 of the shapes is the batch, which is 1.

    Raises:
        InvalidRequest: the model has several inputs, or the shape cannot be told from the size.
    """
    if len(inputs) != 1:
        raise InvalidRequest(
            f"Raw request must only have 1 input (found 1) to be deduced but got {len(inputs)} inputs in "
            f"'{model_name}' model configuration"
        )
    (wanted,) = inputs
    dims = wanted.shape[1:] if has_batch_axis else wanted.shape
    batch = (1,) if has_batch_axis else ()
    if wanted.datatype == "BYTES":
        if dims != (1,):
            raise InvalidRequest(
                f"For BYTE datatype raw input '{wanted.name}', the model must have input shape [1]", param=wanted.name
            )
        body = len(body).to_bytes(4, "little") + body
    else:
        dims = _deduce(dims, len(body) // DATATYPES[wanted.datatype].array.itemsize, wanted.name)
    tensor = from_raw(body, name=wanted.name, datatype=wanted.datatype, shape=(*batch, *dims), model_name=model_name)
    return ParsedRequest(WireRequest(model_name=model_name, model_version=model_version, inputs=[tensor]), {}, True)


def _deduce(dims: tuple[int, ...], count: int, name: str) -> tuple[int, ...]:
    """The shape of `count` elements, if at most one dimension is open."""
    if dims.count(-1) > 1:
        raise InvalidRequest(
            f"The shape of the raw input '{name}' can not be deduced because there are more than one variable-sized "
            "dimension",
            param=name,
        )
    fixed = element_count([dim for dim in dims if dim != -1], name)
    return tuple(count // fixed if dim == -1 and fixed else max(dim, 0) for dim in dims)


def _read_inputs(inputs: list[InputJson], body: bytes, position: int, model_name: str) -> list[Tensor | SharedInput]:
    """All inputs; the bytes of binary ones lie one after the other from `position` to the body's end."""
    view = memoryview(body)
    tensors: list[Tensor | SharedInput] = []
    for each in inputs:
        parameters = each.parameters or _NO_PARAMETERS
        size = parameters.binary_data_size
        _check_one_kind(each, parameters)
        if each.shape and min(each.shape) < 0:
            raise InvalidRequest(
                "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer",
                param=each.name,
            )
        if size is not None:
            if size < 0:
                raise InvalidRequest("Unable to parse 'binary_data_size': it is below 0", param=each.name)
            if size > len(view) - position:
                raise InvalidRequest(
                    f"unexpected size for input '{each.name}', expecting {size - (len(view) - position)} additional "
                    f"bytes for model '{model_name}'",
                    param=each.name,
                )
            data = view[position : position + size]
            position += size
            tensors.append(
                from_raw(data, name=each.name, datatype=each.datatype, shape=each.shape, model_name=model_name)
            )
        elif parameters.shared_memory_region is not None:
            region = _region(parameters, parameters.shared_memory_region, each.name)
            tensors.append(SharedInput(name=each.name, datatype=each.datatype, shape=each.shape, data=region))
        else:
            tensors.append(from_json(each.data, name=each.name, datatype=each.datatype, shape=each.shape))
    if position != len(view):
        raise InvalidRequest(f"unexpected additional input data for model '{model_name}': {len(view) - position} bytes")
    return tensors


def _check_expanded(inputs: list[InputJson], max_bytes: int) -> None:
    """Before any of it is made: a value of two characters may become eight bytes, and any string takes Python some."""
    num_bytes = 0
    for each in inputs:
        known = DATATYPES.get(each.datatype)
        is_text = memoryview(each.data).nbytes > 0
        if known is not None and (is_text or each.datatype == "BYTES") and min(each.shape, default=0) >= 0:
            size = _STRING_BYTES if each.datatype == "BYTES" else known.array.itemsize
            num_bytes += element_count(each.shape, each.name) * size
    if max_bytes < num_bytes <= MAX_ELEMENTS:  # what is beyond has errors of its own
        raise over_limit(num_bytes, max_bytes)


def _check_one_kind(each: InputJson, parameters: TensorParameters) -> None:
    """Exactly one of JSON, bytes and shared memory."""
    kinds = [
        "'data'" if memoryview(each.data).nbytes else None,
        "'binary_data_size' in 'parameters'" if parameters.binary_data_size is not None else None,
        "'shared_memory_region' in 'parameters'" if parameters.shared_memory_region is not None else None,
    ]
    found = [kind for kind in kinds if kind]
    if len(found) != 1:
        but = f"But set {', '.join(found)}" if found else "But no field is set"
        raise InvalidRequest(f"{_ONE_FIELD}{but} for input '{each.name}'", param=each.name)


def _wanted(output: OutputJson, parameters: TensorParameters) -> WantedOutput:
    """An output as the service wants it."""
    if parameters.shared_memory_region is None:
        if parameters.classification < 0:
            raise InvalidRequest("Unable to parse 'classification': it is below 0", param=output.name)
        return WantedOutput(name=output.name, num_classes=parameters.classification)
    if parameters.classification:
        raise InvalidRequest(
            f"shared memory can't be used for classification output '{output.name}'", param=output.name
        )
    if parameters.binary_data:
        raise InvalidRequest(
            f"'binary_data' can't be used together with shared memory for output '{output.name}'", param=output.name
        )
    return WantedOutput(name=output.name, data=_region(parameters, parameters.shared_memory_region, output.name))


def _region(parameters: TensorParameters, region: str, name: str) -> RegionSlice:
    """Where in shared memory a tensor lies."""
    size, offset = parameters.shared_memory_byte_size, parameters.shared_memory_offset
    if size is None:
        raise InvalidRequest(f"'shared_memory_byte_size' must be set for '{name}', which names a region", param=name)
    if size < 0 or offset < 0:
        raise InvalidRequest(f"offset and size in shared memory of '{name}' must not be below 0", param=name)
    return RegionSlice(region=region, offset=offset, size_bytes=size)


def _repeated(names: Iterable[str]) -> str:
    """The first name that comes again."""
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]  # add gives None
