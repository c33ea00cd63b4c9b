"""From a GGUF file's metadata to the ``config.json`` that the same model has at Hugging Face."""

from collections.abc import Mapping
from typing import Any

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.gguf_architectures import ARCHITECTURES, GgufArchitecture, Hyperparameters
from sardonyx_export.sources.gguf_header import GgufHeader

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are configuration: what each RoPE frequency is divided by."""


def architecture_of(header: GgufHeader, *, file: str) -> GgufArchitecture:
    """The architecture that the file names.

    Raises:
        ExportError: one that we do not know, or a file that is only a part of a model.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ExportError(f"{name!r:.80} is not supported ({known})", file=file, field="general.architecture")
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise ExportError("is one part of a split model; merge it first: llama-gguf-split --merge", file=file)
    return ARCHITECTURES[name]


def build_config(header: GgufHeader, rope_factors: Mapping[str, list[float]], *, file: str) -> dict[str, Any]:
    """The model's configuration in Hugging Face's words.

    Args:
        header: of the file.
        rope_factors: contents of those of `ROPE_FACTORS` that the file has.
        file: its name, for messages.

    Raises:
        ExportError: an architecture we do not know, a key that is missing or of the wrong type, or mixture of experts.
    """
    architecture = architecture_of(header, file=file)
    params = Hyperparameters(header, file=file)
    if params.integer("expert_count", 0):
        raise ExportError("mixture of experts is not supported", file=file, field=f"{params.architecture}.expert_count")
    if EMBEDDING not in header.tensors or len(header.tensors[EMBEDDING].shape) != 2:
        raise ExportError(f"has no matrix {EMBEDDING}", file=file)
    num_heads = params.integer("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": header.tensors[EMBEDDING].shape[0],
        "hidden_size": params.integer("embedding_length"),
        "intermediate_size": params.integer("feed_forward_length"),
        "num_hidden_layers": params.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": params.integer("attention.head_count_kv", num_heads),
        "head_dim": params.head_dim,
        "max_position_embeddings": params.integer("context_length"),
        "rms_norm_eps": params.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "rope_theta": params.number("rope.freq_base", 10_000.0),
    }
    rope_dims = params.integer("rope.dimension_count", params.head_dim)
    if rope_dims != params.head_dim:
        config["partial_rotary_factor"] = rope_dims / params.head_dim
    scaling = _rope_scaling(params, rope_factors, file=file)
    if scaling is not None:
        config["rope_scaling"] = scaling
    config |= {"hidden_act": "silu"} | architecture.own_config(params)
    if "hidden_activation" in config:  # Gemma's word for it
        del config["hidden_act"]
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        config[key] = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return config


def _rope_scaling(
    params: Hyperparameters, rope_factors: Mapping[str, list[float]], *, file: str
) -> dict[str, Any] | None:
    long, short = rope_factors.get(ROPE_FACTORS[1]), rope_factors.get(ROPE_FACTORS[2])
    if long and short:
        return {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    if factors := rope_factors.get(ROPE_FACTORS[0]):
        # llama.cpp keeps Llama 3's scaling only as its result. Longrope with one set of factors and an unscaled
        # attention is that very computation: each frequency divided by its factor.
        return {"rope_type": "longrope", "long_factor": factors, "short_factor": factors, "attention_factor": 1.0}
    kind = params.text("rope.scaling.type", "linear" if params.has("rope.scale_linear") else "none")
    factor = params.number("rope.scaling.factor", params.number("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ExportError(
            f"{kind!r} is not supported without its factors",
            file=file,
            field=f"{params.architecture}.rope.scaling.type",
        )
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": params.integer(
            "rope.scaling.original_context_length", params.integer("context_length")
        ),
    }
    for key, name in (
        ("attention_factor", "rope.scaling.yarn_attn_factor"),
        ("beta_fast", "rope.scaling.yarn_beta_fast"),
        ("beta_slow", "rope.scaling.yarn_beta_slow"),
    ):
        if params.has(name):
            scaling[key] = params.number(name)
    return scaling
