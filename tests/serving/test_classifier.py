"""Text classifiers from the repository to the scores, on a real graph."""

import numpy as np
import pytest
from tests.serving.encoder_serving import run
from tests.tiny_encoders import LABELS

from sardonyx.errors import ContextLengthExceeded
from sardonyx.serving.classifier import MAX_WINDOWED_CHARS, TextClassifier
from sardonyx.serving.tasks import CategoryRule, ClassifyTask, EncodeOptions

AS_IS = EncodeOptions()
HIGH, LOW = 1 / (1 + np.exp(-6)), 1 / (1 + np.exp(4))


def classifier(model) -> TextClassifier:
    assert isinstance(model.task, TextClassifier)
    assert isinstance(model.task, ClassifyTask)
    return model.task


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_each_text_gets_scores_of_all_labels(tmp_path, layout) -> None:
    async def test(model) -> None:
        task = classifier(model)
        assert list(task.labels) == list(LABELS)
        encoded = await task.classify(["the insult", "cat", "praise and threat", ""], options=AS_IS)
        expected = [[HIGH, LOW, LOW], [LOW] * 3, [LOW, HIGH, HIGH], [LOW] * 3]
        np.testing.assert_allclose(encoded.values, expected, atol=1e-6)
        assert encoded.values.dtype == np.float32

    run(tmp_path, test, family="classifier", layout=layout)


def test_scores_of_a_softmax_model_sum_to_one(tmp_path) -> None:
    async def test(model) -> None:
        encoded = await classifier(model).classify(["threat", "cat"], options=AS_IS)
        np.testing.assert_allclose(encoded.values.sum(axis=1), 1, atol=1e-6)
        assert encoded.values[0].argmax() == LABELS.index("threat")
        np.testing.assert_allclose(encoded.values[1], 1 / 3, atol=1e-6)

    run(tmp_path, test, family="classifier", activation="softmax")


def test_long_text_is_judged_in_windows_and_the_highest_score_counts(tmp_path) -> None:
    filler = "cat dog " * 40
    texts = ["sun", f"insult {filler}", f"{filler} threat {filler} praise", filler, "threat"]

    async def test(model) -> None:
        encoded = await classifier(model).classify(texts, options=AS_IS)
        highs = [[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0]]
        np.testing.assert_allclose(encoded.values, np.where(highs, HIGH, LOW), atol=1e-6)
        assert encoded.num_tokens > 3 * 80

    run(tmp_path, test, family="classifier")


def test_long_text_is_cut_or_refused_where_asked_for(tmp_path) -> None:
    text = "insult " + "cat " * 100 + "threat"

    async def test(model) -> None:
        task = classifier(model)
        right = await task.classify([text], options=EncodeOptions(truncate=True))
        np.testing.assert_allclose(right.values, [[HIGH, LOW, LOW]], atol=1e-6)
        left = await task.classify([text], options=EncodeOptions(truncate=10, truncation_side="left"))
        np.testing.assert_allclose(left.values, [[LOW, HIGH, LOW]], atol=1e-6)
        with pytest.raises(ContextLengthExceeded, match="has 104"):
            await task.classify([text], options=EncodeOptions(truncate=False))

    run(tmp_path, test, family="classifier")


def test_operator_may_have_long_texts_cut(tmp_path) -> None:
    async def test(model) -> None:
        encoded = await classifier(model).classify(["cat " * 100 + "threat"], options=AS_IS)
        np.testing.assert_allclose(encoded.values, [[LOW] * 3], atol=1e-6)
        assert encoded.num_tokens == 64

    run(tmp_path, test, family="classifier", parameters={"truncate": "true"})


def test_text_of_more_than_a_million_characters_is_refused(tmp_path) -> None:
    async def test(model) -> None:
        with pytest.raises(ContextLengthExceeded, match="text 1 has"):
            await classifier(model).classify(["a", "a" * (MAX_WINDOWED_CHARS + 1)], options=AS_IS)

    run(tmp_path, test, family="classifier")


def test_rules_are_those_of_the_config(tmp_path) -> None:
    async def test(model) -> None:
        assert classifier(model).moderation == {
            "threat": [CategoryRule("violence", 0.5), CategoryRule("harassment/threatening", 0.9)]
        }

    parameters = {"moderation.threat": "violence 0.5, harassment/threatening 0.9"}
    run(tmp_path, test, family="classifier", parameters=parameters)


def test_model_without_rules_is_no_moderator(tmp_path) -> None:
    async def test(model) -> None:
        assert classifier(model).moderation == {}

    run(tmp_path, test, family="classifier")
