"""What a decoder language model is, in the words its graph builder understands.

A family reads a checkpoint's configuration into a `DecoderSpec`; the builder turns the spec and the tensors into a
graph. Neither knows the other's business: no Hugging Face field name goes below, no ONNX operator goes above.
"""

from typing import Literal

import msgspec


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """One rotary position embedding, as tables that attention reads. Every scaling method ends up here."""

    rotary_size: int
    """Leading elements of each head that are rotated, in halves: element i with element i + rotary_size / 2."""
    inverse_frequencies: tuple[float, ...]
    """rotary_size / 2 angles per position, in float32 precision."""
    attention_factor: float = 1.0
    """Multiplies cosine and sine, hence the logits of attention by its square."""


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """Where one layer differs from the next."""

    window: int | None = None
    """Tokens that a query sees, itself among them; ``None``: all before it."""
    rope: int | None = 0
    """Index into `DecoderSpec.ropes`; ``None``: no position embedding."""


class TensorNames(msgspec.Struct, frozen=True, kw_only=True):
    """What the tensors of layer i are called, after ``model.layers.{i}.`` and before ``.weight``."""

    query_key_value: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Stacked in this order; one name where the checkpoint holds them fused."""
    attention_output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Stacked in this order; one name where the checkpoint holds them fused."""
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    """Applied to attention's output before it joins the residual stream."""
    ffn_norm: str = "post_attention_layernorm"
    ffn_post_norm: str | None = None
    """Applied to the feed-forward output before it joins the residual stream."""
    query_norm: str | None = None
    """Per head, before the rotation; together with `key_norm` or not at all."""
    key_norm: str | None = None
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"


class DecoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder with RMS norms, rotary positions, grouped-query attention and a gated feed-forward network."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_model_len: int
    """Positions that the rotary tables cover: prompt and completion tokens at most."""
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    norm_epsilon: float
    attention_scale: float
    """Multiplies query times key."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: float = 0.0
    """Added to every stored norm weight."""
    attention_softcap: float = 0.0
    """Attention logits go through ``cap * tanh(x / cap)``; 0 is off."""
    logits_softcap: float = 0.0
    """The same for the vocabulary's logits."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Multiplies what attention and feed-forward add to the residual stream."""
    logits_scale: float = 1.0
    """Multiplies the vocabulary's logits, before the cap."""
    tied_head: bool = False
    """The head is the embedding."""
    query_key_value_bias: bool = False
    attention_output_bias: bool = False
    ffn_bias: bool = False
    names: TensorNames = TensorNames()
