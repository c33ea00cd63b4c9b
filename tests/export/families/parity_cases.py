"""Configurations whose graphs are compared with `transformers`. Knows neither torch nor transformers."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One configuration of one architecture."""

    architecture: str
    fields: dict[str, Any] = field(default_factory=dict)
    """What differs from the tiny default sizes."""
    lengths: tuple[int, int, int] = (75, 33, 9)
    """Tokens of three sequences; the first is the long prompt."""
    max_model_len: int | None = None


_LONGROPE_SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * i for i in range(24)],
    "long_factor": [1.0 + 0.7 * i for i in range(24)],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 24}

CASES = {
    "llama": Case("LlamaForCausalLM"),
    "llama-biased": Case("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": Case("LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-linear": Case(
        "LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    ),
    "llama-llama3": Case("LlamaForCausalLM", {"rope_parameters": _LLAMA3}),
    "llama-yarn": Case("LlamaForCausalLM", {"rope_parameters": _YARN}),
    "llama-yarn-scaled": Case(
        "LlamaForCausalLM",
        {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 16.0, "truncate": False}},
    ),
    "mistral": Case("MistralForCausalLM", {"sliding_window": None, "head_dim": 32}),
    "mistral-windowed": Case("MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": Case("Qwen2ForCausalLM"),
    "qwen2-windowed": Case(
        "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3": Case("Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True}),
    "phi3": Case("Phi3ForCausalLM", {"sliding_window": 16}),
    "phi3-longrope": Case(
        "Phi3ForCausalLM",
        {**_LONGROPE_SIZES, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 24},
        lengths=(75, 40, 26),
    ),
    "phi3-longrope-kept-short": Case(
        "Phi3ForCausalLM",
        {**_LONGROPE_SIZES, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 40},
        lengths=(39, 20, 5),
        max_model_len=40,
    ),
    "gemma2": Case("Gemma2ForCausalLM", {"sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3": Case("Gemma3ForCausalLM", {"sliding_window": 8, "sliding_window_pattern": 3, "num_hidden_layers": 4}),
    "gemma3-scaled": Case(
        "Gemma3ForCausalLM",
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 20.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "smollm3": Case("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1], "num_hidden_layers": 3}),
    "smollm3-windowed": Case(
        "SmolLM3ForCausalLM",
        {"no_rope_layer_interval": 2, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8},
    ),
    "granite": Case(
        "GraniteForCausalLM",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
}
