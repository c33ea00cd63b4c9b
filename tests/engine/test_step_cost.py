import math
import random

import pytest

from sardonyx.engine.step_cost import StepCost, StepLoad


def measured_s(load: StepLoad) -> float:
    """SmolLM2-135M, int4, two cores, as measured when the engine was designed."""
    decodes_s = 1.6e-3 * load.num_decode_rows + 3.7e-6 * load.num_decode_past
    return 7e-3 + decodes_s + 1.42e-3 * load.num_prefill_tokens + 0.65e-6 * load.num_prefill_pairs


def load_of(chunks: list[tuple[int, int]], pasts: list[int]) -> StepLoad:
    load = StepLoad(num_decode_past=sum(pasts), num_decode_rows=len(pasts))
    for num_past, num_tokens in chunks:
        load.add_chunk(num_past, num_tokens)
    return load


@pytest.fixture
def cost() -> StepCost:
    """After eight short prompts and a hundred decodes, with 10 % noise."""
    random.seed(1)
    cost = StepCost()
    pasts = [random.randrange(50, 400) for _ in range(8)]
    loads = [load_of([(0, past)], []) for past in pasts]
    loads += [load_of([], [past + step for past in pasts]) for step in range(100)]
    for load in loads:
        cost.observe(load, measured_s(load) * random.uniform(0.9, 1.1))
    return cost


def test_mixed_step_is_foreseen_within_a_quarter(cost):
    load = load_of([(0, 100)], [300] * 8)
    assert cost.predict(load) == pytest.approx(measured_s(load), rel=0.25)


def test_growing_cost_of_a_long_prompt_is_followed(cost):
    num_past, errors = 0, []
    while num_past < 4000:
        load = load_of([(num_past, 64)], [400] * 8)
        errors.append(cost.predict(load) / measured_s(load) - 1)
        cost.observe(load, measured_s(load))
        num_past += 64
    assert max(map(abs, errors)) < 0.25
    assert abs(errors[-1]) < 0.05


def test_longest_chunk_costs_no_more_than_its_budget(cost):
    for num_past in (0, 1000, 8000):
        num_tokens = cost.max_chunk_tokens(num_past, 0.1)
        assert cost.chunk_s(num_past, num_tokens) <= 0.1 < cost.chunk_s(num_past, num_tokens + 1)


def test_one_slow_step_is_noise_and_two_are_news(cost):
    load = load_of([], [300] * 8)
    before_s = cost.predict(load)
    cost.observe(load, 20 * before_s)
    assert cost.predict(load) == before_s
    cost.observe(load, 20 * before_s)
    assert cost.predict(load) > 1.2 * before_s


def test_chunk_cost_survives_an_hour_of_decoding(cost):
    before_s = cost.chunk_s(0, 100)
    for step in range(30_000):
        load = load_of([], [300 + step % 1000] * 4)
        cost.observe(load, measured_s(load))
    assert cost.chunk_s(0, 100) == pytest.approx(before_s)
    load = load_of([(0, 100)], [300] * 4)
    cost.observe(load, measured_s(load))
    assert cost.chunk_s(0, 100) == pytest.approx(0.142, rel=0.25)


def test_nothing_is_promised_before_a_chunk_was_seen_unless_time_is_free():
    cost = StepCost()
    cost.observe(load_of([], [10]), 0.01)
    assert cost.max_chunk_tokens(0, 1.0) == 0
    assert cost.max_chunk_tokens(0, math.inf) > 1 << 20


def test_steps_that_take_no_time_leave_chunks_unbounded():
    cost = StepCost()
    cost.observe(load_of([(0, 10)], []), 0.0)
    assert cost.max_chunk_tokens(0, 0.1) > 1 << 20
