import pytest
from tests.repository.configs import TENSORS, read, refusal

from sardonyx.repository.dynamic_batching import DynamicBatching, QueuePolicy


def dynamic(options: str, max_batch_size: int = 8) -> str:
    return TENSORS + f"max_batch_size: {max_batch_size} dynamic_batching {{ {options} }}"


def test_every_option_is_read_in_seconds():
    config = read(
        dynamic(
            """
            preferred_batch_size: [ 8, 4, 4 ]
            max_queue_delay_microseconds: 1500
            priority_levels: 3
            default_priority_level: 2
            default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 250000 max_queue_size: 10 }
            priority_queue_policy { key: 1 value { allow_timeout_override: true } }
            """
        )
    )
    assert config.dynamic == DynamicBatching(
        preferred_batch_sizes=(4, 8),
        max_queue_delay_s=0.0015,
        num_priority_levels=3,
        default_priority=2,
        default_queue_policy=QueuePolicy(timeout_action="delay", default_timeout_s=0.25, max_queue_size=10),
        queue_policies={1: QueuePolicy(allows_timeout_override=True)},
    )


def test_empty_options_count_as_present():
    assert read(dynamic("")).dynamic == DynamicBatching()
    assert read(TENSORS).dynamic is None


def test_one_level_may_keep_the_order():
    options = "preserve_ordering: true priority_levels: 1 default_priority_level: 1"
    batching = read(dynamic(options)).dynamic
    assert batching is not None
    assert (batching.preserve_ordering, batching.num_priority_levels) == (True, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("preferred_batch_size: 0", "preferred_batch_size: dynamic batching preferred size must be positive for m"),
        (
            "preferred_batch_size: 9",
            "preferred_batch_size: dynamic batching preferred size must be <= max batch size for m",
        ),
        (
            "priority_levels: 2",
            "default_priority_level: default priority level must be in range [1, 2] for m",
        ),
        (
            "priority_levels: 2 default_priority_level: 3",
            "default_priority_level: default priority level must be in range [1, 2] for m",
        ),
        (
            "priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value { } }",
            "priority_queue_policy: priority queue policy must have priority level in range [1, 2] for m",
        ),
        ("default_priority_level: 1", "default_priority_level: needs priority_levels"),
        ("priority_queue_policy { key: 1 value { } }", "priority_queue_policy: needs priority_levels"),
        ("priority_levels: 1025 default_priority_level: 1", "priority_levels: is 1,025; there can be 1,024"),
        (
            "preserve_ordering: true priority_levels: 2 default_priority_level: 1",
            "priority_levels: Only one priority level is allowed when 'preserve_ordering' is true for m",
        ),
        (
            "preserve_ordering: true default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1 }",
            "default_queue_policy.timeout_action: Queue policy can not have DELAY as timeout action when",
        ),
        (
            "preserve_ordering: true priority_levels: 1 default_priority_level: 1 priority_queue_policy "
            "{ key: 1 value { timeout_action: DELAY default_timeout_microseconds: 1 } }",
            "priority_queue_policy[1].timeout_action: Queue policy can not have DELAY as timeout action when",
        ),
    ],
)
def test_contradiction_is_refused_by_field(options, message):
    assert refusal(dynamic(options)).startswith(f"c.pbtxt: dynamic_batching.{message}")


def test_model_without_batches_may_have_queue_policies():
    options = "default_queue_policy { max_queue_size: 1 }"
    batching = read(dynamic(options, max_batch_size=0)).dynamic
    assert batching == DynamicBatching(default_queue_policy=QueuePolicy(max_queue_size=1))
