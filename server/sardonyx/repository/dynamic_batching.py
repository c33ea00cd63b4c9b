"""How requests of a stateless model are put together: Triton's ``dynamic_batching``.

Floor 1. Times are in seconds here; the file has microseconds.
"""

from typing import Any, Literal

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelQueuePolicy

from sardonyx.errors import ConfigError
from sardonyx.repository.config import FILE_NAME

MAX_PRIORITY_LEVELS = 1024
"""A queue is kept for each, so a number from a file is bounded."""
MICROSECONDS_PER_SECOND = 1_000_000


class QueuePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how many requests wait, of one priority level."""

    timeout_action: Literal["reject", "delay"] = "reject"
    """What becomes of a request whose time is over: an error, or a place behind all others."""
    default_timeout_s: float = 0.0
    """0: none."""
    allows_timeout_override: bool = False
    """A request may lower the default timeout."""
    max_queue_size: int = 0
    """Requests; 0: as many as admission lets in."""


class DynamicBatching(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a model's dynamic batching."""

    preferred_batch_sizes: tuple[int, ...] = ()
    """Ascending, without repeats. Empty only where the model does not batch."""
    max_queue_delay_s: float = 0.0
    """How long a batch below a preferred size waits for more requests."""
    preserve_ordering: bool = False
    """Answers leave in the order in which requests came."""
    num_priority_levels: int = 0
    """1 is the most urgent. 0: no levels, all requests are equal."""
    default_priority: int = 0
    """Level of requests that name none; 0 where there are no levels."""
    default_queue_policy: QueuePolicy = QueuePolicy()
    queue_policies: dict[int, QueuePolicy] = {}
    """By level; those that are missing have the default one."""


def read_dynamic_batching(config: ModelConfig, *, file: str = FILE_NAME) -> DynamicBatching | None:
    """Check and read the options; ``None`` where the config has none.

    Raises:
        ConfigError: preferred sizes beyond the largest batch, levels or policies that contradict each other.
    """
    if not config.HasField("dynamic_batching"):
        return None
    options = config.dynamic_batching
    _check_preferred(config, file)
    _check_priorities(config, file)
    if options.preserve_ordering:
        _check_ordering(config, file)
    return DynamicBatching(
        preferred_batch_sizes=tuple(sorted(set(options.preferred_batch_size))),
        max_queue_delay_s=options.max_queue_delay_microseconds / MICROSECONDS_PER_SECOND,
        preserve_ordering=options.preserve_ordering,
        num_priority_levels=options.priority_levels,
        default_priority=options.default_priority_level,
        default_queue_policy=_queue_policy(options.default_queue_policy),
        queue_policies={
            level: _queue_policy(policy) for level, policy in sorted(options.priority_queue_policy.items())
        },
    )


def _check_preferred(config: ModelConfig, file: str) -> None:
    field = "dynamic_batching.preferred_batch_size"
    for size in config.dynamic_batching.preferred_batch_size:
        if size <= 0:
            raise ConfigError(
                f"dynamic batching preferred size must be positive for {config.name}", file=file, field=field
            )
        if size > config.max_batch_size:
            raise ConfigError(
                f"dynamic batching preferred size must be <= max batch size for {config.name}", file=file, field=field
            )


def _check_priorities(config: ModelConfig, file: str) -> None:
    options = config.dynamic_batching
    levels = options.priority_levels
    if levels > MAX_PRIORITY_LEVELS:
        reason = f"is {levels:,}; there can be {MAX_PRIORITY_LEVELS:,}"
        raise ConfigError(reason, file=file, field="dynamic_batching.priority_levels")
    if levels == 0:
        for name in ("default_priority_level", "priority_queue_policy"):
            if getattr(options, name):
                raise ConfigError("needs priority_levels", file=file, field=f"dynamic_batching.{name}")
        return
    if not 1 <= options.default_priority_level <= levels:
        reason = f"default priority level must be in range [1, {levels}] for {config.name}"
        raise ConfigError(reason, file=file, field="dynamic_batching.default_priority_level")
    if any(not 1 <= level <= levels for level in options.priority_queue_policy):
        reason = f"priority queue policy must have priority level in range [1, {levels}] for {config.name}"
        raise ConfigError(reason, file=file, field="dynamic_batching.priority_queue_policy")


def _check_ordering(config: ModelConfig, file: str) -> None:
    options = config.dynamic_batching
    if options.priority_levels > 1:
        reason = f"Only one priority level is allowed when 'preserve_ordering' is true for {config.name}"
        raise ConfigError(reason, file=file, field="dynamic_batching.priority_levels")
    policies = {"default_queue_policy": options.default_queue_policy} | {
        f"priority_queue_policy[{level}]": policy for level, policy in options.priority_queue_policy.items()
    }
    for name, policy in policies.items():
        if policy.default_timeout_microseconds and policy.timeout_action == ModelQueuePolicy.DELAY:
            reason = (
                f"Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for {config.name}"
            )
            raise ConfigError(reason, file=file, field=f"dynamic_batching.{name}.timeout_action")


def _queue_policy(policy: Any) -> QueuePolicy:  # ModelQueuePolicy: tritonclient is untyped
    return QueuePolicy(
        timeout_action="delay" if policy.timeout_action == ModelQueuePolicy.DELAY else "reject",
        default_timeout_s=policy.default_timeout_microseconds / MICROSECONDS_PER_SECOND,
        allows_timeout_override=policy.allow_timeout_override,
        max_queue_size=policy.max_queue_size,
    )
