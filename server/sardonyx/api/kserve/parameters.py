"""Request parameters that the protocol gives a meaning, taken out of those that the model may have one for.

Floor 5. Pure.

Source: Triton, docs/protocol/extension_sequence.md, extension_schedule_policy.md, extension_parameters.md.
"""

from collections.abc import Mapping

import msgspec

from sardonyx.errors import InvalidRequest
from sardonyx.tensors import Parameter, SequenceControl

_MAX_SEQUENCE_ID_CHARS = 128


class RequestParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What a request's parameters say."""

    priority: int = 0
    timeout_us: int = 0
    sequence: SequenceControl | None = None
    others: dict[str, Parameter] = {}


def read_parameters(parameters: Mapping[str, Parameter]) -> RequestParameters:
    """Sort parameters by who they are for.

    Raises:
        InvalidRequest: one of the protocol's has a wrong type or value, or a name begins with ``triton_``.
    """
    others = dict(parameters)
    priority = _count(others, "priority")
    timeout_us = _count(others, "timeout")
    sequence_id = others.pop("sequence_id", 0)
    if isinstance(sequence_id, bool) or not isinstance(sequence_id, int | str):
        raise InvalidRequest("sequence_id: expected a number or a string", param="sequence_id")
    if isinstance(sequence_id, int) and not 0 <= sequence_id < 1 << 64:
        raise InvalidRequest("sequence_id: expected 0 <= number < 2**64", param="sequence_id")
    if isinstance(sequence_id, str) and len(sequence_id) > _MAX_SEQUENCE_ID_CHARS:
        raise InvalidRequest(f"sequence_id: at most {_MAX_SEQUENCE_ID_CHARS} characters", param="sequence_id")
    is_start, is_end = _flag(others, "sequence_start"), _flag(others, "sequence_end")
    others.pop("binary_data_output", None)
    others.pop("triton_enable_empty_final_response", None)
    for name in others:
        if name.startswith("triton_"):
            raise InvalidRequest(
                f"parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified, "
                f"received '{name[:80]}'",
                param=name[:80],
            )
    sequence = SequenceControl(id=sequence_id, is_start=is_start, is_end=is_end) if sequence_id else None
    return RequestParameters(priority=priority, timeout_us=timeout_us, sequence=sequence, others=others)


def _count(parameters: dict[str, Parameter], name: str) -> int:
    value = parameters.pop(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise InvalidRequest(f"{name}: expected a whole number from 0", param=name)
    return value


def _flag(parameters: dict[str, Parameter], name: str) -> bool:
    value = parameters.pop(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}: expected true or false", param=name)
    return value
