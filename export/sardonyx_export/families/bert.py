"""BERT and the text encoders built like it: learned positions, norms after each residual sum.

Source: the configuration and modelling files of transformers 5.24.
"""

from collections.abc import Collection, Mapping

from msgspec.structs import replace

from sardonyx_export.encoder_spec import Activation, EncoderLayer, EncoderNames, EncoderSpec, RelativeBias
from sardonyx_export.families import encoder_names
from sardonyx_export.families.config import ConfigReader

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
# What MPNet's code has, whatever its configuration says.
_MPNET_PADDING_ID, _MPNET_BUCKETS, _MPNET_MAX_DISTANCE = 1, 32, 128
_BERT_POOLER_FIELDS = (
    *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
    *("pooler_size_per_head", "pooler_type"),
)
"""Written by the first multilingual checkpoints, read by no code."""


def bert(config: ConfigReader, tensors: Collection[str]) -> EncoderSpec:
    config.choice("position_embedding_type", {"absolute": "absolute"}, "absolute")
    config.raw("tie_word_embeddings")  # Of a language modelling head.
    for name in _BERT_POOLER_FIELDS:
        config.raw(name)
    return replace(
        base_spec(config, encoder_names.find_names((encoder_names.BERT,), tensors)),
        activation=read_activation(config, "hidden_act", "gelu"),
        norm_epsilon=config.number("layer_norm_eps", 1e-12),
        num_token_types=config.integer("type_vocab_size", 2),
    )


def roberta(config: ConfigReader, tensors: Collection[str]) -> EncoderSpec:
    padding_id = config.raw("pad_token_id")
    padding_id = 1 if padding_id is None else padding_id
    if isinstance(padding_id, bool) or not isinstance(padding_id, int) or padding_id < 0:
        raise config.refusal("pad_token_id", f"is {padding_id!r}; positions are counted from the row after it")
    return _with_offset(config, bert(config, tensors), padding_id)


def _with_offset(config: ConfigReader, spec: EncoderSpec, padding_id: int) -> EncoderSpec:
    """Positions from the row after the padding token's number on, which leaves so many fewer."""
    num_positions = spec.max_model_len - padding_id - 1
    if num_positions < 1:
        raise config.refusal(
            "max_position_embeddings", f"is {spec.max_model_len}; positions are counted from row {padding_id + 1}"
        )
    return replace(spec, max_model_len=num_positions, position_offset=padding_id + 1)


def distilbert(config: ConfigReader, tensors: Collection[str]) -> EncoderSpec:
    # Sinusoidal positions lie in the checkpoint like learned ones; the other fields belong to heads.
    for name in ("sinusoidal_pos_embds", "tie_word_embeddings", "tie_weights_"):
        config.raw(name)
    hidden_size, num_heads = config.integer("dim"), config.integer("n_heads")
    return EncoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        ffn_size=config.integer("hidden_dim"),
        num_heads=num_heads,
        head_size=divide_heads(config, hidden_size, num_heads, "n_heads"),
        max_model_len=config.integer("max_position_embeddings"),
        layers=(EncoderLayer(),) * config.integer("n_layers"),
        names=encoder_names.find_names((encoder_names.DISTILBERT,), tensors),
        norm_epsilon=1e-12,
        activation=read_activation(config, "activation", "gelu"),
    )


def mpnet(config: ConfigReader, tensors: Collection[str]) -> EncoderSpec:
    config.raw("tie_word_embeddings")
    if config.integer("relative_attention_num_buckets", _MPNET_BUCKETS) != _MPNET_BUCKETS:
        raise config.refusal(
            "relative_attention_num_buckets", f"is not {_MPNET_BUCKETS}, the only number that MPNet's code knows"
        )
    names = encoder_names.find_names((encoder_names.MPNET,), tensors)
    prefix = names.word_embeddings.removesuffix(encoder_names.MPNET.word_embeddings)
    spec = replace(
        base_spec(config, names),
        activation=read_activation(config, "hidden_act", "gelu"),
        norm_epsilon=config.number("layer_norm_eps", 1e-12),
        relative_bias=RelativeBias(
            name=f"{prefix}encoder.relative_attention_bias",
            num_buckets=_MPNET_BUCKETS,
            max_distance=_MPNET_MAX_DISTANCE,
        ),
    )
    return _with_offset(config, spec, _MPNET_PADDING_ID)


def base_spec(config: ConfigReader, names: EncoderNames) -> EncoderSpec:
    """The fields that BERT shares with its descendants, and BERT's way of putting layers together."""
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return EncoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        ffn_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        head_size=divide_heads(config, hidden_size, num_heads, "num_attention_heads"),
        max_model_len=config.integer("max_position_embeddings"),
        layers=(EncoderLayer(),) * config.integer("num_hidden_layers"),
        names=names,
        norm_epsilon=1e-12,
    )


def divide_heads(config: ConfigReader, hidden_size: int, num_heads: int, field: str) -> int:
    if hidden_size % num_heads:
        raise config.refusal(field, f"is {num_heads}, which does not divide the hidden size {hidden_size}")
    return hidden_size // num_heads


def read_activation(config: ConfigReader, name: str, default: str | None = None) -> Activation:
    """The activation that a field names in transformers' words."""
    value = config.raw(name) or default
    activation = _ACTIVATIONS.get(str(value))
    if activation is None:
        raise config.refusal(name, f"is {value!r}; supported: {', '.join(sorted(_ACTIVATIONS))}")
    return activation
