"""Triton's generate extension: inputs and parameters side by side in one JSON object, and outputs likewise.

Floor 5.

Source: Triton, docs/protocol/extension_generate.md.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sardonyx.api.kserve.calls import SharedOutput, WireReply, WireRequest
from sardonyx.api.kserve.codec import element_count, from_values, to_values
from sardonyx.api.kserve.json_tensor import encode_values
from sardonyx.api.kserve.json_text import check_containers, check_nesting, has_more
from sardonyx.errors import InvalidRequest, PayloadTooLarge
from sardonyx.tensors import Parameter, Tensor, TensorMetadata

# What spells a surrogate, which without its other half no answer could repeat. Python's parser takes it.
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")

MAX_VALUES = 1 << 22
"""Python's parser, which tells of keys that come twice, takes 0.2 s for them, in which no thread runs Python."""
Pairs = list[tuple[str, Any]]


def read_request(body: bytes, inputs: Sequence[TensorMetadata], *, model_name: str, model_version: str) -> WireRequest:
    """The request that a body holds: keys that name an input become it, all others are parameters.

    Args:
        body: a JSON object. Its member ``parameters`` is an object whose members count as the body's own.
        inputs: the model's.
        model_name: from the path.
        model_version: from the path.

    Raises:
        InvalidRequest: it is no JSON object, a key comes twice, a value cannot be the input or a parameter.
        PayloadTooLarge: it has too many lists, objects or values.
    """
    by_name = {each.name: each for each in inputs}
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, Parameter] = {}
    request_id = ""
    for key, value in _members(_read_pairs(body), by_name):
        if key in by_name:
            if key in tensors:
                raise InvalidRequest(f"input '{key}' already exists in request", param=key)
            tensors[key] = _tensor(value, by_name[key])
        elif key == "id":
            if not isinstance(value, str):
                raise InvalidRequest("Unable to parse 'id': attempt to access JSON non-string as string", param="id")
            request_id = value
        else:
            if not isinstance(value, (bool, int, float, str)):
                raise InvalidRequest(
                    f"parameter '{key}' has invalid type. It should be either 'int', 'bool', 'double' or 'string'",
                    param=key,
                )
            parameters[key] = value
    return WireRequest(
        model_name=model_name,
        model_version=model_version,
        id=request_id,
        inputs=list(tensors.values()),
        parameters=parameters,
    )


def num_values(answer: WireReply) -> int:
    """How many values `encode_answer` writes; for choosing where."""
    return sum(output.array.size for output in answer.outputs if isinstance(output, Tensor))


def encode_answer(answer: WireReply) -> bytes:
    """One answer as a JSON object; outputs of one element are that element.

    Raises:
        InvalidRequest: an output cannot be JSON.
    """
    members: dict[str, Any] = {"id": answer.id} if answer.id else {}
    members |= {"model_name": answer.model_name, "model_version": answer.model_version, **answer.parameters}
    for output in answer.outputs:
        assert not isinstance(output, SharedOutput), "generate requests name no regions"
        values = to_values(output)
        members[output.name] = msgspec.Raw(encode_values(values[0] if len(values) == 1 else values, output))
    return msgspec.json.encode(members)


def _read_pairs(body: bytes) -> Pairs:
    """The members of the body, with those that come twice. msgspec keeps the last; Triton refuses."""
    check_nesting(body)
    check_containers(body)
    if has_more(body, b",", MAX_VALUES):
        raise PayloadTooLarge(f"the JSON has more than {MAX_VALUES:,} values; send them to infer")
    try:
        pairs = json.loads(body, object_pairs_hook=_Members)
    except (ValueError, RecursionError) as error:
        at = f" at {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest(f"failed to parse the request JSON buffer: invalid value{at}") from None
    if _HALF_PAIR.search(body):
        try:
            json.dumps(pairs, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidRequest("failed to parse the request JSON buffer: a string is not Unicode") from None
    if not isinstance(pairs, _Members):
        raise InvalidRequest("failed to parse the request JSON buffer: it is no JSON object")
    return pairs


class _Members(Pairs):
    """A JSON object's members, to be told from a list."""


def _members(pairs: Pairs, inputs: Mapping[str, TensorMetadata]) -> Pairs:
    """Those of ``parameters`` as the body's own."""
    members: Pairs = []
    for key, value in pairs:
        if key != "parameters" or key in inputs:
            members.append((key, value))
        elif isinstance(value, _Members):
            members.extend(value)
        else:
            raise InvalidRequest("Expected JSON object for 'parameters'", param="parameters")
    return members


def _tensor(value: Any, wanted: TensorMetadata) -> Tensor:
    """A scalar or a list as the input."""
    values = value if isinstance(value, list) and not isinstance(value, _Members) else [value]
    shape = _shape(wanted, len(values))
    return from_values(values, name=wanted.name, datatype=wanted.datatype, shape=shape)


def _shape(wanted: TensorMetadata, count: int) -> tuple[int, ...]:
    """So many elements in the input's shape: the innermost open dimension takes what the fixed ones leave."""
    dims = [1 if dim == -1 else dim for dim in wanted.shape]
    fixed = element_count(dims, wanted.name)
    innermost = max((axis for axis, dim in enumerate(wanted.shape) if dim == -1), default=-1)
    if innermost >= 0 and fixed and count % fixed == 0:
        dims[innermost] = count // fixed
    elif count != fixed:
        raise InvalidRequest(
            f"The schema can not convert input '{wanted.name}' to tensor with proper shape", param=wanted.name
        )
    return tuple(dims)
