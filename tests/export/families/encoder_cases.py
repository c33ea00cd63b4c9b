"""Configurations of text encoders that are compared with `transformers`. Knows neither torch nor transformers."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One configuration of one architecture."""

    architecture: str
    fields: dict[str, Any] = field(default_factory=dict)
    """What differs from `make_encoder`'s tiny sizes."""
    num_labels: int | None = None
    """Of a classification head; ``None``: there is none."""
    has_released_config: bool = False
    """NomicBert with the configuration of its release."""


_FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
    "modernbert": "ModernBert",
    "nomic": "NomicBert",
}
_MODERNBERT_BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
_YARN = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 12,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}

CASES = {
    **{name: Case(f"{family}Model") for name, family in _FAMILIES.items()},
    **{f"{name}-masked-lm": Case(f"{family}ForMaskedLM") for name, family in _FAMILIES.items()},
    **{
        f"{name}-classifier": Case(f"{family}ForSequenceClassification", num_labels=3)
        for name, family in _FAMILIES.items()
    },
    "bert-pretraining": Case("BertForPreTraining"),
    "bert-gelu-new": Case("BertModel", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
    "bert-relu": Case("BertModel", {"hidden_act": "relu", "type_vocab_size": 3}),
    "bert-silu": Case("BertModel", {"hidden_act": "silu"}),
    "bert-reranker": Case("BertForSequenceClassification", num_labels=1),
    "roberta-padding-0": Case("RobertaModel", {"pad_token_id": 0, "max_position_embeddings": 49}),
    "modernbert-biased": Case(
        "ModernBertForSequenceClassification",
        {**_MODERNBERT_BIASES, "classifier_pooling": "mean", "classifier_activation": "silu"},
        num_labels=2,
    ),
    "modernbert-yarn": Case("ModernBertModel", {"rope_parameters": _YARN}),
    "modernbert-layer-types": Case(
        "ModernBertModel", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    ),
    "nomic-released": Case("NomicBertModel", has_released_config=True),
}
