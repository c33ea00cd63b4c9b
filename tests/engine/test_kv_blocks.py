from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from sardonyx.engine.kv_blocks import KvBlocks, pack_ids

SIZE = 4


def make_blocks(num_blocks: int = 9) -> KvBlocks:
    return KvBlocks(num_blocks, SIZE)


def hold(blocks: KvBlocks, ids: list[int]) -> list[int]:
    """A sequence comes and is computed; its block table."""
    matched = blocks.match(pack_ids(ids), len(ids) - 1)
    table = blocks.take(matched, blocks.num_needed(len(ids)) - len(matched))
    for index in range(len(matched), len(ids) // SIZE):
        blocks.fill(table, index, ids)
    return table


def use(blocks: KvBlocks, ids: list[int]) -> list[int]:
    """A sequence comes, is computed and goes."""
    table = hold(blocks, ids)
    blocks.release(table)
    return table


def run_of(token_id: int, num_blocks: int) -> list[int]:
    return [token_id] * (num_blocks * SIZE)


def test_full_blocks_are_found_held_or_free():
    blocks = make_blocks()
    table = hold(blocks, [*run_of(1, 2), 7])
    assert blocks.match(pack_ids(run_of(1, 4)), 4 * SIZE) == table[:2]
    blocks.release(table)
    assert blocks.match(pack_ids(run_of(1, 4)), 4 * SIZE) == table[:2]
    assert blocks.num_retained_tokens == 2 * SIZE


def test_last_token_is_never_taken_from_the_cache():
    blocks = make_blocks()
    table = use(blocks, run_of(1, 2))
    assert blocks.match(pack_ids(run_of(1, 2)), 2 * SIZE - 1) == table[:1]


def test_same_tokens_behind_others_are_another_content():
    blocks = make_blocks()
    use(blocks, [*run_of(1, 1), *run_of(2, 1)])
    assert blocks.match(pack_ids([*run_of(3, 1), *run_of(2, 1)]), 2 * SIZE) == []
    assert blocks.match(pack_ids(run_of(2, 1)), SIZE) == []


def test_shared_blocks_are_free_when_the_last_holder_leaves():
    blocks = make_blocks()
    tables = [hold(blocks, [*run_of(1, 2), 5 + i]) for i in range(2)]
    assert tables[0][:2] == tables[1][:2]
    assert blocks.num_held == 4
    blocks.release(tables[0])
    assert blocks.num_held == 3
    blocks.release(tables[1])
    assert blocks.num_held == 0


def test_sharing_a_free_block_takes_it():
    blocks = make_blocks(num_blocks=4)
    table = use(blocks, [*run_of(1, 2), 7])
    matched = blocks.match(pack_ids(run_of(1, 3)), 2 * SIZE)
    assert blocks.num_free_among(matched) == 2
    again = blocks.take(matched, 1)
    assert again[:2] == table[:2]
    assert (blocks.num_free, blocks.num_retained_tokens) == (0, 0)


def test_empty_blocks_go_first_and_then_the_least_recently_used_from_its_end():
    blocks = make_blocks(num_blocks=7)
    first, second = use(blocks, run_of(1, 2)), use(blocks, run_of(2, 2))
    use(blocks, [*run_of(1, 2), 9])
    order = blocks.take([], 6)
    assert set(order[:2]).isdisjoint(first + second)
    assert order[2:] == [second[1], second[0], first[1], first[0]]


def test_taken_block_is_not_found_by_what_it_held():
    blocks = make_blocks(num_blocks=3)
    use(blocks, run_of(1, 2))
    blocks.take([], 1)
    assert len(blocks.match(pack_ids(run_of(1, 3)), 2 * SIZE)) == 1
    blocks.take([], 1)
    assert blocks.match(pack_ids(run_of(1, 3)), 2 * SIZE) == []


def test_same_content_computed_twice_stays_when_the_found_one_is_taken():
    blocks = make_blocks(num_blocks=3)
    first, second = blocks.take([], 1), blocks.take([], 1)
    blocks.fill(first, 0, run_of(1, 1))
    blocks.fill(second, 0, run_of(1, 1))
    assert blocks.match(pack_ids(run_of(1, 1)), SIZE) == first
    blocks.release(first)
    assert blocks.take([], 1) == first
    blocks.release(second)
    assert blocks.match(pack_ids(run_of(1, 1)), SIZE) == second


def test_same_content_computed_twice_is_kept_once():
    blocks = make_blocks(num_blocks=3)
    first, second = blocks.take([], 1), blocks.take([], 1)
    for table in (first, second):
        blocks.fill(table, 0, run_of(1, 1))
    blocks.release(first)
    blocks.release(second)
    assert blocks.num_retained_tokens == SIZE
    assert blocks.take([], 1) == second


def test_what_is_behind_a_content_computed_twice_is_found_whoever_computed_it():
    blocks = make_blocks()
    first, second = blocks.take([], 1), blocks.take([], 2)
    blocks.fill(first, 0, run_of(1, 1))
    blocks.fill(second, 0, run_of(1, 1))
    blocks.fill(second, 1, run_of(1, 2))
    assert blocks.match(pack_ids(run_of(1, 2)), 2 * SIZE) == [first[0], second[1]]


def test_what_is_not_valid_is_never_found_again():
    blocks = make_blocks()
    table = hold(blocks, run_of(1, 3))
    sharer = hold(blocks, [*run_of(1, 2), *run_of(2, 1), 9])
    also = hold(blocks, [*run_of(1, 2), 9])
    blocks.release(table, is_valid=False)
    assert blocks.match(pack_ids(run_of(1, 3)), 3 * SIZE) == []
    # Nor is anything behind it, whether it was computed before or comes later.
    blocks.fill(also, 2, [*run_of(1, 2), *run_of(5, 1)])
    blocks.extend(sharer)
    blocks.fill(sharer, 3, [*run_of(1, 2), *run_of(2, 1), *run_of(3, 1)])
    blocks.release(sharer)
    blocks.release(also)
    assert blocks.num_retained_tokens == 2 * SIZE, "the sharer's own two, until they are taken"
    assert blocks.match(pack_ids([*run_of(1, 2), *run_of(2, 1)]), 3 * SIZE) == []
    again = hold(blocks, run_of(1, 2))
    assert blocks.match(pack_ids([*run_of(1, 2), *run_of(2, 1)]), 3 * SIZE) == again[:2]


class Histories(RuleBasedStateMachine):
    """Sequences over two tokens come, grow and go; a block's true content is all tokens up to its end."""

    def __init__(self):
        super().__init__()
        self.blocks = make_blocks(num_blocks=12)
        self.held: list[tuple[list[int], list[int]]] = []
        self.truth: dict[int, list[int]] = {}
        self.spoilt: set[int] = set()

    def fill(self, table, ids, start):
        for index in range(start, len(ids) // SIZE):
            self.truth[table[index]] = ids[: (index + 1) * SIZE]
            self.spoilt.discard(table[index])
            self.blocks.fill(table, index, ids)

    def note_taken(self, table, start):
        for block in table[start:]:
            self.truth.pop(block, None)
            self.spoilt.discard(block)

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=4 * SIZE), is_computed=st.booleans())
    def come(self, ids, is_computed):
        matched = self.blocks.match(pack_ids(ids), len(ids) - 1)
        assert len(matched) * SIZE < len(ids)
        for index, block in enumerate(matched):
            assert self.truth[block] == ids[: (index + 1) * SIZE], "a hit holds the prompt's own tokens"
            assert block not in self.spoilt
        num_more = self.blocks.num_needed(len(ids)) - len(matched)
        if num_more + self.blocks.num_free_among(matched) > self.blocks.num_free:
            return
        table = self.blocks.take(matched, num_more)
        self.note_taken(table, len(matched))
        if is_computed:
            self.fill(table, ids, len(matched))
        else:
            ids = ids[: len(matched) * SIZE]
        self.held.append((table, ids))

    @precondition(lambda self: self.held and self.blocks.num_free)
    @rule(data=st.data(), token_id=st.integers(0, 1))
    def grow(self, data, token_id):
        table, ids = data.draw(st.sampled_from(self.held))
        self.blocks.extend(table)
        self.note_taken(table, len(table) - 1)
        start = len(ids) // SIZE
        ids += [token_id] * ((len(table)) * SIZE - len(ids))
        self.fill(table, ids, start)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), is_valid=st.sampled_from([True, True, False]))
    def go(self, data, is_valid):
        table, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if not is_valid:
            self.spoilt.update(table)
        self.blocks.release(table, is_valid=is_valid)

    @invariant()
    def every_block_is_held_or_free(self):
        holders = Counter(block for table, _ in self.held for block in table)
        assert 0 not in holders
        assert all(len(set(table)) == len(table) for table, _ in self.held), "no block twice"
        assert {i: n for i, n in enumerate(self.blocks._num_holders) if n} == dict(holders)
        assert set(self.blocks._free) == set(range(1, 12)) - set(holders), "none lost"
        assert self.blocks.num_free + self.blocks.num_held == self.blocks.num_usable == 11

    @invariant()
    def what_is_found_is_true(self):
        found = self.blocks._found
        assert len(set(found.values())) == len(found)
        for content, block in found.items():
            assert content.packed_ids == pack_ids(self.truth[block][-SIZE:])
            assert block not in self.spoilt
        num_retained = sum(block in self.blocks._free for block in found.values())
        assert self.blocks.num_retained_tokens == num_retained * SIZE

    @invariant()
    def free_blocks_with_content_go_last(self):
        kept = [block in self.blocks._found.values() for block in self.blocks._free]
        assert kept == sorted(kept)


def run(max_examples):
    run_state_machine_as_test(
        Histories, settings=settings(max_examples=max_examples, stateful_step_count=40, deadline=None)
    )


def test_any_history_shares_only_what_is_true_and_loses_no_block():
    run(100)


@pytest.mark.slow
def test_many_more_histories_share_only_what_is_true_and_lose_no_block():
    run(5000)
