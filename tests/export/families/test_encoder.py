"""Configurations of text encoders, read to the last field."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.export.encoder_checkpoints import MAX_MODEL_LEN, make_encoder, write_released_nomic_config

from sardonyx_export.encoder_spec import EncoderSpec, Head
from sardonyx_export.errors import ExportError
from sardonyx_export.families import encoder_names
from sardonyx_export.families.encoder import architectures, read_encoder_spec
from sardonyx_export.families.encoder_heads import is_classifier
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from sardonyx_export.stages.encoder_reference import EncodedRow, reference_outputs

BERT: Mapping[str, Any] = {
    "architectures": ["BertModel"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
DISTILBERT: Mapping[str, Any] = {
    "architectures": ["DistilBertModel"],
    "vocab_size": 100,
    "dim": 32,
    "hidden_dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 48,
    "activation": "gelu",
}
MODERNBERT: Mapping[str, Any] = {
    "architectures": ["ModernBertForMaskedLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
}
# What the first releases of ModernBERT carry beside sizes.
MODERNBERT_RELEASED: Mapping[str, Any] = {
    "attention_bias": False,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_pooling": "mean",
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "initializer_cutoff_factor": 2.0,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "norm_bias": False,
    "norm_eps": 1e-05,
    "position_embedding_type": "absolute",
    "reference_compile": True,
    "sep_token_id": 50282,
    "tie_word_embeddings": True,
}


def _tensors(names: Any, prefix: str = "") -> list[str]:
    """The two tensors by which a naming is recognised."""
    first = names.layer.format(i=0) + names.attention_output
    return [f"{prefix}{name}.weight" for name in (names.word_embeddings, first)]


def _bert(**changes: Any) -> EncoderSpec:
    return read_encoder_spec({**BERT, **changes}, _tensors(encoder_names.BERT))


def test_sizes_are_bert_s_own() -> None:
    spec = _bert(num_attention_heads=2, layer_norm_eps=1e-3)
    sizes = (spec.vocab_size, spec.hidden_size, spec.ffn_size, spec.num_heads, spec.head_size, spec.max_model_len)
    assert sizes == (100, 32, 64, 2, 16, 48)
    assert (len(spec.layers), spec.num_token_types, spec.norm_epsilon) == (2, 2, 1e-3)
    assert spec.names == encoder_names.BERT


def test_released_minilm_configuration_is_read() -> None:
    released = {
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "model_type": "bert",
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "transformers_version": "4.8.2",
        "use_cache": True,
    }
    assert _bert(**released) == _bert()


@pytest.mark.parametrize("prefix", ["", "bert.", "model.encoder."])
def test_names_carry_the_prefix_under_which_the_encoder_lies(prefix: str) -> None:
    spec = read_encoder_spec(BERT, [*_tensors(encoder_names.BERT, prefix), "classifier.weight"])
    assert spec.names.layer == f"{prefix}encoder.layer.{{i}}."
    assert spec.names.word_embeddings == f"{prefix}embeddings.word_embeddings"
    assert spec.names.token_type_embeddings == f"{prefix}embeddings.token_type_embeddings"
    assert spec.names.attention_output == "attention.output.dense"


def test_positions_are_counted_from_the_row_after_padding_when_the_model_is_like_roberta() -> None:
    config = {**BERT, "architectures": ["XLMRobertaModel"], "max_position_embeddings": 514, "type_vocab_size": 1}
    spec = read_encoder_spec({**config, "pad_token_id": 1}, _tensors(encoder_names.BERT))
    assert (spec.position_offset, spec.max_model_len, spec.num_token_types) == (2, 512, 1)
    assert read_encoder_spec(config, _tensors(encoder_names.BERT)) == spec


def test_texts_may_be_cut_shorter_but_not_grow() -> None:
    assert read_encoder_spec(BERT, _tensors(encoder_names.BERT), 20).max_model_len == 20
    for wrong in (0, 49):
        with pytest.raises(ExportError, match="1 to 48 positions") as error:
            read_encoder_spec(BERT, _tensors(encoder_names.BERT), wrong)
        assert error.value.field == "max_model_len"


def test_modernbert_alternates_windows_and_rotations() -> None:
    spec = read_encoder_spec(MODERNBERT, _tensors(encoder_names.MODERNBERT, "model."))
    assert [layer.window for layer in spec.layers] == [None, 64, 64, None]
    assert [layer.rope for layer in spec.layers] == [0, 1, 1, 0]
    assert [layer.has_attention_norm for layer in spec.layers] == [False, True, True, True]
    thetas = [rope.inverse_frequencies[4] ** -2 for rope in spec.ropes]  # Element 4 of 8 turns by theta ** -0.5.
    assert thetas == pytest.approx([160_000.0, 10_000.0], rel=1e-5)
    assert spec.is_pre_norm
    assert spec.ffn == "gated_fused"
    assert not spec.norm_bias


def test_released_modernbert_configuration_is_read() -> None:
    tensors = _tensors(encoder_names.MODERNBERT, "model.")
    released = read_encoder_spec({**MODERNBERT, **MODERNBERT_RELEASED}, tensors)
    assert released == read_encoder_spec(MODERNBERT, tensors)
    changed = {**MODERNBERT, **MODERNBERT_RELEASED, "global_rope_theta": 100.0, "global_attn_every_n_layers": 2}
    spec = read_encoder_spec(changed, tensors)
    assert spec.ropes[0].inverse_frequencies[4] == pytest.approx(0.1, rel=1e-5)
    assert [layer.window for layer in spec.layers] == [None, 64, None, 64]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["AlbertModel"]),
        ("architectures", None),
        ("hidden_act", "quick_gelu"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("embedding_size", 16),
        ("num_attention_heads", 5),
        ("hidden_size", "32"),
        ("layer_norm_eps", 0),
        ("vocab_size", None),
    ],
)
def test_bert_is_refused_by_the_field_that_is_not_implemented(field: str, value: Any) -> None:
    with pytest.raises(ExportError) as error:
        _bert(**{field: value})
    assert error.value.field == field


@pytest.mark.parametrize(
    ("config", "names", "field", "value"),
    [
        ({**BERT, "architectures": ["RobertaModel"]}, encoder_names.BERT, "pad_token_id", -1),
        ({**BERT, "architectures": ["RobertaModel"]}, encoder_names.BERT, "max_position_embeddings", 2),
        ({**BERT, "architectures": ["MPNetModel"]}, encoder_names.MPNET, "relative_attention_num_buckets", 16),
        (DISTILBERT, encoder_names.DISTILBERT, "n_heads", 3),
        (DISTILBERT, encoder_names.DISTILBERT, "activation", "gelu_10"),
        (MODERNBERT, encoder_names.MODERNBERT, "layer_types", ["full_attention"]),
        (MODERNBERT, encoder_names.MODERNBERT, "hidden_activation", "mish"),
        (MODERNBERT, encoder_names.MODERNBERT, "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_others_are_refused_by_the_field_that_is_not_implemented(
    config: Mapping[str, Any], names: Any, field: str, value: Any
) -> None:
    config = {name: old for name, old in config.items() if name != "type_vocab_size" or names is encoder_names.BERT}
    read_encoder_spec(config, _tensors(names))
    with pytest.raises(ExportError) as error:
        read_encoder_spec({**config, field: value}, _tensors(names))
    assert error.value.field == field


def test_unknown_parameter_of_a_rotation_is_refused() -> None:
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "spread": 2}}
    with pytest.raises(ExportError) as error:
        read_encoder_spec({**MODERNBERT, "rope_parameters": rope}, _tensors(encoder_names.MODERNBERT))
    assert error.value.field == "rope_parameters.full_attention.spread"


def test_checkpoint_of_other_tensors_is_refused() -> None:
    with pytest.raises(ExportError, match=r"no embeddings\.word_embeddings\.weight"):
        read_encoder_spec(BERT, ["model.embed_tokens.weight"])
    with pytest.raises(ExportError, match=r"no embeddings\.word_embeddings\.weight and transformer\.layer\.0"):
        read_encoder_spec(DISTILBERT, _tensors(encoder_names.BERT))


def test_checkpoint_of_two_encoders_is_refused() -> None:
    both = _tensors(encoder_names.BERT, "question.") + _tensors(encoder_names.BERT, "answer.")
    with pytest.raises(ExportError, match="2 times"):
        read_encoder_spec(BERT, both)


def test_norms_by_tensorflow_s_names_are_refused() -> None:
    tensors = [*_tensors(encoder_names.BERT, "bert."), "bert.embeddings.LayerNorm.gamma"]
    with pytest.raises(ExportError, match="save it again") as error:
        read_encoder_spec(BERT, tensors)
    assert error.value.field == "bert.embeddings.LayerNorm.gamma"


def _nomic(folder: Path, **changes: Any) -> EncoderSpec:
    write_released_nomic_config(folder, **changes)
    return read_encoder_spec(json.loads((folder / "config.json").read_text()), _tensors(encoder_names.NOMIC))


def test_released_nomic_configuration_is_read(tmp_path: Path) -> None:
    spec = _nomic(tmp_path, vocab_size=100, n_inner=80, layer_norm_epsilon=1e-4)
    assert (spec.vocab_size, spec.hidden_size, spec.ffn_size, spec.norm_epsilon) == (128, 32, 80, 1e-4)
    assert (spec.max_model_len, spec.ffn, spec.activation) == (MAX_MODEL_LEN, "gated", "silu")
    assert [layer.rope for layer in spec.layers] == [0, 0]
    assert not spec.query_key_value_bias
    assert spec.norm_bias


def test_nomic_without_token_types_names_no_table(tmp_path: Path) -> None:
    spec = _nomic(tmp_path, type_vocab_size=0)
    assert (spec.num_token_types, spec.names.token_type_embeddings) == (0, None)


def test_nomic_serves_trained_positions_only_when_longer_texts_are_rotated_otherwise(tmp_path: Path) -> None:
    assert _nomic(tmp_path, n_positions=8192, max_trained_positions=2048).max_model_len == 8192
    scaled = _nomic(tmp_path, n_positions=8192, max_trained_positions=2048, rotary_scaling_factor=2)
    assert scaled.max_model_len == 2048


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "gelu"),
        ("prenorm", True),
        ("causal", True),
        ("use_rms_norm", True),
        ("parallel_block", True),
        ("rotary_emb_interleaved", True),
        ("rotary_emb_scale_base", 512),
        ("rotary_emb_fraction", 0.0),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("mlp_fc2_bias", True),
        ("moe_every_n_layers", 2),
        ("n_head", 3),
    ],
)
def test_released_nomic_is_refused_by_the_field_that_is_not_implemented(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ExportError) as error:
        _nomic(tmp_path, **{field: value})
    assert error.value.field == field


def test_nomic_is_read_by_the_names_that_transformers_has_in_memory(tmp_path: Path) -> None:
    model = make_encoder(tmp_path, "NomicBertModel")
    rows = [EncodedRow(token_ids=[5, 9, 30, 8])]
    head = Head(poolings=("mean",))
    as_released = SafetensorsFolder(tmp_path, uri="tiny")
    expected = reference_outputs(as_released, _spec(as_released), head, rows)
    save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    as_in_memory = SafetensorsFolder(tmp_path, uri="tiny")
    spec = _spec(as_in_memory)
    assert spec.names == encoder_names.NOMIC_SPLIT
    np.testing.assert_allclose(reference_outputs(as_in_memory, spec, head, rows), expected, atol=1e-6)


def test_architectures_with_labels_are_told_apart() -> None:
    assert {name for name in architectures if is_classifier(name)} == {
        name for name in architectures if "Classification" in name
    }
    assert not is_classifier("AlbertForSequenceClassification")


def _spec(checkpoint: SafetensorsFolder) -> EncoderSpec:
    return read_encoder_spec(checkpoint.config, list(checkpoint.names()))
