"""Whisper's configuration in Hugging Face's words, read into a `WhisperSpec`.

Source: ``WhisperConfig`` and ``modeling_whisper.py``, transformers 5.24.
"""

from collections.abc import Mapping
from typing import Any

from sardonyx_export.families.config import ConfigReader
from sardonyx_export.whisper_spec import WhisperSpec

ARCHITECTURE = "WhisperForConditionalGeneration"

_TRAINING = [
    "activation_dropout",
    "attention_dropout",
    "dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "init_std",
    "apply_spec_augment",
    "mask_time_prob",
    "mask_time_length",
    "mask_time_min_masks",
    "mask_feature_prob",
    "mask_feature_length",
    "mask_feature_min_masks",
    "use_weighted_layer_sum",
    "classifier_proj_size",
]
_GENERATION = ["suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "median_filter_width"]
"""How texts are searched for: read from the tokenizer and ``generation_config.json`` instead."""


def read_whisper_spec(config: Mapping[str, Any]) -> WhisperSpec:
    """The sizes of a checkpoint.

    Raises:
        ExportError: a field is missing, impossible, or asks for what the builder does not have.
    """
    reader = ConfigReader(config)
    for name in (*_TRAINING, *_GENERATION):
        reader.raw(name)
    hidden_size = reader.integer("d_model")
    encoder_heads, decoder_heads = (reader.integer(f"{side}_attention_heads") for side in ("encoder", "decoder"))
    for side, num_heads in (("encoder", encoder_heads), ("decoder", decoder_heads)):
        if hidden_size % num_heads:
            raise reader.refusal(f"{side}_attention_heads", f"is {num_heads}, which does not divide d_model")
    activation = reader.raw("activation_function")
    if activation not in (None, "gelu"):
        raise reader.refusal("activation_function", f"is {activation!r}; gelu is built")
    for name, value in (("is_encoder_decoder", True), ("scale_embedding", False), ("tie_word_embeddings", True)):
        found = reader.raw(name)
        if found is not None and found is not value:
            raise reader.refusal(name, f"is {found!r}; {value} is built")
    num_layers = reader.optional_integer("num_hidden_layers")
    num_encoder_layers = reader.integer("encoder_layers")
    if num_layers not in (None, num_encoder_layers):
        raise reader.refusal("num_hidden_layers", f"is {num_layers}, but encoder_layers is {num_encoder_layers}")
    spec = WhisperSpec(
        num_mels=reader.integer("num_mel_bins", 80),
        num_frames=2 * reader.integer("max_source_positions", 1500),
        hidden_size=hidden_size,
        num_encoder_layers=num_encoder_layers,
        num_encoder_heads=encoder_heads,
        encoder_ffn_size=reader.integer("encoder_ffn_dim"),
        num_decoder_layers=reader.integer("decoder_layers"),
        num_decoder_heads=decoder_heads,
        decoder_ffn_size=reader.integer("decoder_ffn_dim"),
        vocab_size=reader.integer("vocab_size"),
        max_model_len=reader.integer("max_target_positions", 448),
    )
    reader.finish()
    return spec
