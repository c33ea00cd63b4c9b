"""What a KServe-v2 call may set beside its tensors. Floor 4."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from sardonyx.errors import InvalidRequest

P = TypeVar("P", bound=msgspec.Struct)


def convert_parameters(parameters: Mapping[str, Any], kind: type[P], owner: str) -> P:
    """A call's ``parameters`` as a struct.

    Args:
        parameters: as they came; over gRPC, and in tensors of strings, numbers and truths may be text.
        kind: the struct; a name that it does not have is refused, for it would change the answer in silence.
        owner: what messages call such a model.

    Raises:
        InvalidRequest: an unknown name, or a value of the wrong type or out of range.
    """
    for name in parameters:
        if name not in kind.__struct_fields__:
            known = ", ".join(kind.__struct_fields__)
            raise InvalidRequest(
                f"{name[:80]}: is no parameter of {owner}; there {f'are {known}' if known else 'is none'}",
                param=name[:80],
            )
    try:
        return msgspec.convert(dict(parameters), kind, strict=False)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        field = path.strip("`") or None
        reason = reason.replace(" | null", "").replace("Expected", "expected").replace("`", "")
        raise InvalidRequest(f"{field}: {reason}" if field else reason, param=field) from None
