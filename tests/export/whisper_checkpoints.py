"""Tiny Whisper models with random weights, saved by `transformers` as their publishers would save them."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra `export-torch` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `export-torch` is not installed")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "max_source_positions": 20,
    "max_target_positions": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def make_whisper(folder: Path, **changes: Any) -> Any:
    """Write config.json, model.safetensors and an empty tokenizer.json.

    The weights are spread so that every part of the model moves the result, biases and norms among them, and are the
    same in every call with the same arguments.

    Returns:
        The `transformers` model, in evaluation mode, with eager attention.
    """
    config = transformers.WhisperConfig(**SIZES | changes)
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif "embed" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(1.5 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model
