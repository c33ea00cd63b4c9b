"""Text encoders with rotary embeddings and gated feed-forward networks: ModernBERT and NomicBert.

Source: the configuration and modelling files of transformers 5.24, and the released configuration of nomic-embed-text.
"""

from collections.abc import Collection, Mapping

from msgspec.structs import replace

from sardonyx_export.encoder_spec import Activation, EncoderLayer, EncoderNames, EncoderRope, EncoderSpec
from sardonyx_export.families import encoder_names
from sardonyx_export.families.bert import base_spec, divide_heads, read_activation
from sardonyx_export.families.config import ConfigReader
from sardonyx_export.families.rope import rope_from_section

_FULL, _SLIDING = "full_attention", "sliding_attention"
_GATED_ACTIVATIONS: Mapping[str, Activation] = {"swiglu": "silu", "geglu": "gelu", "glu": "sigmoid"}
# Of transformers' own NomicBert configuration, and of the released one.
_NOMIC_THETA = 1000.0
_NOMIC_TRAINED_POSITIONS = 2048

_NOMIC_INERT = (
    *("dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln", "use_flash_attn", "use_xentropy", "attn_pdrop"),
    *("reorder_and_upcast_attn", "summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
)


def modernbert(config: ConfigReader, tensors: Collection[str]) -> EncoderSpec:
    # Written by the released configurations, read by no code.
    for name in ("position_embedding_type", "layer_norm_eps"):
        config.raw(name)
    for name in ("tie_word_embeddings", "decoder_bias", "sparse_prediction", "sparse_pred_ignore_index"):
        config.raw(name)  # Of a language modelling head.
    names = encoder_names.find_names((encoder_names.MODERNBERT,), tensors)
    spec = base_spec(config, names)
    kinds = _modernbert_kinds(config, len(spec.layers))
    window = config.integer("local_attention", 128) // 2
    attention_bias = config.flag("attention_bias", False)
    return replace(
        spec,
        layers=tuple(
            EncoderLayer(
                window=window if kind == _SLIDING else None,
                rope=1 if kind == _SLIDING else 0,
                has_attention_norm=i > 0,
            )
            for i, kind in enumerate(kinds)
        ),
        is_pre_norm=True,
        activation=read_activation(config, "hidden_activation", "gelu"),
        ffn="gated_fused",
        norm_epsilon=config.number("norm_eps", 1e-5),
        ropes=_modernbert_ropes(config, spec),
        query_key_value_bias=attention_bias,
        attention_output_bias=attention_bias,
        ffn_bias=config.flag("mlp_bias", False),
        norm_bias=config.flag("norm_bias", False),
    )


def _modernbert_kinds(config: ConfigReader, num_layers: int) -> list[str]:
    """``layer_types``, or what the older ``global_attn_every_n_layers`` says."""
    period = config.integer("global_attn_every_n_layers", 3)
    default = [_SLIDING if i % period else _FULL for i in range(num_layers)]
    kinds: list[str] = config.raw("layer_types") or default
    if len(kinds) != num_layers or not set(kinds) <= {_FULL, _SLIDING}:
        raise config.refusal("layer_types", f"should be {num_layers} times {_FULL} or {_SLIDING}")
    return kinds


def _modernbert_ropes(config: ConfigReader, spec: EncoderSpec) -> tuple[EncoderRope, ...]:
    """The rotary embedding of the full layers, and that of the windowed ones."""
    sections = config.section("rope_parameters")
    thetas = config.number("global_rope_theta", 160_000.0), config.number("local_rope_theta", 10_000.0)
    ropes = []
    for kind, theta in zip((_FULL, _SLIDING), thetas, strict=True):
        section = (sections and sections.section(kind)) or ConfigReader({})
        ropes.append(_rope(config, section, spec, theta))
    if sections is not None:
        sections.finish()
    return tuple(ropes)


def _rope(config: ConfigReader, section: ConfigReader, spec: EncoderSpec, theta: float) -> EncoderRope:
    rope = rope_from_section(config, section, spec.head_size, spec.max_model_len, theta=theta)
    return EncoderRope(
        rotary_size=rope.rotary_size,
        inverse_frequencies=rope.inverse_frequencies,
        attention_factor=rope.attention_factor,
    )


def nomic_bert(config: ConfigReader, tensors: Collection[str]) -> EncoderSpec:
    """Two kinds of configuration go by this name: the released one in GPT-2's words, and that of transformers."""
    names = encoder_names.find_names((encoder_names.NOMIC, encoder_names.NOMIC_SPLIT), tensors)
    config.raw("tie_word_embeddings")
    num_token_types = 0 if config.raw("type_vocab_size") == 0 else config.integer("type_vocab_size", 2)
    names = replace(names, token_type_embeddings=names.token_type_embeddings if num_token_types else None)
    spec = _nomic_released(config, names) if config.raw("n_embd") is not None else _nomic_port(config, names)
    return replace(
        spec, layers=(EncoderLayer(rope=0),) * len(spec.layers), ffn="gated", num_token_types=num_token_types
    )


def _nomic_port(config: ConfigReader, names: EncoderNames) -> EncoderSpec:
    spec = base_spec(config, names)
    spec = replace(spec, head_size=config.integer("head_dim", spec.head_size))
    section = config.section("rope_parameters") or ConfigReader({})
    return replace(
        spec,
        activation=read_activation(config, "hidden_act", "silu"),
        norm_epsilon=config.number("layer_norm_eps", 1e-12),
        ropes=(_rope(config, section, spec, _NOMIC_THETA),),
        query_key_value_bias=False,
        attention_output_bias=False,
        ffn_bias=False,
    )


def _nomic_released(config: ConfigReader, names: EncoderNames) -> EncoderSpec:
    _check_nomic_switches(config)
    hidden_size, num_heads = config.integer("n_embd"), config.integer("n_head")
    max_model_len = config.integer("n_positions")
    trained_positions = config.integer("max_trained_positions", _NOMIC_TRAINED_POSITIONS)
    if config.optional_number("rotary_scaling_factor") is not None:
        # Texts beyond the trained length would be rotated by their own length, each by other frequencies.
        max_model_len = min(max_model_len, trained_positions)
    attention_bias, ffn_bias = config.flag("qkv_proj_bias", True), config.flag("mlp_fc1_bias", True)
    if config.flag("mlp_fc2_bias", True) != ffn_bias:
        raise config.refusal("mlp_fc2_bias", "differs from mlp_fc1_bias, which is not implemented")
    multiple = config.integer("pad_vocab_size_multiple", 1)
    spec = EncoderSpec(
        vocab_size=-(-config.integer("vocab_size") // multiple) * multiple,
        hidden_size=hidden_size,
        ffn_size=config.integer("n_inner", 4 * hidden_size),
        num_heads=num_heads,
        head_size=divide_heads(config, hidden_size, num_heads, "n_head"),
        max_model_len=max_model_len,
        layers=(EncoderLayer(),) * config.integer("n_layer"),
        names=names,
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
        query_key_value_bias=attention_bias,
        attention_output_bias=attention_bias,
        ffn_bias=ffn_bias,
    )
    function = config.raw("activation_function")
    if function not in _GATED_ACTIVATIONS:
        supported = ", ".join(sorted(_GATED_ACTIVATIONS))
        raise config.refusal("activation_function", f"is {function!r}; supported: {supported}")
    rope = rope_from_section(
        ConfigReader({"max_position_embeddings": max_model_len}),
        ConfigReader({}),
        int(spec.head_size * config.number("rotary_emb_fraction")),
        max_model_len,
        theta=config.number("rotary_emb_base", _NOMIC_THETA),
    )
    return replace(
        spec,
        activation=_GATED_ACTIVATIONS[function],
        ropes=(EncoderRope(rotary_size=rope.rotary_size, inverse_frequencies=rope.inverse_frequencies),),
    )


def _check_nomic_switches(config: ConfigReader) -> None:
    """Kernels and heads change nothing; scaling by 1 / sqrt(head size) is what attention does everywhere."""
    for name in _NOMIC_INERT:
        config.raw(name)
    if not config.flag("scale_attn_weights", True):
        raise config.refusal("scale_attn_weights", "is false, which this architecture's builder does not implement")
