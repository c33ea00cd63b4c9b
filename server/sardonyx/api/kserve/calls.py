"""What the HTTP and the gRPC front hand to the service, and what they get back. Knows neither wire format.

Floor 5.
"""

import msgspec

from sardonyx.tensors import Parameter, Tensor


class RegionSlice(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a registered shared-memory region."""

    region: str
    offset: int = 0
    size_bytes: int


class SharedInput(msgspec.Struct, frozen=True, kw_only=True):
    """An input whose bytes lie in shared memory."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: RegionSlice


class WantedOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output that a request names."""

    name: str
    num_classes: int = 0
    """Answer with the likeliest classes instead of the values; 0: with the values."""
    data: RegionSlice | None = None
    """Write it there instead of sending it."""


class WireRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One inference request as a protocol carries it. Names of inputs and of outputs are unique."""

    model_name: str
    model_version: str = ""
    """Empty: the highest that is ready."""
    id: str = ""
    inputs: list[Tensor | SharedInput]
    outputs: list[WantedOutput] = []
    """Empty: all of them."""
    parameters: dict[str, Parameter] = {}
    """All of the request's own: `priority`, `timeout`, `sequence_id` and so on are taken out by the service."""


class SharedOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output that was written to shared memory."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: RegionSlice
    """`size_bytes` is what was written."""


class WireReply(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    model_name: str
    model_version: str
    id: str = ""
    outputs: list[Tensor | SharedOutput]
    parameters: dict[str, Parameter] = {}
    """Of the answer; on streams `triton_final_response` is the front's own affair, from `is_final`."""
    is_final: bool = True


class IndexRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the repository index; a model that was never loaded has its name only."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class RegionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One registered system shared-memory region."""

    name: str
    key: str
    offset: int
    byte_size: int


class TraceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Triton's trace settings. This server keeps no traces: they can be read and, by the operator's leave, set."""

    trace_level: list[str] = msgspec.field(default_factory=lambda: ["OFF"])
    trace_rate: str = "1000"
    trace_count: str = "-1"
    log_frequency: str = "0"
    trace_file: str = ""
    trace_mode: str = "triton"


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Triton's log settings."""

    log_file: str = ""
    log_info: bool = True
    log_warning: bool = True
    log_error: bool = True
    log_verbose_level: int = 0
    log_format: str = "default"
