"""ModelInfer's protobuf messages as `calls`, and back.

Floor 5. What a message says is checked here for form; what it means is the service's affair. Messages of refusals are
Triton's.

Source: Triton, docs/protocol/extension_{parameters,shared_memory,classification}.md; server/src/grpc/infer_handler.cc.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from sardonyx.api.kserve import codec
from sardonyx.api.kserve.calls import RegionSlice, SharedInput, SharedOutput, WantedOutput, WireReply, WireRequest
from sardonyx.api.kserve.grpc_wire import Buffer, RequestParts
from sardonyx.errors import InvalidRequest, PayloadTooLarge
from sardonyx.tensors import Parameter, Tensor

EMPTY_FINAL = "triton_enable_empty_final_response"
"""Request parameter: also send an answer that only says that it is the last."""
FINAL = "triton_final_response"
"""Answer parameter of streams."""
MAX_TENSORS = 1024
"""Inputs, and outputs, of a request: more than any model has, few enough for the event loop."""
MAX_PARAMETERS = 1024
"""Of a request."""
MAX_TYPED_VALUES = 1 << 22
"""Numbers of a request outside of ``raw_input_contents``: each becomes an object of 32 bytes."""
MAX_STRINGS = 1 << 20
"""BYTES elements of a request: 55 MiB of short ones took 4 GB."""
MAX_INLINE_BYTES = 16 << 10
"""Smaller requests are read on the event loop, whatever is in them: at most 4,096 strings, half a millisecond."""
MAX_INLINE_ELEMENTS = 8192
"""The same for BYTES of answers."""

_CONTENTS = {
    "bool_contents": ("BOOL",),
    "int_contents": ("INT32", "INT8", "INT16"),
    "int64_contents": ("INT64",),
    "uint_contents": ("UINT32", "UINT8", "UINT16"),
    "uint64_contents": ("UINT64",),
    "fp32_contents": ("FP32",),
    "fp64_contents": ("FP64",),
    "bytes_contents": ("BYTES",),
}
"""Datatypes that each field of ``InferTensorContents`` carries, its own first."""


def reads_slowly(parts: RequestParts) -> bool:
    """Whether a large request has values that `read_request` must convert one by one, and not only numbers as bytes."""
    return any(field.datatype == "BYTES" or field.HasField("contents") for field in parts.message.inputs)


def writes_slowly(reply: WireReply) -> bool:
    """Whether `write_reply` has many values to convert one by one."""
    return any(
        each.datatype == "BYTES" and isinstance(each, Tensor) and each.array.size > MAX_INLINE_ELEMENTS
        for each in reply.outputs
    )


def read_request(parts: RequestParts) -> tuple[WireRequest, bool]:
    """What a ``ModelInferRequest`` asks, and whether an empty final answer is wanted (`EMPTY_FINAL`).

    Tensors of raw contents look into `parts`.

    Raises:
        InvalidRequest: tensors without data or with more than one kind, parameters of the wrong type, reserved
            parameters, a name twice, or what `codec` refuses.
        PayloadTooLarge: too many values that must be converted one by one.
    """
    message = parts.message
    _check_names(message.outputs, "output")
    _check_numbers(message)
    parameters = _read_parameters(message.parameters) if message.parameters else {}
    wants_empty_final = parameters.pop(EMPTY_FINAL, False)
    if not isinstance(wants_empty_final, bool):
        raise InvalidRequest(f"invalid value type for '{EMPTY_FINAL}' parameter, expected bool_param.")
    request = WireRequest(
        model_name=message.model_name,
        model_version=message.model_version,
        id=message.id,
        inputs=_read_inputs(parts),
        outputs=[_read_output(each) for each in message.outputs],
        parameters=parameters,
    )
    return request, wants_empty_final


def write_reply(reply: WireReply, *, is_final: bool | None = None) -> tuple[bytes, list[Buffer]]:
    """A ``ModelInferResponse`` without its ``raw_output_contents``, and these.

    Args:
        reply: what the service answers.
        is_final: value of `FINAL`; ``None`` leaves it out, as outside of streams.
    """
    message = pb.ModelInferResponse(model_name=reply.model_name, model_version=reply.model_version, id=reply.id)
    for name, value in reply.parameters.items():
        write_parameter(message.parameters[name], value)
    if is_final is not None:
        message.parameters[FINAL].bool_param = is_final
    raw_contents: list[Buffer] = []
    for output in reply.outputs:
        if isinstance(output, Tensor):
            message.outputs.add(name=output.name, datatype=output.datatype, shape=output.array.shape)
            raw_contents.append(codec.to_raw(output))
        else:
            _write_shared(message, output)
            raw_contents.append(b"")
    return message.SerializeToString(), raw_contents


def write_parameter(message: pb.InferParameter, value: Parameter) -> None:
    """Set the member of the oneof that suits the value."""
    if isinstance(value, bool):
        message.bool_param = value
    elif isinstance(value, str):
        message.string_param = value
    elif isinstance(value, float):
        message.double_param = value
    elif value >= 1 << 63:
        message.uint64_param = value
    else:
        message.int64_param = value


def _read_parameters(fields: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    for name, field in fields.items():
        if name.startswith("triton_") and name != EMPTY_FINAL:
            raise InvalidRequest(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys "
                f"starting with 'triton_' are allowed: {EMPTY_FINAL}"
            )
        kind = field.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(
                f"invalid value type for '{name}' parameter, expected int64_param, bool_param, or string_param."
            )
        parameters[name] = getattr(field, kind)
    return parameters


def _read_inputs(parts: RequestParts) -> list[Tensor | SharedInput]:
    message, raw_contents = parts
    inputs: list[Tensor | SharedInput] = []
    next_raw, num_raw = 0, len(raw_contents)
    _check_names(message.inputs, "input")
    for field in message.inputs:
        region = _read_region(field) if field.parameters else None
        has_contents = field.HasField("contents")
        if region is not None:
            if has_contents:
                raise InvalidRequest(
                    f"unexpected 'content' provided when using shared memory for input tensor {_quoted(field, message)}"
                )
            inputs.append(SharedInput(name=field.name, datatype=field.datatype, shape=tuple(field.shape), data=region))
        elif has_contents:
            if num_raw:
                raise InvalidRequest(
                    f"contents field must not be specified when using raw_input_contents for {_quoted(field, message)}"
                )
            inputs.append(_read_contents(field, message))
        elif next_raw < num_raw:
            tensor = codec.from_raw(
                raw_contents[next_raw],
                name=field.name,
                datatype=field.datatype,
                shape=tuple(field.shape),
                model_name=message.model_name,
            )
            inputs.append(tensor)
            next_raw += 1
        else:
            raise InvalidRequest(f"unable to find data for input tensor {_quoted(field, message)} in request.")
    if next_raw < num_raw:
        raise InvalidRequest(f"unexpected additional input data for model '{message.model_name}'")
    return inputs


def _read_contents(field: Any, message: pb.ModelInferRequest) -> Tensor:
    """The typed values of an input."""
    values: list[Any] = []
    for content, numbers in field.contents.ListFields():
        own, *others = _CONTENTS[content.name]
        if values:
            raise InvalidRequest(
                f"unexpected explicit tensor data for input tensor {_quoted(field, message)}, "
                "binary data was already supplied."
            )
        if field.datatype != own and field.datatype not in others:
            raise InvalidRequest(
                f"unexpected explicit tensor data for input tensor {_quoted(field, message)} of type '{own}', "
                f"expected datatype '{field.datatype}'"
            )
        values = list(numbers)
    return codec.from_values(values, name=field.name, datatype=field.datatype, shape=tuple(field.shape))


def _read_output(field: Any) -> WantedOutput:
    if not field.parameters:
        return WantedOutput(name=field.name)
    region = _read_region(field)
    num_classes = 0
    if "classification" in field.parameters:
        choice = field.parameters["classification"]
        if choice.WhichOneof("parameter_choice") != "int64_param":
            raise InvalidRequest("invalid value type for 'classification' parameter, expected int64_param")
        num_classes = choice.int64_param
        if num_classes <= 0:
            raise InvalidRequest("invalid value for 'classification' parameter, expected >= 1")
        if region is not None:
            raise InvalidRequest("output can't set both 'shared_memory_region' and 'classification'")
    return WantedOutput(name=field.name, num_classes=num_classes, data=region)


def _read_region(field: Any) -> RegionSlice | None:
    """The shared memory that a tensor's parameters name, if they do."""
    found: dict[str, Any] = {}
    for name, kind in (("region", "string_param"), ("offset", "int64_param"), ("byte_size", "int64_param")):
        key = f"shared_memory_{name}"
        if key not in field.parameters:
            continue
        if name != "region" and "region" not in found:
            raise InvalidRequest(
                f"'{key}' can not be specified without 'shared_memory_region' parameter for tensor '{field.name}'"
            )
        choice = field.parameters[key]
        if choice.WhichOneof("parameter_choice") != kind:
            raise InvalidRequest(
                f"invalid value type for '{key}' parameter for tensor '{field.name}', expected {kind}."
            )
        found[name] = getattr(choice, kind)
        if name != "region" and found[name] < 0:
            raise InvalidRequest(f"invalid value for '{key}' parameter for tensor '{field.name}', expected >= 0")
    if not found:
        return None
    if "byte_size" not in found:
        raise InvalidRequest(
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor "
            f"'{field.name}'"
        )
    return RegionSlice(region=found["region"], offset=found.get("offset", 0), size_bytes=found["byte_size"])


def _write_shared(message: pb.ModelInferResponse, output: SharedOutput) -> None:
    field = message.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    field.parameters["shared_memory_region"].string_param = output.data.region
    field.parameters["shared_memory_offset"].int64_param = output.data.offset
    field.parameters["shared_memory_byte_size"].int64_param = output.data.size_bytes


def _check_numbers(message: pb.ModelInferRequest) -> None:
    """Refuse what would take long or much memory to convert, before any of it is."""
    if len(message.parameters) > MAX_PARAMETERS:
        raise InvalidRequest(f"a request has at most {MAX_PARAMETERS:,} parameters")
    num_strings = num_values = 0
    for field in message.inputs[:MAX_TENSORS]:
        is_text = field.datatype == "BYTES"
        if not (is_text or field.HasField("contents")):
            continue
        count = codec.element_count(tuple(field.shape), field.name)
        if is_text:
            num_strings += count
        else:
            num_values += count
        if any(len(numbers) != count for _, numbers in field.contents.ListFields()):
            raise InvalidRequest(
                f"unexpected number of elements in the contents of input tensor {_quoted(field, message)}, its shape "
                f"says {count}",
                param=field.name,
            )
    if num_strings > MAX_STRINGS:
        raise PayloadTooLarge(f"a request has at most {MAX_STRINGS:,} strings, not {num_strings:,}")
    if num_values > MAX_TYPED_VALUES:
        raise PayloadTooLarge(
            f"a request has at most {MAX_TYPED_VALUES:,} values in contents, not {num_values:,}; use raw_input_contents"
        )


def _check_names(fields: Sequence[Any], kind: str) -> None:
    if len(fields) > MAX_TENSORS:
        raise InvalidRequest(f"a request has at most {MAX_TENSORS:,} {kind}s")
    if len(fields) > 1:
        names = [field.name for field in fields]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidRequest(f"{kind} '{twice}' already exists in request")


def _quoted(field: Any, message: pb.ModelInferRequest) -> str:
    return f"'{field.name}' for model '{message.model_name}'"
