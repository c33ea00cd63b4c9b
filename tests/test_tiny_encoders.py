import numpy as np
import pytest
from tests.tiny_encoders import IMAGE_SIZE, LABELS, make_encoder_model, make_tokenizer

from sardonyx.repository.check import check_repository
from sardonyx.runtime.session import open_session


def packed(*texts, pair=None, **more):
    """Inputs of the packed layout."""
    encodings = [make_tokenizer().encode(text, pair) for text in texts]
    rows = [np.array(each.ids, np.int64) for each in encodings]
    longest = max(map(len, rows))
    gather = np.zeros((len(rows), longest), np.int64)
    scatter, first = [], 0
    for number, row in enumerate(rows):
        gather[number, : len(row)] = np.arange(first, first + len(row))
        scatter.append(np.arange(len(row)) + number * longest)
        first += len(row)
    return {
        "input_ids": np.concatenate(rows),
        "token_type_ids": np.concatenate([np.array(each.type_ids, np.int64) for each in encodings]),
        "row_gather": gather,
        "row_scatter": np.concatenate(scatter),
        "seqlens": np.array([len(row) for row in rows], np.int32),
        **more,
    }


def padded(*texts):
    tokenizer = make_tokenizer()
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([each.ids for each in encodings]),
        "attention_mask": np.array([each.attention_mask for each in encodings]),
        "token_type_ids": np.array([each.type_ids for each in encodings]),
    }


def run(folder, inputs):
    session = open_session(folder / "model.onnx", model_name="tiny")
    return session.run({name: array for name, array in inputs.items() if name in session.inputs})["result"]


def test_repository_check_finds_nothing(tmp_path):
    for family in ("embeddings", "reranker", "classifier", "image_classifier"):
        make_encoder_model(tmp_path, family, family=family)
    assert [str(each) for each in check_repository(tmp_path)] == []


def test_texts_that_share_words_have_similar_embeddings_in_both_layouts(tmp_path):
    texts = ("paris is the capital of france", "the capital of france is berlin", "cat dog")
    first = run(make_encoder_model(tmp_path, "a"), packed(*texts))
    second = run(make_encoder_model(tmp_path, "b", layout="padded"), padded(*texts))
    assert np.linalg.norm(first, axis=1) == pytest.approx(1)
    assert first @ first[0] == pytest.approx(second @ first[0], abs=1e-6)
    assert first[0] @ first[1] > 0.8 > 0.6 > first[0] @ first[2]


def test_prompt_is_left_out_of_pooling_where_asked_for(tmp_path):
    folder = make_encoder_model(tmp_path, pools_prompt=False)
    first, second = (
        run(folder, packed(text, num_prompt_tokens=np.array([3], np.int32))) for text in ("query: cat", "a: cat")
    )
    assert np.array_equal(first, second)


def test_reranker_prefers_texts_that_share_words_with_the_query(tmp_path):
    folder = make_encoder_model(tmp_path, family="reranker")
    near, far = (run(folder, packed("capital of france", pair=text)).item() for text in ("france is", "cat dog"))
    assert near > far


def test_classifier_finds_the_word_of_a_label(tmp_path):
    scores = run(make_encoder_model(tmp_path, family="classifier"), packed("a threat is", "the sun"))
    assert scores.argmax(axis=1)[0] == LABELS.index("threat")
    assert (scores[0] > 0).tolist() == [False, True, False]
    assert (scores[1] < 0).all()


def test_image_classifier_gives_the_colours(tmp_path):
    folder = make_encoder_model(tmp_path, family="image_classifier")
    image = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image[..., 1] = 1
    assert run(folder, {"image": image}).tolist() == [[0, 8, 0]]
