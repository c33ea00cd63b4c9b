"""Decoder language models: one short function per architecture, from its configuration to a `DecoderSpec`.

Every function starts from `_common`, what all of them share with Llama, and states only what is its own. A test fails
when an architecture in `architectures` has no parity case.

Source: the configuration and modelling files of transformers 5.23.
"""

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from sardonyx_export.checkpoint import Checkpoint, count_storage
from sardonyx_export.errors import ExportError
from sardonyx_export.families.config import FILE, ConfigReader
from sardonyx_export.families.rope import read_rope, rope_from_section
from sardonyx_export.spec import DecoderSpec, Layer, TensorNames

_FULL, _SLIDING = "full_attention", "sliding_attention"
_GEMMA_NAMES = TensorNames(
    attention_post_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)


def read_spec(config: Mapping[str, Any], max_model_len: int | None = None) -> DecoderSpec:
    """What the builder needs to know of a checkpoint.

    Args:
        config: as ``config.json``.
        max_model_len: positions to serve; ``None``: as many as the checkpoint was made for.

    Raises:
        ExportError: an architecture, or a field that would change what the model computes, is not implemented; the
            error names the field.
    """
    reader = ConfigReader(config)
    names = reader.raw("architectures")
    if not isinstance(names, list) or not names or names[0] not in architectures:
        supported = ", ".join(sorted(architectures))
        raise reader.refusal("architectures", f"is {names!r:.100}; supported: {supported}")
    max_positions = reader.integer("max_position_embeddings")
    if max_model_len is not None and not 1 <= max_model_len <= max_positions:
        raise ExportError(
            f"is {max_model_len}; this checkpoint has 1 to {max_positions} positions", field="max_model_len"
        )
    spec = architectures[names[0]](reader, max_model_len or max_positions)
    reader.finish()
    if spec.num_heads % spec.num_kv_heads:
        raise ExportError(
            f"is {spec.num_kv_heads}, which does not divide the query heads", file=FILE, field="num_key_value_heads"
        )
    return spec


def has_wide_activations(checkpoint: Checkpoint) -> bool:
    """A 16-bit graph of this checkpoint should be bf16, since fp16 ends at 65,504.

    So it is with weights that were trained and stored in bf16, and with residual streams that begin with scaled
    embeddings, as Gemma's do.
    """
    sizes = count_storage(checkpoint)
    return 2 * sizes["BF16"] > sizes.total() or read_spec(checkpoint.config).embedding_scale > 1


def _common(config: ConfigReader, max_model_len: int, *, is_tied: bool = False) -> DecoderSpec:
    """The fields that every architecture has; rotary embedding, activation and windows are left to the architecture.

    Args:
        config: the whole configuration.
        max_model_len: positions to serve.
        is_tied: what ``tie_word_embeddings`` means where it is absent.
    """
    num_heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    head_size = config.integer("head_dim", hidden_size // num_heads)
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        ffn_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_size=head_size,
        max_model_len=max_model_len,
        layers=(Layer(),) * config.integer("num_hidden_layers"),
        ropes=(),
        norm_epsilon=config.number("rms_norm_eps"),
        attention_scale=head_size**-0.5,
        tied_head=config.flag("tie_word_embeddings", is_tied),
    )


def _silu_with_rope(config: ConfigReader, max_model_len: int, *, is_tied: bool = False) -> DecoderSpec:
    """`_common` with what all but the Gemmas add: SiLU and one rotary embedding."""
    config.choice("hidden_act", {"silu": "silu", "swish": "silu"})
    spec = _common(config, max_model_len, is_tied=is_tied)
    return replace(spec, ropes=(read_rope(config, spec.head_size, max_model_len),))


def _llama(config: ConfigReader, max_model_len: int, *, is_tied: bool = False) -> DecoderSpec:
    spec = _silu_with_rope(config, max_model_len, is_tied=is_tied)
    return replace(_with_attention_bias(spec, config), ffn_bias=config.flag("mlp_bias", False))


def _mistral(config: ConfigReader, max_model_len: int) -> DecoderSpec:
    return _with_one_window(_silu_with_rope(config, max_model_len), config)


def _qwen2(config: ConfigReader, max_model_len: int) -> DecoderSpec:
    # Query, key and value always have a bias; some writers say so, the original does not.
    config.flag("attention_bias", True)
    spec = replace(_silu_with_rope(config, max_model_len), query_key_value_bias=True)
    return _with_upper_windows(spec, config)


def _qwen3(config: ConfigReader, max_model_len: int) -> DecoderSpec:
    spec = _with_attention_bias(_silu_with_rope(config, max_model_len), config)
    names = TensorNames(query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
    return _with_upper_windows(replace(spec, names=names), config)


def _phi3(config: ConfigReader, max_model_len: int) -> DecoderSpec:
    config.choice("hidden_act", {"silu": "silu", "swish": "silu"})
    spec = _common(config, max_model_len)
    # The first releases called the method by other names.
    aliases = {"su": "longrope", "yarn": "longrope"}
    rope = read_rope(config, spec.head_size, max_model_len, is_partial=True, aliases=aliases)
    names = TensorNames(query_key_value=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
    # Phi-4-mini spells out what transformers never reads.
    if config.number("full_attn_mod", 1) != 1 or config.number("interpolate_factor", 1) != 1:
        raise config.refusal("full_attn_mod", "or interpolate_factor is not 1, which is not implemented")
    return _with_one_window(replace(spec, ropes=(rope,), names=names), config)


def _smollm3(config: ConfigReader, max_model_len: int) -> DecoderSpec:
    spec = _llama(config, max_model_len, is_tied=True)
    num_layers = len(spec.layers)
    interval = config.integer("no_rope_layer_interval", 4)
    has_rope = config.raw("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)]
    if len(has_rope) < num_layers:
        raise config.refusal("no_rope_layers", f"has {len(has_rope)} entries; there are {num_layers} layers")
    is_windowed = config.flag("use_sliding_window", False) and config.optional_integer("sliding_window") is not None
    kinds = _layer_kinds(config, [_SLIDING if is_windowed and not rope else _FULL for rope in has_rope[:num_layers]])
    window = config.optional_integer("sliding_window") if is_windowed else None
    config.raw("max_window_layers")
    layers = tuple(
        Layer(window=window if kind == _SLIDING else None, rope=0 if rope else None)
        for kind, rope in zip(kinds, has_rope, strict=False)
    )
    return replace(spec, layers=layers)


def _granite(config: ConfigReader, max_model_len: int) -> DecoderSpec:
    return replace(
        _llama(config, max_model_len),
        attention_scale=config.number("attention_multiplier", 1.0),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        logits_scale=1 / config.number("logits_scaling", 1.0),
    )


def _gemma(config: ConfigReader, max_model_len: int, *, window_period: int) -> DecoderSpec:
    """What Gemma 2 and 3 share. Every `window_period`-th layer sees everything, the others a window."""
    config.choice("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"})
    config.raw("hidden_act")  # Written by older versions with other values; transformers reads hidden_activation only.
    spec = _with_attention_bias(_common(config, max_model_len, is_tied=True), config)
    period = config.integer("sliding_window_pattern", window_period)
    kinds = _layer_kinds(config, [_SLIDING if (i + 1) % period else _FULL for i in range(len(spec.layers))])
    window = config.integer("sliding_window") if _SLIDING in kinds else config.optional_integer("sliding_window")
    return replace(
        spec,
        layers=tuple(Layer(window=window if kind == _SLIDING else None) for kind in kinds),
        activation="gelu_tanh",
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=config.optional_number("attn_logit_softcapping") or 0.0,
        logits_softcap=config.optional_number("final_logit_softcapping") or 0.0,
        embedding_scale=spec.hidden_size**0.5,
        norm_offset=1.0,
    )


def _gemma2(config: ConfigReader, max_model_len: int) -> DecoderSpec:
    spec = _gemma(config, max_model_len, window_period=2)
    return replace(spec, ropes=(read_rope(config, spec.head_size, max_model_len),), names=_GEMMA_NAMES)


def _gemma3(config: ConfigReader, max_model_len: int) -> DecoderSpec:
    """Two rotary embeddings: the full layers' is scaled, the windowed layers' has a smaller base."""
    spec = _gemma(config, max_model_len, window_period=6)
    sections = config.section("rope_parameters")
    full = (sections and sections.section("full_attention")) or config.section("rope_scaling") or ConfigReader({})
    local = (sections and sections.section("sliding_attention")) or ConfigReader({})
    if sections is not None:
        sections.finish()
    thetas = config.number("rope_theta", 1_000_000.0), config.number("rope_local_base_freq", 10_000.0)
    ropes = tuple(
        rope_from_section(config, section, spec.head_size, max_model_len, theta=theta)
        for section, theta in zip((full, local), thetas, strict=True)
    )
    layers = tuple(Layer(window=layer.window, rope=0 if layer.window is None else 1) for layer in spec.layers)
    names = replace(_GEMMA_NAMES, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
    return replace(spec, ropes=ropes, layers=layers, names=names)


def _with_attention_bias(spec: DecoderSpec, config: ConfigReader) -> DecoderSpec:
    has_bias = config.flag("attention_bias", False)
    return replace(spec, query_key_value_bias=has_bias, attention_output_bias=has_bias)


def _with_one_window(spec: DecoderSpec, config: ConfigReader) -> DecoderSpec:
    """Every layer sees the same window, if any."""
    window = config.optional_integer("sliding_window")
    return replace(spec, layers=(Layer(window=window),) * len(spec.layers))


def _with_upper_windows(spec: DecoderSpec, config: ConfigReader) -> DecoderSpec:
    """Qwen's windows: from layer ``max_window_layers`` on, and only where ``use_sliding_window`` says so."""
    window = config.optional_integer("sliding_window") if config.flag("use_sliding_window", False) else None
    config.raw("sliding_window")
    first = config.raw("max_window_layers") or 0
    default = [_SLIDING if window is not None and i >= first else _FULL for i in range(len(spec.layers))]
    kinds = _layer_kinds(config, default)
    return replace(spec, layers=tuple(Layer(window=window if kind == _SLIDING else None) for kind in kinds))


def _layer_kinds(config: ConfigReader, default: list[str]) -> list[str]:
    """``layer_types``, or `default` where the field is absent: full or sliding, one for each layer."""
    kinds: list[str] = config.raw("layer_types") or default
    if len(kinds) != len(default) or not set(kinds) <= {_FULL, _SLIDING}:
        raise config.refusal("layer_types", f"should be {len(default)} times {_FULL} or {_SLIDING}")
    return kinds


architectures: dict[str, Callable[[ConfigReader, int], DecoderSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Phi3ForCausalLM": _phi3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "SmolLM3ForCausalLM": _smollm3,
    "GraniteForCausalLM": _granite,
}
"""By ``architectures[0]``."""
