"""Labels of classification heads, and what makes scores of their numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.export.encoder_checkpoints import HIDDEN_SIZE, make_encoder

from sardonyx.repository.families import Labels
from sardonyx_export.encoder_spec import Dense, Head
from sardonyx_export.errors import ExportError
from sardonyx_export.families.encoder import read_encoder_spec
from sardonyx_export.families.encoder_heads import read_classification_head
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder

IDENTITY = "torch.nn.modules.linear.Identity"
SIGMOID = "torch.nn.modules.activation.Sigmoid"


def _read(folder: Path, num_labels: int = 3, **config: Any) -> tuple[Head, Labels]:
    """A BERT classifier's head after config.json got other fields; ``...`` removes one."""
    make_encoder(folder, "BertForSequenceClassification", num_labels=num_labels)
    file = folder / "config.json"
    fields = json.loads(file.read_text()) | config
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
    checkpoint = SafetensorsFolder(folder, uri="tiny")
    return read_classification_head(checkpoint, read_encoder_spec(checkpoint.config, list(checkpoint.names())))


def test_head_is_the_pooler_and_the_classifier(tmp_path: Path) -> None:
    head, _ = _read(tmp_path)
    first, second = head.steps
    assert isinstance(first, Dense)
    assert isinstance(second, Dense)
    assert (head.poolings, first.activation, second.activation) == (("cls",), "tanh", "identity")
    assert (first.weight.shape, second.weight.shape) == ((HIDDEN_SIZE, HIDDEN_SIZE), (3, HIDDEN_SIZE))


def test_labels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = {str(i): f"label {i}" for i in reversed(range(12))}
    _, labels = _read(tmp_path, 12, id2label=names, label2id=None)
    assert labels.names == [f"label {i}" for i in range(12)]


def test_labels_are_numbered_when_the_configuration_has_none(tmp_path: Path) -> None:
    _, labels = _read(tmp_path, id2label=...)
    assert labels.names == ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize("names", [{"0": "a"}, {"0": "a", "1": "b", "3": "c"}, ["a", "b", "c"]])
def test_labels_that_the_classifier_does_not_have_are_refused(tmp_path: Path, names: Any) -> None:
    with pytest.raises(ExportError, match="0 to 2") as error:
        _read(tmp_path, id2label=names)
    assert error.value.field == "id2label"


@pytest.mark.parametrize(
    ("num_labels", "config", "activation"),
    [
        (3, {}, "softmax"),
        (1, {}, "sigmoid"),
        (3, {"problem_type": "single_label_classification"}, "softmax"),
        (3, {"problem_type": "multi_label_classification"}, "sigmoid"),
        (1, {"problem_type": "regression"}, "none"),
        (3, {"problem_type": "regression"}, "none"),
        (1, {"sentence_transformers": {"activation_fn": IDENTITY, "version": "5.0"}}, "none"),
        (1, {"sentence_transformers": {"activation_fn": SIGMOID, "version": "5.0"}}, "sigmoid"),
        (1, {"sbert_ce_default_activation_function": IDENTITY}, "none"),
        (3, {"sbert_ce_default_activation_function": IDENTITY}, "softmax"),
        (3, {"sbert_ce_default_activation_function": SIGMOID}, "sigmoid"),
    ],
)
def test_scores_are_made_as_the_checkpoint_s_labels_need(
    tmp_path: Path, num_labels: int, config: dict[str, Any], activation: str
) -> None:
    _, labels = _read(tmp_path, num_labels, **config)
    assert labels.activation == activation


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"problem_type": "ranking"}, "problem_type"),
        ({"sentence_transformers": {"activation_fn": "mine.Swish"}}, "sentence_transformers.activation_fn"),
        ({"sbert_ce_default_activation_function": "mine.Swish"}, "sbert_ce_default_activation_function"),
    ],
)
def test_unknown_meaning_of_scores_is_refused(tmp_path: Path, config: dict[str, Any], field: str) -> None:
    with pytest.raises(ExportError) as error:
        _read(tmp_path, 1, **config)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("field", "value"), [("classifier_pooling", "max"), ("classifier_activation", "mish"), ("classifier_bias", "yes")]
)
def test_modernbert_s_head_is_refused_by_field(tmp_path: Path, field: str, value: Any) -> None:
    make_encoder(tmp_path, "ModernBertForSequenceClassification", num_labels=2)
    checkpoint = SafetensorsFolder(tmp_path, uri="tiny")
    spec = read_encoder_spec(checkpoint.config, list(checkpoint.names()))
    checkpoint.config[field] = value
    with pytest.raises(ExportError) as error:
        read_classification_head(checkpoint, spec)
    assert error.value.field == field


def test_encoder_without_labels_is_refused(tmp_path: Path) -> None:
    make_encoder(tmp_path, "BertModel")
    checkpoint = SafetensorsFolder(tmp_path, uri="tiny")
    spec = read_encoder_spec(checkpoint.config, list(checkpoint.names()))
    with pytest.raises(ExportError, match="no head for labels") as error:
        read_classification_head(checkpoint, spec)
    assert error.value.field == "architectures"
