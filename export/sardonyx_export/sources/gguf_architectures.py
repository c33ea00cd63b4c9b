"""What llama.cpp writes for each architecture, in Hugging Face's words: configuration keys and tensor names.

Each entry of `ARCHITECTURES` is what its converter does to a checkpoint, read backwards. Where llama.cpp keeps a fact
in its own code and not in the file (window patterns, Gemma's attention scale), the fact stands here.

Source: llama.cpp, conversion/{llama,qwen,phi,gemma,granite}.py and src/models/*.cpp.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.gguf_header import GgufHeader


class Hyperparameters:
    """The ``{architecture}.*`` keys of a file, with their types checked."""

    def __init__(self, header: GgufHeader, *, file: str) -> None:
        self._metadata = header.metadata
        self._file = file
        self.tensors = header.tensors
        self.architecture: str = self._typed("general.architecture", str, None)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; a per-layer array counts where all layers agree.

        Raises:
            ExportError: missing without a default, of another type, or different from layer to layer.
        """
        name = f"{self.architecture}.{key}"
        value = self._metadata.get(name)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
            raise ExportError(f"should be one whole number, is {value!r:.80}", file=self._file, field=name)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float; raises as `integer` does."""
        value: float = self._typed(f"{self.architecture}.{key}", float, default)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value: str = self._typed(f"{self.architecture}.{key}", str, default)
        return value

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self._metadata

    @property
    def head_dim(self) -> int:
        heads = self.integer("attention.head_count")
        if heads == 0:
            raise ExportError("is 0", file=self._file, field=f"{self.architecture}.attention.head_count")
        size = self.integer("attention.key_length", self.integer("embedding_length") // heads)
        if self.integer("attention.value_length", size) != size:
            raise ExportError(
                "differs from key_length, which is not supported",
                file=self._file,
                field=f"{self.architecture}.attention.value_length",
            )
        return size

    def _typed(self, name: str, kind: type, default: Any) -> Any:
        value = self._metadata.get(name, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind):
            raise ExportError(f"should be a {kind.__name__}, is {value!r:.80}", file=self._file, field=name)
        return value


@dataclass(slots=True, frozen=True)
class GgufArchitecture:
    """How one architecture lies in a GGUF file."""

    class_name: str
    """Hugging Face's class: what ``architectures[0]`` becomes."""
    model_type: str
    own_config: Callable[[Hyperparameters], dict[str, Any]] = lambda _: {}
    """Configuration beyond what all have in common."""
    layer_names: Mapping[str, str] | None = None
    """Names of a layer's parts that differ from `_LAYER_NAMES`."""
    is_permuted: bool = False
    """Query and key rows were reordered for llama.cpp's interleaved RoPE."""
    norm_offset: float = 0.0
    """What the converter added to norm weights."""

    def hf_layer_name(self, part: str) -> str | None:
        return (self.layer_names or {}).get(part) or _LAYER_NAMES.get(part)


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3_NAMES = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}


def _llama(params: Hyperparameters) -> dict[str, Any]:
    window = params.integer("attention.sliding_window", 0)
    return (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window} if window else {}
    )


def _smollm3(params: Hyperparameters) -> dict[str, Any]:
    num_layers = params.integer("block_count")
    return {"no_rope_layer_interval": 4, "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(num_layers)]}


def _phi3(params: Hyperparameters) -> dict[str, Any]:
    return {
        "sliding_window": params.integer("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": params.integer(
            "rope.scaling.original_context_length", params.integer("context_length")
        ),
    }


def _gemma2(params: Hyperparameters) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": params.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": params.number("final_logit_softcapping", 30.0),
        **_gemma(params, window_period=2, scaled_by_width=46),
    }


def _gemma3(params: Hyperparameters) -> dict[str, Any]:
    soft_cap = params.number("final_logit_softcapping", 0.0)
    return {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": soft_cap or None,
        "rope_local_base_freq": params.number("rope.freq_base_swa", 10_000.0),
        **_gemma(params, window_period=6, scaled_by_width=62),
    }


def _gemma(params: Hyperparameters, *, window_period: int, scaled_by_width: int) -> dict[str, Any]:
    """What both Gemmas share: every `window_period`-th layer sees everything, the others a window.

    Args:
        params: the file's.
        window_period: where the file does not say.
        scaled_by_width: number of layers of the 27B model, the one whose attention is scaled by width / heads.
    """
    num_layers = params.integer("block_count")
    width_scale = params.integer("embedding_length") // params.integer("attention.head_count")
    config: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width_scale if num_layers == scaled_by_width else params.head_dim,
    }
    window = params.integer("attention.sliding_window", 0)
    if window == 0:
        return {**config, "sliding_window": None, "layer_types": ["full_attention"] * num_layers}
    period = params.integer("attention.sliding_window_pattern", window_period) or 1
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(num_layers)]
    return {**config, "sliding_window": window, "layer_types": kinds}


def _granite(params: Hyperparameters) -> dict[str, Any]:
    return {
        "attention_multiplier": params.number("attention.scale", params.head_dim**-0.5),
        "embedding_multiplier": params.number("embedding_scale", 1.0),
        "residual_multiplier": params.number("residual_scale", 1.0),
        "logits_scaling": params.number("logit_scale", 1.0),
    }


ARCHITECTURES = {
    "llama": GgufArchitecture("LlamaForCausalLM", "llama", _llama, is_permuted=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", "qwen2", lambda _: {"use_sliding_window": False}),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", "qwen3", lambda _: {"use_sliding_window": False}),
    "phi3": GgufArchitecture("Phi3ForCausalLM", "phi3", _phi3, _PHI3_NAMES),
    "gemma2": GgufArchitecture("Gemma2ForCausalLM", "gemma2", _gemma2, _GEMMA_NAMES, norm_offset=1.0),
    "gemma3": GgufArchitecture("Gemma3ForCausalLM", "gemma3_text", _gemma3, _GEMMA_NAMES, norm_offset=1.0),
    "smollm3": GgufArchitecture("SmolLM3ForCausalLM", "smollm3", _smollm3, is_permuted=True),
    "granite": GgufArchitecture("GraniteForCausalLM", "granite", _granite, is_permuted=True),
}
