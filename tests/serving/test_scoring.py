import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.serving.fake_tasks import FakeEmbedder, FakeReranker

from sardonyx.errors import EngineError
from sardonyx.serving.scoring import DOCUMENT_PROMPTS, QUERY_PROMPTS, named_prompt, score
from sardonyx.serving.tasks import Encoded, EncodeOptions

OPTIONS = EncodeOptions(truncate=True, timeout_s=5.0)
VECTORS = arrays(
    np.float32, st.tuples(st.integers(1, 4), st.just(3)), elements=st.floats(-(2.0**60), 2.0**60, width=32)
)


class Table(FakeEmbedder):
    """A text is the number of its row."""

    def __init__(self, rows, **options):
        super().__init__(**options)
        self.rows = rows

    async def embed(self, inputs, *, prompt="", options):
        await self.enter((list(inputs), prompt), options)
        return Encoded(values=np.stack([self.rows[int(each)] for each in inputs]), num_tokens=len(inputs))


def scores(task, queries, texts):
    encoded = asyncio.run(score(task, queries, texts, options=OPTIONS))
    assert encoded.values.shape == (len(texts), 1)
    assert encoded.values.dtype == np.float32
    return encoded.values[:, 0].tolist()


def test_one_query_is_for_all_texts():
    task = FakeReranker("ranker")
    assert scores(task, ["ab"], ["a", "bx"]) == scores(task, ["ab", "ab"], ["a", "bx"]) == [1.0, 0.5]
    assert task.calls[0] == task.calls[1] == [("ab", "a"), ("ab", "bx")]
    assert task.options == [OPTIONS, OPTIONS]


def test_one_query_is_embedded_once():
    task = FakeEmbedder(prompts={"query": "q", "document": "d"})
    scores(task, ["ab"], ["a", "bx"])
    assert sorted(task.calls) == [(["a", "bx"], "d"), (["ab"], "q")]
    assert task.options == [OPTIONS, OPTIONS]


@given(VECTORS)
def test_a_cosine_is_finite_and_no_longer_than_1_whatever_the_lengths(rows):
    numbers = [str(index) for index in range(len(rows))]
    values = scores(Table(rows), ["0"], numbers)
    assert all(-1 <= value <= 1 for value in values)
    assert values[0] == pytest.approx(1.0 if np.linalg.norm(rows[0].astype(np.float64)) > 0 else 0.0, abs=1e-6)


def test_a_vector_of_zeros_is_like_nothing():
    rows = np.array([[0, 0], [3, 4], [-3, -4]], np.float32)
    assert scores(Table(rows), ["1"], ["0", "1", "2"]) == pytest.approx([0.0, 1.0, -1.0])


def test_dot_products_are_as_long_as_they_are():
    rows = np.array([[1, 2], [3, 4]], np.float32)
    assert scores(Table(rows, similarity="dot"), ["0"], ["0", "1"]) == [5.0, 11.0]


def test_many_numbers_are_compared_as_few_are():
    rows = np.random.default_rng(5).standard_normal((600, 400)).astype(np.float32)
    values = scores(Table(rows), ["0"], [str(index) for index in range(600)])
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(values, directions @ directions[0], atol=1e-6)


def test_one_side_that_fails_ends_the_other():
    async def run():
        task = FakeEmbedder(prompts={"query": "q", "document": "d"})
        task.error = EngineError("failed")
        with pytest.raises(EngineError):
            await score(task, ["a"], ["b"], options=OPTIONS)
        assert task.num_under_way == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompts", "default", "query", "document"),
    [
        ({}, None, "", ""),
        ({"query": "q"}, None, "q", ""),
        ({"query": "q", "passage": "p"}, None, "q", "p"),
        ({"search_query": "q", "search_document": "d"}, None, "q", "d"),
        ({"passage": "p", "document": "d"}, None, "", "d"),
        ({"other": "o"}, "other", "o", "o"),
    ],
)
def test_prompts_are_chosen_as_sentence_transformers_does(prompts, default, query, document):
    task = FakeEmbedder(prompts=prompts, default_prompt=default)
    assert named_prompt(task, QUERY_PROMPTS) == query
    assert named_prompt(task, DOCUMENT_PROMPTS) == document
