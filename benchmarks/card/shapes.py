"""Shapes of models, and the least that a step of them must move and compute. Nothing but the standard library."""

from dataclasses import dataclass
from typing import Any

KV_BYTES = 2
"""Of a number in the cache: fp16."""
WEIGHT_BYTES = {"fp16": 2.0, "int4": 0.5 + 2 / 32}
"""Of a weight in a layer; int4 with an fp16 scale for every 32."""
HEAD_BYTES = {"fp16": 2.0, "int4": 1 + 2 / 32}
"""Of a weight of the head, which stays at 8 bits beside int4."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_model_len: int

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    def config(self) -> dict[str, Any]:
        """As ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_model_len,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": False,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by Hugging Face's names."""
        hidden, ffn, kv = self.hidden_size, self.intermediate_size, self.num_kv_heads * self.head_size
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.num_layers):
            layer = {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (ffn, hidden),
                "mlp.up_proj": (ffn, hidden),
                "mlp.down_proj": (hidden, ffn),
            }
            found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        return found | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocab_size, hidden)}

    @property
    def num_layer_weights(self) -> int:
        """Of the layers' matrices."""
        return sum(
            shape[0] * shape[1]
            for name, shape in self.tensors().items()
            if len(shape) == 2 and name.startswith("model.layers.")
        )

    @property
    def num_head_weights(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * KV_BYTES

    def weight_bytes(self, precision: str) -> float:
        """Read by every step; of the embedding a few rows, which do not count."""
        return self.num_layer_weights * WEIGHT_BYTES[precision] + self.num_head_weights * HEAD_BYTES[precision]

    def decode_work(self, precision: str, batch: int, context: float) -> "Work":
        """One token for each of `batch` sequences of `context` tokens."""
        attention = 4 * self.num_layers * self.hidden_size * context * batch
        return Work(
            num_bytes=self.weight_bytes(precision) + batch * context * self.kv_bytes_per_token,
            num_operations=2 * (self.num_layer_weights + self.num_head_weights) * batch + attention,
        )

    def prefill_work(self, precision: str, num_prompts: int, length: int, num_steps: int) -> "Work":
        """All of some prompts, in so many steps."""
        num_tokens = num_prompts * length
        attention = 4 * self.num_layers * self.hidden_size * num_prompts * length * length / 2
        products = 2 * self.num_layer_weights * num_tokens + 2 * self.num_head_weights * num_prompts
        return Work(
            num_bytes=self.weight_bytes(precision) * num_steps + num_tokens * self.kv_bytes_per_token,
            num_operations=products + attention,
        )


@dataclass(frozen=True)
class Work:
    """The least of a step."""

    num_bytes: float
    num_operations: float

    def shares(self, taken_s: float, rates: dict[str, float] | None) -> dict[str, float | str | None]:
        """What part of the card's measured rates some work used, and which of the two bounds it.

        Args:
            taken_s: for the work.
            rates: ``copy_bytes_per_s`` and ``operations_per_s``; ``None``: not measured.
        """
        if rates is None:
            return {"bandwidth_share": None, "matrix_share": None, "bound_share": None, "bound_by": None}
        by_bytes = self.num_bytes / rates["copy_bytes_per_s"] / taken_s
        by_operations = self.num_operations / rates["operations_per_s"] / taken_s
        return {
            "bandwidth_share": round(by_bytes, 4),
            "matrix_share": round(by_operations, 4),
            "bound_share": round(max(by_bytes, by_operations), 4),
            "bound_by": "bandwidth" if by_bytes >= by_operations else "matrix rate",
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3-8b", 128_256, 4096, 14_336, 32, 32, 8, 8192),
        # What one layer of it takes, and what a rehearsal without a card can bear.
        Shape("llama-3-8b-2-layers", 128_256, 4096, 14_336, 2, 32, 8, 8192),
        Shape("tiny", 512, 256, 384, 2, 4, 2, 1024),
    )
}
