"""What a text encoder is, in the words its graph builder understands.

A family reads a checkpoint's configuration into an `EncoderSpec` and its head; the builder turns these and the tensors
into a graph. Neither knows the other's business: no Hugging Face field name goes below, no ONNX operator goes above.
"""

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh", "sigmoid", "identity"]
"""gelu is the exact one, by the error function."""
Pooling = Literal["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""sentence-transformers' words. weightedmean weighs token i, from 0, with i + 1."""


class EncoderRope(msgspec.Struct, frozen=True, kw_only=True):
    """A rotary position embedding of whole heads or their leading part, in halves."""

    rotary_size: int
    """Leading elements of each head that are rotated: element i with element i + rotary_size / 2."""
    inverse_frequencies: tuple[float, ...]
    """rotary_size / 2 angles per position."""
    attention_factor: float = 1.0
    """Multiplies cosine and sine."""


class RelativeBias(msgspec.Struct, frozen=True, kw_only=True):
    """MPNet's: a number for each head and bucket of distances, added to every layer's attention logits."""

    name: str
    """Of the tensor (num_buckets, H)."""
    num_buckets: int
    max_distance: int


class EncoderLayer(msgspec.Struct, frozen=True, kw_only=True):
    """Where one layer differs from the next."""

    window: int | None = None
    """Tokens to either side that a query sees; ``None``: all."""
    rope: int | None = None
    """Index into `EncoderSpec.ropes`; ``None``: not rotated."""
    has_attention_norm: bool = True
    """ModernBERT's first layer has none before attention."""


class EncoderNames(msgspec.Struct, frozen=True, kw_only=True):
    """What tensors are called, before ``.weight`` and ``.bias``; those of layer i after `layer` with i in it."""

    layer: str
    """``encoder.layer.{i}.``"""
    query_key_value: tuple[str, ...]
    """Stacked in this order; one name where the checkpoint holds them fused."""
    attention_output: str
    attention_norm: str
    """After attention and its residual sum in a post-norm encoder, before attention in a pre-norm one."""
    up: str
    gate: str | None = None
    """Of a gated feed-forward network with a matrix of its own; fused ones lie in `up`, see `EncoderSpec.ffn`."""
    down: str
    ffn_norm: str
    """After the feed-forward network and its residual sum (post-norm), or before it (pre-norm)."""
    word_embeddings: str
    position_embeddings: str | None = None
    token_type_embeddings: str | None = None
    embeddings_norm: str | None
    final_norm: str | None = None


class EncoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A bidirectional transformer over packed tokens. Norms are LayerNorm (with or without bias)."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    head_size: int
    max_model_len: int
    """Tokens of a text at most, special ones among them."""
    layers: tuple[EncoderLayer, ...]
    names: EncoderNames
    norm_epsilon: float
    is_pre_norm: bool = False
    activation: Activation = "gelu"
    ffn: Literal["plain", "gated", "gated_fused"] = "plain"
    """plain: down(act(up x)). gated: down(act(gate x) * up x). gated_fused: `names.up` holds both, the activated half
    first."""
    position_offset: int = 0
    """Row of the position table for position 0: 2 in RoBERTa with padding_idx 1."""
    num_token_types: int = 0
    """Rows of the token type table; 0: the graph takes no token types."""
    ropes: tuple[EncoderRope, ...] = ()
    relative_bias: RelativeBias | None = None
    query_key_value_bias: bool = True
    attention_output_bias: bool = True
    ffn_bias: bool = True
    norm_bias: bool = True
    embedding_size: int | None = None
    """Reserved for factorised embeddings; ``None``: `hidden_size`."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A linear layer and what follows it."""

    weight: Array
    """(out, in)"""
    bias: Array | None
    activation: Activation = "identity"


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A LayerNorm."""

    weight: Array
    bias: Array | None
    epsilon: float


@dataclass(frozen=True, slots=True)
class Normalise:
    """To length 1 (L2); a vector shorter than 1e-12 is divided by that."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """From the token vectors of a row to its result: pooled, then one step after the other.

    A sentence encoder's: pooling, Dense, Normalise. A classifier's: cls pooling, Dense with tanh, Dense to the labels.
    """

    poolings: tuple[Pooling, ...]
    """Several are put side by side."""
    steps: tuple[Dense | Norm | Normalise, ...] = ()
    pools_prompt: bool = True
    """False: the first ``num_prompt_tokens`` of a row take no part in pooling (a graph input of that name)."""

    @property
    def is_normalized(self) -> bool:
        """Results have length 1."""
        return bool(self.steps) and isinstance(self.steps[-1], Normalise)

    def width(self, hidden_size: int) -> int:
        """Numbers of a result."""
        size = hidden_size * len(self.poolings)
        for step in self.steps:
            if isinstance(step, Dense):
                size = len(step.weight)
        return size
