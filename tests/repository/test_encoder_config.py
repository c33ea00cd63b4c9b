import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.repository.configs import with_parameters

from sardonyx.errors import ConfigError
from sardonyx.repository.encoder_config import CATEGORIES, EncoderOptions, encoder_options


def test_parameters_are_read():
    options = encoder_options(
        with_parameters(max_batch_tokens="512", num_instances="2", truncate="true", **{"moderation.toxic": "hate 0.5"})
    )
    assert options == EncoderOptions(
        max_batch_tokens=512, num_instances=2, truncate=True, moderation={"toxic": [("hate", 0.5)]}
    )


def test_label_may_speak_for_several_categories():
    options = encoder_options(with_parameters(**{"moderation.threat": " harassment/threatening .5,violence 1 "}))
    assert options.moderation == {"threat": [("harassment/threatening", 0.5), ("violence", 1.0)]}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_batch_tokens", "many", r"parameters\['max_batch_tokens'\]: expected int, not 'many'"),
        ("max_batch_tokens", "0", r"parameters\['max_batch_tokens'\]: expected int >= 1, not '0'"),
        ("max_batch_token", "1", "is not a parameter of an encoder model; did you mean max_batch_tokens?"),
        ("truncate", "maybe", r"parameters\['truncate'\]: expected bool, not 'maybe'"),
        ("max_model_len", "null", "expected int"),
        ("moderation.x", "hate", "expected categories with thresholds"),
        ("moderation.x", "hate 0", "expected categories with thresholds"),
        ("moderation.x", "hate 1.5", "expected categories with thresholds"),
        ("moderation.x", "rudeness 0.5", "'rudeness' is no moderation category; there are harassment, "),
        ("moderation.x", "", "expected categories with thresholds"),
    ],
)
def test_wrong_parameter_is_refused_by_name(key, value, message):
    with pytest.raises(ConfigError, match=message):
        encoder_options(with_parameters(**{key: value}))


@given(st.sampled_from(CATEGORIES), st.floats(0.001, 1.0))
def test_every_category_and_threshold_survives(category, threshold):
    text = f"{category} {threshold:.17f}"
    assert encoder_options(with_parameters(**{"moderation.a": text})).moderation["a"] == [
        (category, float(f"{threshold:.17f}"))
    ]


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        rules = encoder_options(with_parameters(**{"moderation.a": text})).moderation["a"]
    except ConfigError:
        return
    assert rules
    assert all(category in CATEGORIES and 0 < threshold <= 1 for category, threshold in rules)


def test_every_parameter_has_its_row_in_the_readme():
    readme = (Path(__file__).parents[2] / "model_repository/README.md").read_text()
    section = readme.partition("### Embedding models, rerankers and classifiers")[2].partition("\n## ")[0]
    names = [field.name for field in msgspec.structs.fields(EncoderOptions) if field.name != "moderation"]
    assert re.findall(r"^\| `([\w.<>]+)` \|", section, re.MULTILINE) == [*names, "moderation.<label>"]
