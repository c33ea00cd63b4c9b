import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sardonyx.serving.response_cache import CacheKey, ResponseCache

GENERATION = 1


def number_key(number: int, name: str = "m", version: int = 1) -> CacheKey:
    return CacheKey(name, version, GENERATION, bytes([number]))


def digest(inputs, outputs=("o",)) -> bytes:
    return ResponseCache(0).key("m", 1, inputs, outputs, generation=GENERATION).digest


def answer(value: float = 0.0, size: int = 1) -> dict:
    return {"o": np.full(size, value, np.float32)}


def size_of(outputs: dict) -> int:
    cache = ResponseCache(1 << 40)
    cache.put(number_key(0), outputs)
    return cache.size_bytes


def test_kept_answer_comes_back_and_is_counted():
    cache = ResponseCache(1 << 20)
    key = cache.key("m", 1, {"x": np.ones(3)}, ["o"], generation=GENERATION)
    assert cache.get(key) is None
    cache.put(key, answer(7))
    np.testing.assert_array_equal(cache.get(key)["o"], answer(7)["o"])
    assert (cache.num_hits, cache.num_misses, cache.num_entries) == (1, 1, 1)


def test_kept_answer_is_a_copy_that_nobody_can_change():
    cache = ResponseCache(1 << 20)
    batch = np.zeros((1000, 4), np.float32)
    cache.put(number_key(0), {"o": batch[2:3]})
    batch[:] = 5
    kept = cache.get(number_key(0))
    assert kept["o"].base is None
    assert kept["o"].tolist() == [[0, 0, 0, 0]]
    with pytest.raises(ValueError, match="read-only"):
        kept["o"][0] = 1
    kept.clear()
    assert cache.get(number_key(0)).keys() == {"o"}


def test_answer_used_least_lately_makes_room():
    cache = ResponseCache(2 * size_of(answer()))
    for number in (0, 1):
        cache.put(number_key(number), answer(number))
    cache.get(number_key(0))
    cache.put(number_key(2), answer(2))
    assert [cache.get(number_key(number)) is not None for number in range(3)] == [True, False, True]
    assert cache.num_evictions == 1


def test_answer_larger_than_the_cache_is_not_kept_and_pushes_nothing_out():
    cache = ResponseCache(2 * size_of(answer()))
    cache.put(number_key(0), answer())
    cache.put(number_key(1), answer(size=100_000))
    assert cache.get(number_key(1)) is None
    assert cache.get(number_key(0)) is not None
    assert cache.num_evictions == 0


def test_texts_count_by_their_length():
    short, long = ({"o": np.array([text], object)} for text in ("a", "a" * 1000))
    assert size_of(long) - size_of(short) == 999
    assert size_of({"o": np.array([b"a" * 1000], object)}) > 1000


def test_unloading_forgets_the_versions_answers_only():
    cache = ResponseCache(1 << 20)
    keys = [number_key(0), number_key(1), number_key(0, version=2), number_key(0, name="other")]
    for key in keys:
        cache.put(key, answer())
    cache.drop("m", 1)
    assert [cache.get(key) is not None for key in keys] == [False, False, True, True]
    assert cache.size_bytes == 2 * size_of(answer())
    cache.drop("m", 1)


def test_reloaded_model_finds_no_answer_of_its_predecessor():
    cache = ResponseCache(1 << 20)
    old, new = (
        cache.key("m", 1, {"x": np.ones(1)}, ["o"], generation=generation)
        for generation in (cache.new_generation(), cache.new_generation())
    )
    cache.put(old, answer())
    assert cache.get(new) is None


def test_order_of_inputs_and_outputs_does_not_matter():
    first, second = np.arange(3), np.ones(2, np.float32)
    assert digest({"a": first, "b": second}, ["o", "p"]) == digest({"b": second, "a": first}, ["p", "o", "o"])


def test_layout_in_memory_does_not_matter():
    values = np.arange(12).reshape(3, 4)
    assert digest({"x": values}) == digest({"x": np.asfortranarray(values)}) == digest({"x": values[:, :]})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"x": np.zeros(4, np.int32)}, {"x": np.zeros(4, np.float32)}),
        ({"x": np.zeros(4, np.int32)}, {"x": np.zeros((2, 2), np.int32)}),
        ({"x": np.zeros((0, 2))}, {"x": np.zeros((2, 0))}),
        ({"x": np.zeros(())}, {"x": np.zeros(1)}),
        ({"x": np.zeros(1)}, {"x": -np.zeros(1)}),
        ({"x": np.array(["ab", "c"], object)}, {"x": np.array(["a", "bc"], object)}),
        ({"x": np.array(["a\0"], object)}, {"x": np.array(["a"], object)}),
        ({"ab": np.zeros(1), "c": np.zeros(1)}, {"a": np.zeros(1), "bc": np.zeros(1)}),
        ({"x": np.zeros(2)}, {"x": np.zeros(1), "y": np.zeros(1)}),
        ({}, {"x": np.zeros(0)}),
    ],
)
def test_requests_that_differ_have_different_keys(first, second):
    assert digest(first) != digest(second)


def test_wanted_outputs_are_part_of_the_key():
    assert len({digest({}, outputs) for outputs in (["o"], ["p"], ["o", "p"], ["op"])}) == 4


def test_text_and_its_utf8_are_the_same_input():
    assert digest({"x": np.array(["grün"], object)}) == digest({"x": np.array(["grün".encode()], object)})


arrays = st.one_of(
    npst.arrays(
        st.sampled_from([np.int8, np.int32, np.float32]), npst.array_shapes(min_dims=0, min_side=0, max_side=3)
    ),
    st.lists(st.binary(max_size=3), max_size=3).map(lambda elements: np.array([*elements, None], object)[:-1]),
)
requests = st.dictionaries(st.sampled_from(["a", "b", "ab"]), arrays, max_size=3)


def spelled_out(inputs: dict) -> list:
    return [
        (name, array.dtype.str, array.shape, list(array.flat) if array.dtype == object else array.tobytes())
        for name, array in sorted(inputs.items())
    ]


@given(requests, requests)
def test_keys_are_equal_exactly_where_requests_are(first, second):
    assert (digest(first) == digest(second)) == (spelled_out(first) == spelled_out(second))
    assert digest(first) == digest({name: array.copy() for name, array in first.items()})


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 5), st.integers(0, 600)),
        st.tuples(st.just("get"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 1), st.just(0)),
    ),
    max_size=60,
)


@given(steps)
def test_cache_behaves_as_a_list_in_order_of_use(todo):
    max_bytes = 3 * size_of(answer())
    cache, naive, num_hits, num_misses = ResponseCache(max_bytes), [], 0, 0
    for round_number, (verb, number, size) in enumerate(todo):
        key = number_key(number, version=number % 2)
        if verb == "put":
            outputs = answer(round_number, size)
            cache.put(key, outputs)
            naive = [row for row in naive if row[0] != key]
            if size_of(outputs) <= max_bytes:
                naive.append((key, outputs))
            while sum(size_of(row[1]) for row in naive) > max_bytes:
                naive.pop(0)
        elif verb == "get":
            expected = [row for row in naive if row[0] == key]
            found = cache.get(key)
            assert (found is not None) == bool(expected)
            num_hits, num_misses = num_hits + bool(expected), num_misses + (not expected)
            if expected:
                np.testing.assert_array_equal(found["o"], expected[0][1]["o"])
                naive = [row for row in naive if row[0] != key] + expected
        else:
            cache.drop("m", number)
            naive = [row for row in naive if row[0].version != number]
        assert cache.size_bytes == sum(size_of(row[1]) for row in naive)
        assert cache.num_entries == len(naive)
    assert (cache.num_hits, cache.num_misses) == (num_hits, num_misses)
