"""The answer to an inference request over HTTP: JSON, perhaps with the tensors' bytes behind it.

Floor 5.

Source: KServe V2 protocol, "Inference Response JSON Object"; Triton, docs/protocol/extension_binary_data.md.
"""

from typing import Any

import msgspec

from sardonyx.api.kserve.body import MAX_INLINE_BYTES
from sardonyx.api.kserve.calls import SharedOutput, WireReply
from sardonyx.api.kserve.codec import to_raw
from sardonyx.api.kserve.exchange import JSON_TYPE, Reply
from sardonyx.api.kserve.infer_request import HEADER_LENGTH, ParsedRequest
from sardonyx.api.kserve.json_tensor import to_json
from sardonyx.tensors import Parameter, Tensor

_BINARY_TYPE = (b"content-type", b"application/octet-stream")
_HEADER_LENGTH = HEADER_LENGTH.encode()
VALUE_BYTES = 32
"""A value counts as so many bytes where it is asked whether to write it on the event loop."""


class OutputJson(msgspec.Struct, frozen=True, omit_defaults=True):
    """A member of ``outputs``."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] = {}
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ReplyJson(msgspec.Struct, frozen=True, omit_defaults=True):
    """The JSON of an answer."""

    model_name: str
    model_version: str
    outputs: list[OutputJson]
    id: str = ""
    parameters: dict[str, Parameter] = {}


_ENCODER = msgspec.json.Encoder()


def num_text_bytes(reply: WireReply, asked: ParsedRequest) -> int:
    """About what an answer that is made value by value, JSON or strings, would take as JSON text.

    For choosing where to make it.
    """
    return sum(
        output.array.size * VALUE_BYTES
        for output in reply.outputs
        if isinstance(output, Tensor)
        and (output.datatype == "BYTES" or not asked.binary.get(output.name, asked.is_binary))
    )


def encode_reply(reply: WireReply, asked: ParsedRequest) -> Reply:
    """The whole answer.

    Raises:
        InvalidRequest: an output cannot be JSON.
    """
    outputs: list[OutputJson] = []
    tail: list[bytes | memoryview] = []
    has_bytes = False
    for output in reply.outputs:
        shape = tuple(output.shape) if isinstance(output, SharedOutput) else output.array.shape
        if isinstance(output, SharedOutput):
            place: dict[str, Any] = {
                "shared_memory_region": output.data.region,
                "shared_memory_offset": output.data.offset,
                "shared_memory_byte_size": output.data.size_bytes,
            }
            outputs.append(OutputJson(output.name, output.datatype, shape, place))
        elif asked.binary.get(output.name, asked.is_binary):
            raw = to_raw(output)
            has_bytes = has_bytes or len(raw) > 0
            tail.append(raw)
            outputs.append(OutputJson(output.name, output.datatype, shape, {"binary_data_size": len(raw)}))
        else:
            outputs.append(OutputJson(output.name, output.datatype, shape, data=msgspec.Raw(to_json(output))))
    head = _ENCODER.encode(
        ReplyJson(reply.model_name, reply.model_version, outputs, id=reply.id, parameters=reply.parameters)
    )
    if not has_bytes:
        return Reply(head, headers=(JSON_TYPE,))
    headers = (_BINARY_TYPE, (_HEADER_LENGTH, b"%d" % len(head)))
    if sum(map(len, tail)) > MAX_INLINE_BYTES:
        return Reply(head, headers=headers, more=tuple(part for part in tail if len(part)))
    return Reply(b"".join((head, *tail)), headers=headers)
