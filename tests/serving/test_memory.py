import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.errors import ConfigError
from sardonyx.runtime.device_memory import DeviceMemory
from sardonyx.serving.memory import DeviceBudgets, KvBudget, KvShare, MemoryBudget, MemoryNeed, MemoryShare

MIB = 1 << 20


class Place:
    """Memory that models take while they load and free when they are closed; others take from it too."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes

    def load(self, budget: MemoryBudget, name: str, need: MemoryNeed) -> MemoryShare:
        share = budget.take(name, need)
        self.free_bytes -= share.num_bytes
        budget.settle(share)
        return share

    def close(self, budget: MemoryBudget, share: MemoryShare) -> None:
        self.free_bytes += share.num_bytes
        budget.give_back(share)


def test_a_model_gets_its_weights_and_as_much_cache_as_is_left() -> None:
    budget = MemoryBudget("cuda:0", lambda: 100, limit_bytes=90)
    share = budget.take("a", MemoryNeed(weights_bytes=40, workspace_bytes=10, kv_bytes=1000, least_kv_bytes=5))
    assert (share.num_bytes, share.kv_bytes) == (90, 40)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    place = Place(100 * MIB)
    budget = MemoryBudget("cuda:0", lambda: place.free_bytes, limit_bytes=90 * MIB, remedy="lower max_model_len")
    place.load(budget, "a", MemoryNeed(weights_bytes=50 * MIB))
    budget.take("b", MemoryNeed(weights_bytes=10 * MIB))
    need = MemoryNeed(weights_bytes=20 * MIB, workspace_bytes=8 * MIB, kv_bytes=90 * MIB, least_kv_bytes=4 * MIB)
    message = (
        "needs 32 MiB on cuda:0 (weights 20 MiB, workspace 8 MiB, the least KV cache 4 MiB): 50 MiB are free, 10 MiB "
        "of it for models that are being loaded, this server may take 90 MiB and holds 60 MiB; lower max_model_len"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        budget.take("c", need)


def test_two_loads_at_once_are_not_promised_the_same_memory() -> None:
    budget = MemoryBudget("cuda:0", lambda: 100)
    first = budget.take("a", MemoryNeed(weights_bytes=60))
    with pytest.raises(ConfigError, match="needs"):
        budget.take("b", MemoryNeed(weights_bytes=60))
    budget.give_back(first)  # its load failed
    assert budget.take("b", MemoryNeed(weights_bytes=60)).num_bytes == 60


def test_what_others_took_from_a_card_is_not_promised() -> None:
    place = Place(100)
    budget = MemoryBudget("cuda:0", lambda: place.free_bytes, limit_bytes=90)
    place.free_bytes = 30
    with pytest.raises(ConfigError, match="needs"):
        budget.take("a", MemoryNeed(weights_bytes=31))
    assert budget.take("a", MemoryNeed(weights_bytes=30)).num_bytes == 30


def test_an_unloaded_model_makes_room() -> None:
    place = Place(100)
    budget = MemoryBudget("cuda:0", lambda: place.free_bytes, limit_bytes=90)
    share = place.load(budget, "a", MemoryNeed(weights_bytes=80))
    with pytest.raises(ConfigError, match="needs"):
        budget.take("a", MemoryNeed(weights_bytes=80))  # a reload beside it would not fit
    place.close(budget, share)
    place.close(budget, place.load(budget, "a", MemoryNeed(weights_bytes=90)))
    assert budget.take("b", MemoryNeed(weights_bytes=90)).num_bytes == 90


def test_models_that_are_expected_leave_each_other_an_equal_part() -> None:
    place = Place(100)
    budget = MemoryBudget("cuda:0", lambda: place.free_bytes, num_models=2)
    need = MemoryNeed(weights_bytes=10, kv_bytes=1000, least_kv_bytes=1)
    first, second = place.load(budget, "a", need), place.load(budget, "b", need)
    assert (first.kv_bytes, second.kv_bytes) == (40, 40)


def test_each_card_has_a_budget_of_its_own() -> None:
    free = {0: 1000, 1: 500}
    budgets = DeviceBudgets(0.9, measure=lambda number: DeviceMemory(free_bytes=free[number], total_bytes=1000))
    assert budgets.on(0) is budgets.on(0)
    assert budgets.on(0).take("a", MemoryNeed(weights_bytes=900)).num_bytes == 900
    free[1] = 2000  # the limit is a share of what was free at first
    with pytest.raises(ConfigError, match=r"cuda:1"):
        budgets.on(1).take("a", MemoryNeed(weights_bytes=2 * MIB))
    with pytest.raises(ConfigError, match=r"device_memory_fraction"):
        budgets.on(0).take("b", MemoryNeed(weights_bytes=1))


@settings(deadline=None)
@given(
    free=st.integers(0, 1000),
    limit=st.none() | st.integers(0, 1000),
    num_models=st.integers(1, 4),
    moves=st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 300), st.integers(0, 300), st.integers(-100, 100))
    ),
)
def test_promises_never_exceed_what_is_free_nor_the_limit(
    free: int, limit: int | None, num_models: int, moves: list[tuple[str, int, int, int]]
) -> None:
    place = Place(free)
    budget = MemoryBudget("cuda:0", lambda: place.free_bytes, limit_bytes=limit, num_models=num_models)
    held: dict[str, MemoryShare] = {}
    for name, weights, kv, taken_by_others in moves:
        if name in held:
            place.close(budget, held.pop(name))
            continue
        place.free_bytes = max(0, place.free_bytes - taken_by_others)
        try:
            share = place.load(budget, name, MemoryNeed(weights_bytes=weights, kv_bytes=kv, least_kv_bytes=min(kv, 5)))
        except ConfigError:
            continue
        held[name] = share
        assert place.free_bytes >= 0
        assert weights + min(kv, 5) <= share.num_bytes <= weights + kv
        assert limit is None or sum(each.num_bytes for each in held.values()) <= limit


def test_models_that_are_expected_share_what_is_left_equally() -> None:
    budget = KvBudget(90, num_models=3)
    assert [budget.take(name, wanted).num_bytes for name, wanted in (("a", 1000), ("b", 10), ("c", 1000))] == [
        30,
        10,
        50,
    ]
    assert budget.take("d", 1000).num_bytes == 0


def test_a_new_version_takes_the_part_of_the_one_it_replaces() -> None:
    budget = KvBudget(90)
    old = budget.take("a", 80)
    new = budget.take("a", 85)
    assert new.num_bytes == 85
    budget.give_back(old)
    assert budget.take("b", 90).num_bytes == 5
    budget.give_back(new)
    budget.give_back(new)
    assert budget.take("c", 90).num_bytes == 85


def test_what_an_operator_claims_is_given_and_missing_for_others() -> None:
    budget = KvBudget(90, num_models=2)
    assert budget.claim("a", 80).num_bytes == 80
    assert budget.take("b", 50).num_bytes == 10
    assert budget.claim("c", 500).num_bytes == 500
    assert budget.take("d", 50).num_bytes == 0


@settings(deadline=None)
@given(
    total=st.integers(0, 1000),
    num_models=st.integers(1, 5),
    moves=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 500), st.booleans())),
)
def test_models_never_hold_more_than_the_budget_together(
    total: int, num_models: int, moves: list[tuple[str, int, bool]]
) -> None:
    budget = KvBudget(total, num_models)
    held: dict[str, KvShare] = {}
    for name, wanted, is_taking in moves:
        if is_taking:
            new = budget.take(name, wanted)
            assert 0 <= new.num_bytes <= wanted
            if name in held:
                budget.give_back(held[name])
            held[name] = new
        elif name in held:
            budget.give_back(held.pop(name))
        assert sum(share.num_bytes for share in held.values()) <= total
