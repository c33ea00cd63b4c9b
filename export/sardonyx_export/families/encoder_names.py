"""What checkpoints of text encoders call their tensors: one `EncoderNames` per naming, and where the model begins."""

from collections.abc import Collection

from msgspec.structs import replace

from sardonyx_export.encoder_spec import EncoderNames
from sardonyx_export.errors import ExportError

_TOKEN_TYPES = "embeddings.token_type_embeddings"  # noqa: S105 - no password

BERT = EncoderNames(
    layer="encoder.layer.{i}.",
    query_key_value=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    ffn_norm="output.LayerNorm",
    word_embeddings="embeddings.word_embeddings",
    position_embeddings="embeddings.position_embeddings",
    token_type_embeddings=_TOKEN_TYPES,
    embeddings_norm="embeddings.LayerNorm",
)
"""RoBERTa's too."""
DISTILBERT = EncoderNames(
    layer="transformer.layer.{i}.",
    query_key_value=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    ffn_norm="output_layer_norm",
    word_embeddings="embeddings.word_embeddings",
    position_embeddings="embeddings.position_embeddings",
    embeddings_norm="embeddings.LayerNorm",
)
MPNET = replace(
    BERT,
    query_key_value=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    attention_output="attention.attn.o",
    attention_norm="attention.LayerNorm",
    token_type_embeddings=None,
)
MODERNBERT = EncoderNames(
    layer="layers.{i}.",
    query_key_value=("attn.Wqkv",),
    attention_output="attn.Wo",
    attention_norm="attn_norm",
    up="mlp.Wi",
    down="mlp.Wo",
    ffn_norm="mlp_norm",
    word_embeddings="embeddings.tok_embeddings",
    embeddings_norm="embeddings.norm",
    final_norm="final_norm",
)
NOMIC = EncoderNames(
    layer="encoder.layers.{i}.",
    query_key_value=("attn.Wqkv",),
    attention_output="attn.out_proj",
    attention_norm="norm1",
    up="mlp.fc11",
    gate="mlp.fc12",
    down="mlp.fc2",
    ffn_norm="norm2",
    word_embeddings="embeddings.word_embeddings",
    token_type_embeddings=_TOKEN_TYPES,
    embeddings_norm="emb_ln",
)
"""As released; transformers saves the same names."""
NOMIC_SPLIT = EncoderNames(
    layer="layers.{i}.",
    query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.o_proj",
    attention_norm="post_attention_layernorm",
    up="mlp.up_proj",
    gate="mlp.gate_proj",
    down="mlp.down_proj",
    ffn_norm="post_mlp_layernorm",
    word_embeddings="embeddings.word_embeddings",
    token_type_embeddings=_TOKEN_TYPES,
    embeddings_norm="embeddings.LayerNorm",
)
"""As transformers names them in memory."""


def find_names(candidates: tuple[EncoderNames, ...], tensor_names: Collection[str]) -> EncoderNames:
    """The naming that the checkpoint follows, its names with whatever stands before the model's part of them.

    The model lies at the root, or under a prefix (``bert.``) beside a head.

    Raises:
        ExportError: no naming fits, two models lie in the checkpoint, or its norms have TensorFlow's names.
    """
    held = frozenset(tensor_names)
    for names in candidates:
        suffix = f"{names.word_embeddings}.weight"
        before = [name.removesuffix(suffix) for name in held if name == suffix or name.endswith("." + suffix)]
        if len(before) > 1:
            raise ExportError(f"lies in the checkpoint {len(before)} times; one model is needed", field=suffix)
        first_output = names.layer.format(i=0) + names.attention_output
        if before and f"{before[0]}{first_output}.weight" in held:
            _refuse_old_norms(before[0], names, held)
            return _with_prefix(before[0], names)
    names = candidates[0]
    expected = f"{names.word_embeddings}.weight and {names.layer.format(i=0)}{names.attention_output}.weight"
    raise ExportError(f"the checkpoint has no {expected}, as its architecture should")


def _refuse_old_norms(prefix: str, names: EncoderNames, held: frozenset[str]) -> None:
    old = f"{prefix}{names.embeddings_norm}.gamma"
    if old in held:
        raise ExportError(
            "is how checkpoints of 2018 call a norm's weight; load it with transformers and save it again", field=old
        )


def _with_prefix(prefix: str, names: EncoderNames) -> EncoderNames:
    def absolute(name: str | None) -> str | None:
        return name and prefix + name

    return replace(
        names,
        layer=prefix + names.layer,
        word_embeddings=prefix + names.word_embeddings,
        position_embeddings=absolute(names.position_embeddings),
        token_type_embeddings=absolute(names.token_type_embeddings),
        embeddings_norm=absolute(names.embeddings_norm),
        final_norm=absolute(names.final_norm),
    )
