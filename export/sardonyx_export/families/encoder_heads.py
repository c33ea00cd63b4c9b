"""Classification heads of text encoders: from the checkpoint's tensors to a `Head`, and what its numbers mean.

Source: the ``ForSequenceClassification`` classes of transformers 5.24; sentence-transformers 6.2, ``CrossEncoder``, for
the activation that a checkpoint asks for.
"""

from collections.abc import Callable, Mapping
from typing import Literal

from sardonyx.repository.families import Labels
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.encoder_spec import Activation, Dense, EncoderSpec, Head, Norm, Pooling
from sardonyx_export.errors import ExportError
from sardonyx_export.families.bert import read_activation
from sardonyx_export.families.config import FILE, ConfigReader
from sardonyx_export.families.encoder import architecture_of

_SUFFIX = "ForSequenceClassification"
_POOLINGS: Mapping[str, Pooling] = {"cls": "cls", "mean": "mean"}
_PROBLEMS = {
    "regression": "regression",
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "": "",
}
_STORED_ACTIVATIONS: Mapping[str, Literal["none", "sigmoid", "softmax"]] = {
    "torch.nn.modules.linear.Identity": "none",
    "torch.nn.modules.activation.Softmax": "softmax",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}


def is_classifier(architecture: str) -> bool:
    """The architecture has a head that `read_classification_head` reads."""
    return architecture.removesuffix(_SUFFIX) in _HEADS and architecture.endswith(_SUFFIX)


def read_classification_head(checkpoint: Checkpoint, spec: EncoderSpec) -> tuple[Head, Labels]:
    """A classifier's head, read into memory, and its labels.

    Args:
        checkpoint: of an architecture for which `is_classifier` holds.
        spec: of its encoder.

    Raises:
        ExportError: the architecture has no classification head, a tensor is missing, or a field of the configuration
            does not fit it or is not implemented; the error names the field.
    """
    config = ConfigReader(checkpoint.config)
    architecture = architecture_of(config)
    if not is_classifier(architecture):
        raise config.refusal("architectures", f"is {architecture}, which has no head for labels")
    head = _HEADS[architecture.removesuffix(_SUFFIX)](checkpoint, spec, config)
    num_labels = head.width(spec.hidden_size)
    return head, Labels(names=_names(config, num_labels), activation=_activation(config, num_labels))


def _pooled(checkpoint: Checkpoint, spec: EncoderSpec, config: ConfigReader) -> Head:
    """BERT's: its pooler, then the classifier."""
    prefix = spec.names.word_embeddings.removesuffix("embeddings.word_embeddings")
    return Head(
        poolings=("cls",),
        steps=(_dense(checkpoint, f"{prefix}pooler.dense", "tanh"), _dense(checkpoint, "classifier")),
    )


def _own_dense(checkpoint: Checkpoint, spec: EncoderSpec, config: ConfigReader) -> Head:
    """RoBERTa's: the pooler, if there is one, takes no part."""
    return Head(
        poolings=("cls",),
        steps=(_dense(checkpoint, "classifier.dense", "tanh"), _dense(checkpoint, "classifier.out_proj")),
    )


def _pre_classifier(checkpoint: Checkpoint, spec: EncoderSpec, config: ConfigReader) -> Head:
    return Head(
        poolings=("cls",),
        steps=(_dense(checkpoint, "pre_classifier", "relu"), _dense(checkpoint, "classifier")),
    )


def _modernbert(checkpoint: Checkpoint, spec: EncoderSpec, config: ConfigReader) -> Head:
    pooling = config.choice("classifier_pooling", {name: name for name in _POOLINGS}, "cls")
    activation = read_activation(config, "classifier_activation", "gelu")
    has_bias = config.flag("classifier_bias", False)
    norm = Norm(
        weight=checkpoint.tensor("head.norm.weight").read(),
        bias=checkpoint.tensor("head.norm.bias").read() if spec.norm_bias else None,
        epsilon=spec.norm_epsilon,
    )
    first = _dense(checkpoint, "head.dense", activation, has_bias=has_bias)
    return Head(poolings=(_POOLINGS[pooling],), steps=(first, norm, _dense(checkpoint, "classifier")))


def _dense(checkpoint: Checkpoint, name: str, activation: Activation = "identity", *, has_bias: bool = True) -> Dense:
    return Dense(
        weight=checkpoint.tensor(f"{name}.weight").read(),
        bias=checkpoint.tensor(f"{name}.bias").read() if has_bias else None,
        activation=activation,
    )


def _names(config: ConfigReader, num_labels: int) -> list[str]:
    """By index; ``LABEL_0`` ... where the configuration has none, as transformers calls them."""
    names = config.raw("id2label")
    if names is None:
        return [f"LABEL_{i}" for i in range(num_labels)]
    indices = {str(i): i for i in range(num_labels)}
    if not isinstance(names, dict) or {str(key) for key in names} != indices.keys():
        raise config.refusal("id2label", f"should name the labels 0 to {num_labels - 1}, which the classifier has")
    return [str(names[key]) for key in sorted(names, key=lambda key: indices[str(key)])]


def _activation(config: ConfigReader, num_labels: int) -> Literal["none", "sigmoid", "softmax"]:
    """What makes scores of the classifier's numbers: what the checkpoint says, or what its labels suggest."""
    stored = _stored_activation(config)
    # A cross encoder of several labels says none by default, whatever they mean.
    if stored == "sigmoid" or (stored == "none" and num_labels == 1) or (stored == "softmax" and num_labels > 1):
        return stored
    problem = config.choice("problem_type", _PROBLEMS, "")
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi" or num_labels == 1 else "softmax"


def _stored_activation(config: ConfigReader) -> Literal["none", "sigmoid", "softmax"] | None:
    """What sentence-transformers wrote into a cross encoder's configuration, under either of two names."""
    section = config.raw("sentence_transformers")
    field = "sentence_transformers.activation_fn"
    name = section.get("activation_fn") if isinstance(section, dict) else None
    if name is None:
        field = "sbert_ce_default_activation_function"
        name = config.raw(field)
    if name is None:
        return None
    if name not in _STORED_ACTIVATIONS:
        supported = ", ".join(_STORED_ACTIVATIONS)
        raise ExportError(f"is {name!r}; supported: {supported}", file=FILE, field=field)
    return _STORED_ACTIVATIONS[name]


_HEADS: Mapping[str, Callable[[Checkpoint, EncoderSpec, ConfigReader], Head]] = {
    "Bert": _pooled,
    "NomicBert": _pooled,
    "Roberta": _own_dense,
    "XLMRoberta": _own_dense,
    "Camembert": _own_dense,
    "MPNet": _own_dense,
    "DistilBert": _pre_classifier,
    "ModernBert": _modernbert,
}
