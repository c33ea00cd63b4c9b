import math

from hypothesis import given
from hypothesis import strategies as st

from sardonyx.engine.chunks import ChunkLimits, Prefill, divide_chunks
from sardonyx.engine.step_cost import StepCost, StepLoad


def prompt(num_tokens: int, num_computed: int = 0) -> Prefill:
    return Prefill(num_computed, num_tokens - num_computed)


def limits(**changes: float) -> ChunkLimits:
    values = {"max_chunk_tokens": 256, "max_tokens": 512, "max_s": math.inf, "min_tokens": 16, "min_oldest_tokens": 0}
    return ChunkLimits(**(values | changes))  # type: ignore[arg-type]  # ints among floats


def millisecond_a_token() -> StepCost:
    cost = StepCost()
    load = StepLoad()
    load.add_chunk(0, 100)
    cost.observe(load, 0.1)
    return cost


def test_single_prompt_gets_a_whole_chunk_when_time_is_free():
    assert divide_chunks([prompt(4000)], limits(), StepCost()) == [256]


def test_single_prompt_gets_what_fits_the_time():
    assert divide_chunks([prompt(4000)], limits(max_s=0.1), millisecond_a_token()) == [100]


def test_short_prompt_passes_a_long_one_that_still_advances():
    assert divide_chunks([prompt(4000), prompt(40)], limits(max_s=0.1), millisecond_a_token()) == [60, 40]
    assert divide_chunks([prompt(4000), prompt(90)], limits(max_s=0.1), millisecond_a_token()) == [25, 75]


def test_equal_prompts_finish_in_order_of_arrival():
    assert divide_chunks([prompt(100), prompt(100), prompt(100)], limits(max_s=0.1505), millisecond_a_token()) == [
        100,
        50,
        0,
    ]


def test_floor_is_shared_when_decodes_take_all_the_time():
    assert divide_chunks([prompt(4000), prompt(40)], limits(max_s=0.0), millisecond_a_token()) == [4, 12]


def test_floor_is_shared_when_the_cost_is_unknown():
    assert divide_chunks([prompt(4000), prompt(40)], limits(max_s=0.1), StepCost()) == [4, 12]


def test_overdue_prompt_gets_its_guard_and_the_others_their_part():
    chunks = divide_chunks([prompt(4000), prompt(40)], limits(max_s=0.0, min_oldest_tokens=64), millisecond_a_token())
    assert chunks == [64, 12]


def test_guard_adds_nothing_where_time_allows_more():
    for max_s, chunk in ((0.1, 100), (0.05, 64)):
        assert divide_chunks([prompt(4000)], limits(max_s=max_s, min_oldest_tokens=64), millisecond_a_token()) == [
            chunk
        ]


def test_prompt_with_a_limit_of_its_own_leaves_the_rest_to_others():
    prompts = [prompt(4000)._replace(max_tokens=30), prompt(300), prompt(200)._replace(max_tokens=0)]
    assert divide_chunks(prompts, limits(), StepCost()) == [30, 256, 0]


@given(
    sizes=st.lists(st.tuples(st.integers(2, 300), st.integers(0, 298)), min_size=1, max_size=6),
    max_chunk_tokens=st.integers(1, 64),
    max_tokens=st.integers(1, 128),
    max_s=st.sampled_from([0.0, 0.003, 0.01, 0.1, math.inf]),
    min_tokens=st.integers(1, 32),
    guard=st.integers(0, 64),
    is_known=st.booleans(),
)
def test_limits_hold_and_the_oldest_advances(sizes, max_chunk_tokens, max_tokens, max_s, min_tokens, guard, is_known):
    prompts = [prompt(total, min(computed, total - 1)) for total, computed in sizes]
    cost = millisecond_a_token() if is_known else StepCost()
    given_limits = ChunkLimits(max_chunk_tokens, max_tokens, max_s, min_tokens, guard)
    chunks = divide_chunks(prompts, given_limits, cost)
    assert all(0 <= chunk <= min(max_chunk_tokens, p.num_pending) for p, chunk in zip(prompts, chunks, strict=True))
    assert sum(chunks) <= max_tokens
    wanted = min(prompts[0].num_pending, max_chunk_tokens, max_tokens)
    assert chunks[0] >= min(max(1, guard), wanted)
    if len(prompts) == 1:
        assert chunks[0] >= min(min_tokens, wanted)
    if is_known and max_s >= 0.032:
        assert sum(chunks) <= max_s * 1e3 + max(1, guard)
