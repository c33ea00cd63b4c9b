"""Cross-encoders from the repository to the score, on a real graph."""

import numpy as np
import pytest
from tests.serving.encoder_serving import ids_of, run, table

from sardonyx.errors import ContextLengthExceeded, InvalidRequest
from sardonyx.serving.reranker import RerankerModel
from sardonyx.serving.tasks import EncodeOptions, RerankTask

AS_IS = EncodeOptions()


def reranker(model) -> RerankerModel:
    assert isinstance(model.task, RerankerModel)
    assert isinstance(model.task, RerankTask)
    return model.task


def logit_of(folder, query_ids: list[int], text_ids: list[int]) -> float:
    """What the tiny graph makes of a pair without its special tokens."""
    first, second = (table(folder)[ids].sum(axis=0) for ids in (query_ids, text_ids))
    return float(8 * first @ second / (np.linalg.norm(first) * np.linalg.norm(second)) - 4)


def words(text: str) -> list[int]:
    return ids_of(text, add_special_tokens=False)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_each_pair_gets_its_own_score_in_its_place(tmp_path, layout) -> None:
    pairs = [("capital of france", text) for text in ("paris is the capital", "cat", "france france", "of dog")] * 20

    async def test(model) -> None:
        encoded = await reranker(model).rerank(pairs, options=AS_IS)
        logits = [logit_of(tmp_path / "tiny" / "1", words(query), words(text)) for query, text in pairs]
        np.testing.assert_allclose(encoded.values[:, 0], 1 / (1 + np.exp(-np.array(logits))), atol=1e-5)
        assert encoded.values.shape == (80, 1)
        assert encoded.num_tokens == sum(len(ids_of(*pair)) for pair in pairs)

    run(tmp_path, test, family="reranker", layout=layout)


def test_model_without_activation_gives_logits(tmp_path) -> None:
    async def test(model) -> None:
        encoded = await reranker(model).rerank([("cat", "cat"), ("cat", "dog")], options=AS_IS)
        assert encoded.values[0] == pytest.approx(4, abs=1e-4)
        assert encoded.values[1] < 3

    run(tmp_path, test, family="reranker", activation="none")


def test_text_of_a_pair_is_cut_and_never_the_query(tmp_path) -> None:
    query, text = "cat " * 20, "dog sun " * 100

    async def test(model) -> None:
        task = reranker(model)
        with pytest.raises(ContextLengthExceeded, match="has 223"):
            await task.rerank([(query, text)], options=AS_IS)
        for options, kept in (
            (EncodeOptions(truncate=True), words(text)[:41]),
            (EncodeOptions(truncate=24), words(text)[:1]),
            (EncodeOptions(truncate=24, truncation_side="left"), words(text)[-1:]),
        ):
            encoded = await task.rerank([(query, text)], options=options)
            logit = logit_of(tmp_path / "tiny" / "1", words(query), kept)
            assert encoded.values.item() == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
        with pytest.raises(ContextLengthExceeded, match="shorten the query") as caught:
            await task.rerank([(query, text)], options=EncodeOptions(truncate=23))
        assert caught.value.param == "input"

    run(tmp_path, test, family="reranker")


def test_query_of_megabytes_is_refused_although_texts_are_cut(tmp_path) -> None:
    async def test(model) -> None:
        with pytest.raises(ContextLengthExceeded):
            await reranker(model).rerank([("cat " * 1_000_000, "dog")], options=EncodeOptions(truncate=True))
        with pytest.raises(InvalidRequest, match="surrogate"):
            await reranker(model).rerank([("cat", "\udc00")], options=AS_IS)

    run(tmp_path, test, family="reranker")
