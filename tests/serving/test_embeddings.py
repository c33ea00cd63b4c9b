"""Embedding models from the repository to the vector, on a real graph."""

import asyncio

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.serving.encoder_serving import embedding_of, ids_of, run
from tests.serving.fakes import until
from tests.tiny_encoders import PROMPTS

from sardonyx.errors import ContextLengthExceeded, DeadlineExceeded, EngineError, InvalidRequest, ModelNotReady
from sardonyx.serving.embeddings import EmbeddingModel
from sardonyx.serving.tasks import EmbeddingTask, EncodeOptions

AS_IS = EncodeOptions()
LONG = " ".join(["paris berlin"] * 50)
"""100 words; the model takes 64 tokens."""


def embedding_model(model) -> EmbeddingModel:
    assert isinstance(model.task, EmbeddingModel)
    assert isinstance(model.task, EmbeddingTask)
    return model.task


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_each_text_gets_its_own_embedding_in_its_place(tmp_path, layout) -> None:
    words = ("paris", "is the capital", "of", "france cat dog sun moon", "a")
    texts = [" ".join((words[n % 5], words[n % 3], words[n % 2])) for n in range(150)]

    async def test(model) -> None:
        encoded = await embedding_model(model).embed(texts, options=AS_IS)
        assert encoded.values.shape == (150, 16)
        assert encoded.values.dtype == np.float32
        expected = np.stack([embedding_of(tmp_path / "tiny" / "1", ids_of(text)) for text in texts])
        np.testing.assert_allclose(encoded.values, expected, atol=1e-5)
        assert encoded.num_tokens == sum(len(ids_of(text)) for text in texts)

    statistics = run(tmp_path, test, layout=layout)
    assert (statistics.success.count, statistics.inference_count) == (1, 150)
    assert 1 < statistics.execution_count < 150
    assert sum(size * batch.compute_infer.count for size, batch in statistics.batches.items()) == 150


def test_token_ids_are_taken_as_they_are(tmp_path) -> None:
    ids = ids_of("paris cat", add_special_tokens=False)

    async def test(model) -> None:
        encoded = await embedding_model(model).embed([ids, "paris cat"], options=AS_IS)
        folder = tmp_path / "tiny" / "1"
        np.testing.assert_allclose(encoded.values[0], embedding_of(folder, ids), atol=1e-5)
        np.testing.assert_allclose(encoded.values[1], embedding_of(folder, ids_of("paris cat")), atol=1e-5)
        bare = EncodeOptions(add_special_tokens=False)
        plain = await embedding_model(model).embed(["paris cat"], options=bare)
        np.testing.assert_allclose(plain.values[0], encoded.values[0], atol=1e-6)

    run(tmp_path, test)


@pytest.mark.parametrize("bad", [[], [-1], [10**6], [10**30]])
def test_token_ids_that_the_model_does_not_have_are_refused(tmp_path, bad) -> None:
    async def test(model) -> None:
        with pytest.raises(InvalidRequest, match="text 1") as caught:
            await embedding_model(model).embed([[5], bad], options=AS_IS)
        assert caught.value.param == "input"

    assert run(tmp_path, test).failures == {}


def test_text_that_is_too_long_is_refused_or_cut_as_asked(tmp_path) -> None:
    ids = ids_of(LONG)
    words = ids[1:-1]

    async def test(model) -> None:
        task, folder = embedding_model(model), tmp_path / "tiny" / "1"
        for options in (AS_IS, EncodeOptions(truncate=False)):
            for given in (LONG, ids):
                with pytest.raises(ContextLengthExceeded, match="64 tokens, but text 1 has 102") as caught:
                    await task.embed(["a", given], options=options)
                assert caught.value.param == "input"
        for truncate, room in ((True, 62), (1000, 62), (7, 5)):
            options = EncodeOptions(truncate=truncate)
            encoded = await task.embed([LONG], options=options)
            np.testing.assert_allclose(
                encoded.values[0], embedding_of(folder, [ids[0], *words[:room], ids[-1]]), atol=1e-5
            )
            assert encoded.num_tokens == room + 2
            bare = await task.embed([words], options=options)
            assert bare.num_tokens == room + 2
        left = EncodeOptions(truncate=6, truncation_side="left")
        encoded = await task.embed([LONG, words], options=left)
        np.testing.assert_allclose(encoded.values[0], embedding_of(folder, [ids[0], *words[-4:], ids[-1]]), atol=1e-5)
        np.testing.assert_allclose(encoded.values[1], embedding_of(folder, words[-6:]), atol=1e-5)
        with pytest.raises(InvalidRequest, match="at least 3"):
            await task.embed(["a"], options=EncodeOptions(truncate=2))
        with pytest.raises(InvalidRequest, match="at least 1"):
            await task.embed(["a"], options=EncodeOptions(truncate=0))

    run(tmp_path, test)


def test_operator_may_have_long_texts_cut(tmp_path) -> None:
    async def test(model) -> None:
        task = embedding_model(model)
        assert (await task.embed([LONG], options=AS_IS)).num_tokens == 32
        with pytest.raises(ContextLengthExceeded):
            await task.embed([LONG], options=EncodeOptions(truncate=False))

    run(tmp_path, test, parameters={"truncate": "true", "max_model_len": "32"})


def test_text_of_megabytes_is_refused_before_it_is_tokenised(tmp_path) -> None:
    async def test(model) -> None:
        task = embedding_model(model)
        with pytest.raises(ContextLengthExceeded, match="8,000,000 characters"):
            await task.embed(["a", "cat dog " * 1_000_000], options=AS_IS)
        encoded = await task.embed(["cat dog " * 1_000_000], options=EncodeOptions(truncate=True))
        assert encoded.num_tokens == 64

    run(tmp_path, test)


def test_prompt_stands_in_front_of_the_text(tmp_path) -> None:
    async def test(model) -> None:
        task = embedding_model(model)
        assert dict(task.prompts) == PROMPTS
        encoded = await task.embed(["cat"], prompt=PROMPTS["query"], options=AS_IS)
        expected = embedding_of(tmp_path / "tiny" / "1", ids_of("query: cat"))
        np.testing.assert_allclose(encoded.values[0], expected, atol=1e-5)
        with pytest.raises(InvalidRequest, match="in front of token ids"):
            await task.embed(["cat", [5]], prompt="query: ", options=AS_IS)

    run(tmp_path, test)


def test_prompt_takes_no_part_in_pooling_where_the_manifest_says_so(tmp_path) -> None:
    async def test(model) -> None:
        task, folder = embedding_model(model), tmp_path / "tiny" / "1"
        pooled = [*ids_of("cat dog", add_special_tokens=False), ids_of("")[-1]]
        encoded = await task.embed(["cat dog", "cat dog"], prompt="query: ", options=AS_IS)
        np.testing.assert_allclose(encoded.values, [embedding_of(folder, pooled)] * 2, atol=1e-5)
        plain = await task.embed(["cat dog"], options=AS_IS)
        np.testing.assert_allclose(plain.values[0], embedding_of(folder, ids_of("cat dog")), atol=1e-5)
        # Cut so short that nothing but the prompt is left, one token is pooled all the same.
        short = await task.embed(["cat"], prompt="query query query ", options=EncodeOptions(truncate=3))
        np.testing.assert_allclose(short.values[0], embedding_of(folder, [ids_of("")[-1]]), atol=1e-5)
        left = EncodeOptions(truncate=True, truncation_side="left")
        with pytest.raises(InvalidRequest, match="on the right only"):
            await task.embed(["cat"], prompt="query: ", options=left)

    run(tmp_path, test, pools_prompt=False)


def test_empty_text_is_embedded_and_half_a_surrogate_pair_refused(tmp_path) -> None:
    async def test(model) -> None:
        task = embedding_model(model)
        encoded = await task.embed([""], options=AS_IS)
        np.testing.assert_allclose(encoded.values[0], embedding_of(tmp_path / "tiny" / "1", ids_of("")), atol=1e-5)
        with pytest.raises(InvalidRequest, match="surrogate"):
            await task.embed(["cat", "\ud800"], options=AS_IS)

    run(tmp_path, test)


def test_number_that_is_not_finite_is_an_error_and_no_embedding(tmp_path) -> None:
    async def test(model) -> None:
        task = embedding_model(model)
        with pytest.raises(EngineError, match="not finite"):
            await task.embed(["dog", "cat"], options=AS_IS)
        assert np.isfinite((await task.embed(["dog"], options=AS_IS)).values).all()

    def spoil(path) -> None:
        graph = onnx.load(path)
        (found,) = [each for each in graph.graph.initializer if each.name == "table"]
        values = numpy_helper.to_array(found).copy()
        values[ids_of("cat")[1]] = np.inf
        found.CopyFrom(numpy_helper.from_array(values, "table"))
        onnx.save(graph, path)

    statistics = run(tmp_path, test, spoil=spoil)
    assert statistics.failures == {"BACKEND": 1}


def test_time_limit_ends_a_call(tmp_path) -> None:
    async def test(model) -> None:
        with pytest.raises(DeadlineExceeded):
            await embedding_model(model).embed(["cat"] * 500, options=EncodeOptions(timeout_s=1e-6))

    run(tmp_path, test)


def test_cancelled_call_leaves_the_model_idle_and_usable(tmp_path) -> None:
    async def test(model) -> None:
        task = embedding_model(model)
        call = asyncio.ensure_future(task.embed(["cat dog"] * 2000, options=AS_IS))
        await until(lambda: model.statistics.execution_count > 0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await task.embed(["cat"], options=AS_IS)).values.shape == (1, 16)

    assert run(tmp_path, test).failures == {"CANCELED": 1}


def test_closed_model_refuses_and_ends_what_it_has(tmp_path) -> None:
    async def test(model) -> None:
        task = embedding_model(model)
        call = asyncio.ensure_future(task.embed(["cat dog"] * 2000, options=AS_IS))
        await until(lambda: model.statistics.execution_count > 0)
        await model.close()
        with pytest.raises(ModelNotReady):
            await call
        with pytest.raises(ModelNotReady):
            await task.embed(["cat"], options=AS_IS)
        assert not model.is_alive

    run(tmp_path, test)


def test_calls_at_once_get_their_own_answers(tmp_path) -> None:
    texts = ["cat", "dog sun", "moon tree house", "paris"]

    async def test(model) -> None:
        task = embedding_model(model)
        calls = [task.embed([text] * (n + 1), options=AS_IS) for n, text in enumerate(texts * 5)]
        for n, encoded in enumerate(await asyncio.gather(*calls)):
            expected = embedding_of(tmp_path / "tiny" / "1", ids_of(texts[n % 4]))
            np.testing.assert_allclose(encoded.values, [expected] * (n + 1), atol=1e-5)

    run(tmp_path, test)
