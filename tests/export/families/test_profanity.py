"""A classifier that scikit-learn fits here, against its own words. The two real pickles are no part of this project."""

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import CalibratedClassifierCV
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from sardonyx.processing.encoder_tokenizer import EncoderTokenizer
from sardonyx_export.errors import ExportError
from sardonyx_export.families import profanity
from sardonyx_export.families.profanity import build_profanity, convert
from sardonyx_export.sources.pypi import PINNED_SHA256
from sardonyx_export.stages.encoder_reference import EncodedRow
from sardonyx_export.stages.encoder_verify import run_graph

PIN = PINNED_SHA256["alt-profanity-check", "1.9.1"]
RUDE = ["you utter toad", "slimy toad and stinking newt", "newt brain", "what a foul toad you are", "foul foul newt"]
KIND = ["a lovely café by the river", "the river was calm", "what a lovely day", "rain on the day", "calm and lovely"]


def _fit(estimator: Any = None, **settings: Any) -> tuple[Any, Any]:
    texts = [f"{text} word{number}" for text in RUDE + KIND for number in range(3)]
    vectorizer = TfidfVectorizer(**settings)
    model = CalibratedClassifierCV(estimator or LinearSVC(), cv=5)
    return vectorizer, model.fit(vectorizer.fit_transform(texts), [1] * 15 + [0] * 15)


def _score(folder: Path, vectorizer: Any, model: Any, texts: list[str]) -> tuple[Any, Any]:
    """What the exported model says of texts, and what scikit-learn says."""
    built = convert(vectorizer, model, folder, max_model_len=64)
    (folder / "tokenizer.json").write_bytes(built.texts["tokenizer.json"])
    tokenizer = EncoderTokenizer.load(folder)
    rows = [EncodedRow(token_ids=tokenizer.encode(text).token_ids.tolist()) for text in texts]
    assert built.encoder is not None
    (values,) = run_graph(folder / built.graphs["encoder"][0], None, "toads", built.encoder, [rows])
    return values[:, 0], model.predict_proba(vectorizer.transform(texts))[:, 1]


@pytest.mark.parametrize("stop_words", [None, "english", ["toad"]])
def test_scores_are_those_of_scikit_learn(tmp_path: Path, stop_words: Any) -> None:
    texts = ["toad", "TOAD, toad; Toad!", "a lovely toad by the river café", "qqzx lovely qqzx", "foul " * 60]
    actual, expected = _score(tmp_path, *_fit(stop_words=stop_words), [*texts, *RUDE, *KIND])
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert expected.max() - expected.min() > 0.3


def test_rows_of_unknown_words_only_get_the_answer_for_an_empty_vector(tmp_path: Path) -> None:
    vectorizer, model = _fit()
    empty = model.predict_proba(np.zeros((1, len(vectorizer.vocabulary_))))[0, 1]
    actual, _ = _score(tmp_path, vectorizer, model, ["qqzx zzyx", "", "!!!", "a"])
    np.testing.assert_allclose(actual, empty, atol=1e-6)


def test_stop_words_of_a_given_vocabulary_weigh_nothing(tmp_path: Path) -> None:
    vectorizer, model = _fit(stop_words=["toad"], vocabulary=["toad", "newt", "lovely", "river", "day"])
    # With its idf it would make the vector longer, and every other word's share smaller.
    actual, expected = _score(tmp_path, vectorizer, model, ["toad newt", "newt", "toad lovely"])
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_what_is_built_says_how_to_serve_it(tmp_path: Path) -> None:
    vectorizer, model = _fit()
    built = convert(vectorizer, model, tmp_path, max_model_len=64)
    assert (built.family, built.architecture, built.precision) == ("classifier", "CalibratedClassifierCV", "fp32")
    assert built.labels is not None
    assert built.labels.names == ["offensive"]
    assert built.config_parameters == {"moderation.offensive": "harassment 0.5"}
    assert built.encoder is not None
    assert (built.encoder.vocab_size, built.encoder.max_model_len) == (len(vectorizer.vocabulary_) + 1, 64)
    assert [parity.num_positions for parity in built.parity][::2] == [1, 1]
    assert all(parity.max_abs_error <= 1e-5 for parity in built.parity)
    assert built.graphs == {"encoder": ["model.onnx", "model.onnx.data"]}


@pytest.mark.parametrize("max_model_len", [1, 2, 4096])
def test_limits_of_length_can_be_met(tmp_path: Path, max_model_len: int) -> None:
    assert convert(*_fit(), tmp_path, max_model_len=max_model_len).parity


@pytest.mark.parametrize("max_model_len", [0, 4097])
def test_limits_of_length_that_cannot_be_met_are_refused(tmp_path: Path, max_model_len: int) -> None:
    with pytest.raises(ExportError, match="1 to 4,096 words") as caught:
        convert(*_fit(), tmp_path, max_model_len=max_model_len)
    assert caught.value.field == "max_model_len"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sublinear_tf", True),
        ("binary", True),
        ("norm", "l1"),
        ("norm", None),
        ("use_idf", False),
        ("ngram_range", (1, 2)),
        ("analyzer", "char"),
        ("lowercase", False),
        ("strip_accents", "unicode"),
        ("token_pattern", r"\w+"),
        ("preprocessor", str.upper),
    ],
)
def test_settings_that_are_not_implemented_are_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ExportError, match="is implemented") as caught:
        convert(*_fit(**{field: value}), tmp_path, max_model_len=64)
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


def test_other_machines_and_other_classes_are_refused(tmp_path: Path) -> None:
    vectorizer, model = _fit(LogisticRegression())
    with pytest.raises(ExportError, match="LogisticRegression with method sigmoid"):
        convert(vectorizer, model, tmp_path, max_model_len=64)
    model.classes_ = np.array(["no", "yes"])
    with pytest.raises(ExportError, match="0 and 1 are needed"):
        convert(vectorizer, model, tmp_path, max_model_len=64)


def test_a_graph_that_says_something_else_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profanity, "MAX_ERROR", 0.0)
    with pytest.raises(ExportError, match="Nothing was published"):
        convert(*_fit(), tmp_path, max_model_len=64)


_VECTORIZER = TfidfVectorizer().fit(["any word"])
_ANALYSE = _VECTORIZER.build_analyzer()
_TOKENIZER = tokenizers.Tokenizer.from_str(profanity._tokenizer(_VECTORIZER).to_str())
# Letters that Python does not know yet, and capital sigma: see the comment in `_tokenizer`.
_TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="Σ"), max_size=40)
_WORDY = st.lists(
    st.sampled_from(["ab", "a", "_", "é", "e\u0301", "½", "²", "İ", "ß", "中文", "٣", "'", "-", " ", "\n", "😀"])
)


@given(st.one_of(_TEXTS, _WORDY.map("".join)))
def test_words_are_those_of_the_analyser(text: str) -> None:
    normalised = _TOKENIZER.normalizer.normalize_str(text)
    assert [word for word, _ in _TOKENIZER.pre_tokenizer.pre_tokenize_str(normalised)] == _ANALYSE(text)


def test_pickles_of_any_other_source_are_not_opened(tmp_path: Path) -> None:
    for sha256 in (None, "0" * 64):
        with pytest.raises(ExportError, match=r"only pypi:alt-profanity-check==1\.9\.1 is opened"):
            build_profanity(tmp_path, tmp_path, sha256=sha256)


def test_pickles_that_were_changed_since_are_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read: No such file") as caught:
        build_profanity(tmp_path, tmp_path, sha256=PIN)
    assert caught.value.file == "vectorizer.joblib"
    (tmp_path / "vectorizer.joblib").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ExportError, match="is not the file of alt-profanity-check"):
        build_profanity(tmp_path, tmp_path, sha256=PIN)


def _vouch_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import joblib

    for name, each in zip(("vectorizer.joblib", "model.joblib"), _fit(), strict=True):
        joblib.dump(each, folder / name)
        monkeypatch.setitem(profanity._FILES, name, hashlib.sha256((folder / name).read_bytes()).hexdigest())


def test_files_of_the_known_hashes_become_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _vouch_for(tmp_path, monkeypatch)
    built = build_profanity(tmp_path, tmp_path, sha256=PIN)
    assert built.encoder is not None
    assert built.encoder.max_model_len == 512


def test_another_version_of_scikit_learn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _vouch_for(tmp_path, monkeypatch)
    monkeypatch.setattr("sklearn.__version__", "1.2.3")
    with pytest.raises(ExportError, match=re.escape("is 1.2.3; the model was pickled by 1.9.1: pip install")):
        build_profanity(tmp_path, tmp_path, sha256=PIN)


def test_the_extra_is_named_where_scikit_learn_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _vouch_for(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(ExportError, match=re.escape("joblib is not installed: pip install 'sardonyx[export-sklearn]'")):
        build_profanity(tmp_path, tmp_path, sha256=PIN)
