"""How sequences of a stateful model are put together: Triton's ``sequence_batching``.

Floor 1. Times are in seconds here; the file has microseconds.
"""

from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelSequenceBatching

from sardonyx.errors import ConfigError
from sardonyx.repository.config import FILE_NAME, is_plain_file_name
from sardonyx.repository.dynamic_batching import MICROSECONDS_PER_SECOND

DEFAULT_IDLE_US = 1_000_000

ControlKind = Literal["start", "ready", "end", "corrid"]

_Control = ModelSequenceBatching.Control
_KINDS: dict[int, ControlKind] = {
    _Control.CONTROL_SEQUENCE_START: "start",
    _Control.CONTROL_SEQUENCE_READY: "ready",
    _Control.CONTROL_SEQUENCE_END: "end",
    _Control.CONTROL_SEQUENCE_CORRID: "corrid",
}
_PAIRS = {
    "int32_false_true": DataType.Value("TYPE_INT32"),
    "fp32_false_true": DataType.Value("TYPE_FP32"),
    "bool_false_true": DataType.Value("TYPE_BOOL"),
}
_ID_TYPES = frozenset(map(DataType.Value, ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")))


class ControlInput(msgspec.Struct, frozen=True, kw_only=True):
    """An input that the server fills to tell the model where a row stands in its sequence; shape (1) for each row."""

    name: str
    kind: ControlKind
    data_type: int
    """Number of ModelConfig's enum."""
    false_value: bool | int | float = 0
    true_value: bool | int | float = 1
    """Both mean nothing for ``corrid``, whose value is the sequence's id."""


class StateTensor(msgspec.Struct, frozen=True, kw_only=True):
    """Implicit state: what the model writes to an output is its input at the sequence's next step."""

    input_name: str
    output_name: str
    data_type: int
    """Number of ModelConfig's enum."""
    dims: tuple[int, ...]
    """Without batch axis; -1 where any size goes."""
    initial_dims: tuple[int, ...]
    """Of the first step, without batch axis, all of them fixed."""
    initial_file: str | None = None
    """In the model's folder ``initial_state``; ``None``: zeros."""


class SequenceBatching(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a model's sequence batching."""

    strategy: Literal["direct", "oldest"]
    """A slot of a batch for each sequence until its end; or the sequences that wait longest, in any slot."""
    max_idle_s: float
    """A sequence without requests for so long is over."""
    max_candidate_sequences: int = 0
    """Live sequences that batches are made of, by instance; only ``oldest``."""
    preferred_batch_sizes: tuple[int, ...] = ()
    """Ascending; only ``oldest``."""
    max_queue_delay_s: float = 0.0
    minimum_slot_utilization: float = 0.0
    """Part of the slots, 0 to 1, that must have a request before a step is worth it; only ``direct``."""
    preserve_ordering: bool = False
    """Only ``oldest``."""
    controls: list[ControlInput] = []
    states: list[StateTensor] = []


def read_sequence_batching(config: ModelConfig, *, file: str = FILE_NAME) -> SequenceBatching | None:
    """Check and read the options; ``None`` where the config has none.

    Raises:
        ConfigError: controls or states that contradict themselves, numbers out of range.
    """
    if not config.HasField("sequence_batching"):
        return None
    options = config.sequence_batching
    controls = list(_controls(config, file))
    states = [_state(state, f"sequence_batching.state[{index}]", file) for index, state in enumerate(options.state)]
    max_idle_s = (options.max_sequence_idle_microseconds or DEFAULT_IDLE_US) / MICROSECONDS_PER_SECOND
    if options.WhichOneof("strategy_choice") == "oldest":
        oldest = options.oldest
        _check_oldest(config, file)
        return SequenceBatching(
            strategy="oldest",
            max_idle_s=max_idle_s,
            max_candidate_sequences=oldest.max_candidate_sequences,
            preferred_batch_sizes=tuple(sorted(set(oldest.preferred_batch_size))),
            max_queue_delay_s=oldest.max_queue_delay_microseconds / MICROSECONDS_PER_SECOND,
            preserve_ordering=oldest.preserve_ordering,
            controls=controls,
            states=states,
        )
    direct = options.direct
    if not 0 <= direct.minimum_slot_utilization <= 1:  # also not a number
        reason = f"sequence batching minimum slot utilization must be in range (0.0, 1.0] for {config.name}"
        raise ConfigError(reason, file=file, field="sequence_batching.direct.minimum_slot_utilization")
    return SequenceBatching(
        strategy="direct",
        max_idle_s=max_idle_s,
        max_queue_delay_s=direct.max_queue_delay_microseconds / MICROSECONDS_PER_SECOND,
        minimum_slot_utilization=direct.minimum_slot_utilization,
        controls=controls,
        states=states,
    )


def _check_oldest(config: ModelConfig, file: str) -> None:
    oldest = config.sequence_batching.oldest
    if oldest.max_candidate_sequences < 1:
        raise ConfigError(
            "must be at least 1: no sequence would run",
            file=file,
            field="sequence_batching.oldest.max_candidate_sequences",
        )
    for size in oldest.preferred_batch_size:
        if not 0 < size <= config.max_batch_size:
            limit = "positive" if size <= 0 else "<= max batch size"
            reason = f"sequence batching preferred batch size must be {limit} for {config.name}"
            raise ConfigError(reason, file=file, field="sequence_batching.oldest.preferred_batch_size")


def _controls(config: ModelConfig, file: str) -> Iterator[ControlInput]:
    names, kinds = set(), set()
    for index, item in enumerate(config.sequence_batching.control_input):
        where = f"sequence_batching.control_input[{index}]"
        if not item.name:
            reason = f"sequence batching control tensor must have a name for {config.name}"
            raise ConfigError(reason, file=file, field=f"{where}.name")
        if item.name in names or len(item.control) > 1:
            reason = (
                f"sequence batching control tensor '{item.name}' is specified for multiple control kinds for "
                f"{config.name}"
            )
            raise ConfigError(reason, file=file, field=f"{where}.name")
        if not item.control:
            raise ConfigError("says nothing of what the tensor tells", file=file, field=f"{where}.control")
        control = item.control[0]
        if control.kind in kinds:
            reason = f"sequence batching specifies multiple {_kind_name(control)} tensors for {config.name}"
            raise ConfigError(reason, file=file, field=f"{where}.control[0].kind")
        names.add(item.name)
        kinds.add(control.kind)
        try:
            yield _id_control(item) if _KINDS[control.kind] == "corrid" else _flag_control(item)
        except ValueError as error:
            reason = f"{error} for {_kind_name(control)} for {config.name}"
            raise ConfigError(reason, file=file, field=f"{where}.control[0]") from error


def _kind_name(control: Any) -> str:
    return str(_Control.Kind.Name(control.kind))


def _flag_control(item: Any) -> ControlInput:  # a ControlInput message: tritonclient is untyped
    """Raises ValueError for anything but one pair of values."""
    control = item.control[0]
    given = [name for name in _PAIRS if len(getattr(control, name))]
    if not given:
        raise ValueError(
            "sequence batching must specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true'"
        )
    if len(given) > 1:
        raise ValueError(
            "sequence batching specifies more than one from 'int32_false_true', 'fp32_false_true' and 'bool_false_true'"
        )
    pair = getattr(control, given[0])
    if len(pair) != 2:
        raise ValueError(f"sequence batching control '{given[0]}' must have exactly 2 entries")
    if control.data_type not in {0, _PAIRS[given[0]]}:
        raise ValueError(f"data_type contradicts {given[0]}")
    return ControlInput(
        name=item.name,
        kind=_KINDS[control.kind],
        data_type=_PAIRS[given[0]],
        false_value=pair[0],
        true_value=pair[1],
    )


def _id_control(item: Any) -> ControlInput:
    """Raises ValueError for a pair of values or a data type that ids cannot have."""
    control = item.control[0]
    if any(len(getattr(control, name)) for name in _PAIRS):
        raise ValueError(
            "sequence batching must not specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true'"
        )
    if control.data_type not in _ID_TYPES:
        raise ValueError(
            "unexpected data type (allowed are TYPE_UINT64, TYPE_INT64, TYPE_UINT32, TYPE_INT32 and TYPE_STRING)"
        )
    return ControlInput(name=item.name, kind="corrid", data_type=control.data_type)


def _state(state: Any, where: str, file: str) -> StateTensor:  # a State message: tritonclient is untyped
    for name in ("input_name", "output_name", "data_type", "dims"):
        if not getattr(state, name):
            raise ConfigError("must be given", file=file, field=f"{where}.{name}")
    if any(dim < 1 and dim != -1 for dim in state.dims):
        reason = "dimension must be integer >= 1, or -1 to indicate a variable-size dimension"
        raise ConfigError(reason, file=file, field=f"{where}.dims")
    dims = tuple(state.dims)
    # Triton begins with 1 where the size may vary and the config does not say more.
    initial_dims, initial_file = tuple(1 if dim == -1 else dim for dim in dims), None
    if len(state.initial_state) > 1:
        raise ConfigError("must be one at most", file=file, field=f"{where}.initial_state")
    if state.initial_state:
        initial_dims, initial_file = _initial(state, dims, f"{where}.initial_state[0]", file)
    return StateTensor(
        input_name=state.input_name,
        output_name=state.output_name,
        data_type=state.data_type,
        dims=dims,
        initial_dims=initial_dims,
        initial_file=initial_file,
    )


def _initial(state: Any, dims: tuple[int, ...], where: str, file: str) -> tuple[tuple[int, ...], str | None]:
    initial = state.initial_state[0]
    if initial.data_type != state.data_type:
        raise ConfigError("must be the state's own", file=file, field=f"{where}.data_type")
    sizes = tuple(initial.dims)
    fits = len(sizes) == len(dims) and all(dim in {-1, size} for dim, size in zip(dims, sizes, strict=True))
    if not fits or any(size < 1 for size in sizes):
        reason = f"is {list(sizes)}; it must be the state's dims {list(dims)} with every size fixed"
        raise ConfigError(reason, file=file, field=f"{where}.dims")
    match initial.WhichOneof("state_data"):
        case "zero_data":
            return sizes, None
        case "data_file":
            if not is_plain_file_name(initial.data_file):
                raise ConfigError("is not a plain file name", file=file, field=f"{where}.data_file")
            return sizes, initial.data_file
        case _:
            raise ConfigError("needs zero_data or data_file", file=file, field=where)
