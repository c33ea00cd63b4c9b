"""Tiny models of `transformers` with random weights, one for each configuration that graphs are compared on."""

from typing import Any

import pytest
from tests.export.families.parity_cases import Case

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")

VOCAB_SIZE = 128
MAX_POSITIONS = 96


def reference_model(case: Case) -> Any:
    """The model in fp32 with weights spread so that every part of the graph moves the logits."""
    model_class = getattr(transformers, case.architecture)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": 0,
    }
    if case.architecture.startswith("Gemma"):
        sizes["head_dim"] = 32
    config = model_class.config_class(**{**sizes, **case.fields})
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif "embed_tokens" in name:
                parameter.copy_(torch.randn_like(parameter) / (8 if config.tie_word_embeddings else 1))
            else:
                parameter.copy_(1.5 * torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    return model
