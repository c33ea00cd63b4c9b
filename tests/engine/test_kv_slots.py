import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.core import SlotCopy
from sardonyx.engine.kv_slots import MIN_SHARED_TOKENS, KvSlots, Placement, TokenArray

LONG = 4 * MIN_SHARED_TOKENS


def ids(*parts: tuple[int, int]) -> TokenArray:
    """Runs of the same token: ``ids((7, 40), (8, 2))`` is forty sevens and two eights."""
    return np.array([token for token, count in parts for _ in range(count)], dtype=np.int32)


def take(slots: KvSlots, tokens: TokenArray) -> Placement:
    return slots.acquire(tokens, slots.match(tokens, len(tokens) - 1))


def use(slots: KvSlots, tokens: TokenArray) -> int:
    """A sequence comes, is computed and goes; its slot."""
    slot = take(slots, tokens).slot
    slots.advance(slot, len(tokens))
    slots.release(slot)
    return slot


def test_prompt_that_goes_on_takes_the_slot_that_holds_its_start():
    slots = KvSlots(3, 256)
    first = use(slots, ids((1, LONG)))
    use(slots, ids((2, LONG)))
    assert take(slots, ids((1, LONG), (3, 5))) == (first, LONG, None)


def test_whole_prompt_is_never_taken_from_the_cache():
    slots = KvSlots(1, 256)
    use(slots, ids((1, LONG)))
    assert take(slots, ids((1, LONG))).num_cached == LONG - 1


def test_prefix_is_copied_when_its_slot_is_busy():
    slots = KvSlots(2, 256)
    busy = take(slots, ids((1, LONG), (2, 9))).slot
    slots.advance(busy, LONG)
    target = 1 - busy
    assert take(slots, ids((1, LONG), (3, 9))) == (target, LONG, SlotCopy(busy, target, LONG))


def test_prefix_is_copied_when_taking_its_slot_would_destroy_much():
    slots = KvSlots(2, 1024)
    other = use(slots, ids((1, LONG), (2, 500)))
    empty = 1 - other
    assert take(slots, ids((1, LONG), (3, 9))) == (empty, LONG, SlotCopy(other, empty, LONG))
    assert slots.match(ids((1, LONG), (2, 500)), 500).lengths[other] == 500


def test_only_computed_tokens_of_a_busy_slot_are_cached_and_the_rest_is_promised():
    slots = KvSlots(2, 256)
    busy = take(slots, ids((1, LONG))).slot
    slots.advance(busy, 10)
    match = slots.match(ids((1, LONG), (2, 5)), LONG + 4)
    assert (match.num_cached, match.promiser, match.num_promised) == (10, busy, LONG)


def test_generated_tokens_are_part_of_the_prefix():
    slots = KvSlots(1, 256)
    slot = take(slots, ids((1, 20))).slot
    slots.append(slot, 5)
    slots.append(slot, 6)
    slots.advance(slot, 21)
    slots.release(slot)
    assert take(slots, ids((1, 20), (5, 1), (6, 1), (7, 1))).num_cached == 21


def test_least_recently_used_slot_goes_first():
    slots = KvSlots(3, 256)
    used = [use(slots, ids((token, LONG))) for token in (1, 2, 3)]
    use(slots, ids((1, LONG), (9, 1)))
    assert take(slots, ids((4, LONG))).slot == used[1]


def test_slot_with_next_to_nothing_goes_before_an_older_one_with_much():
    slots = KvSlots(2, 256)
    use(slots, ids((1, LONG)))
    short = use(slots, ids((2, 3)))
    assert take(slots, ids((4, LONG))).slot == short


def test_source_of_a_copy_counts_as_used():
    slots = KvSlots(3, 1024)
    hot = use(slots, ids((1, LONG), (2, 500)))
    cold = use(slots, ids((3, LONG)))
    copied = take(slots, ids((1, LONG), (4, 9)))
    assert copied.copy == SlotCopy(hot, copied.slot, LONG)
    assert take(slots, ids((5, LONG))).slot == cold


def test_copies_are_in_an_order_that_reads_a_slot_before_it_is_overwritten():
    slots = KvSlots(3, 1024)
    first = use(slots, ids((1, LONG), (2, 500)))
    copied = take(slots, ids((1, LONG), (4, 9)))
    use(slots, ids((3, LONG)))
    # The first copy's source is now the least recently used: it is overwritten in the same step, after the copy.
    again = take(slots, ids((1, LONG), (5, 9)))
    assert copied.copy is not None
    assert copied.copy.source == first
    assert again.slot == first
    assert again.num_cached == LONG


def test_content_of_a_failed_step_is_not_used_again():
    slots = KvSlots(1, 256)
    slot = take(slots, ids((1, LONG))).slot
    slots.advance(slot, LONG)
    slots.release(slot, is_valid=False)
    assert slots.num_retained_tokens == 0
    assert take(slots, ids((1, LONG))).num_cached == 0


def test_trim_forgets_the_oldest_from_the_end():
    slots = KvSlots(2, 256)
    old, new = use(slots, ids((1, 40))), use(slots, ids((2, 40)))
    slots.trim(50)
    assert slots.num_retained_tokens == 50
    assert slots.match(ids((1, 41)), 40).lengths[old] == 10
    assert slots.match(ids((2, 41)), 40).lengths[new] == 40


@given(
    held=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=5),
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
    data=st.data(),
)
def test_match_counts_common_leading_tokens(held, prompt, data):
    slots = KvSlots(len(held), 12)
    cached = {}
    for tokens in held:
        placement = slots.acquire(np.array(tokens, dtype=np.int32), slots.match(np.array([9], dtype=np.int32), 0))
        cached[placement.slot] = (tokens, data.draw(st.integers(0, len(tokens))))
        slots.advance(placement.slot, cached[placement.slot][1])
    match = slots.match(np.array(prompt, dtype=np.int32), len(prompt) - 1)

    def common(tokens: list[int]) -> int:
        return next(
            (i for i, (a, b) in enumerate(zip(tokens, prompt[:-1], strict=False)) if a != b),
            min(len(tokens), len(prompt) - 1),
        )

    assert match.lengths == [min(common(cached[slot][0]), cached[slot][1]) for slot in range(len(held))]
    promises = {slot: common(tokens) for slot, (tokens, computed) in cached.items() if common(tokens) > computed}
    assert match.num_promised == max(promises.values(), default=0)
    assert match.promiser == -1 if not promises else promises[match.promiser] == match.num_promised
