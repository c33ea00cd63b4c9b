"""Every architecture against `transformers`: the same random checkpoint, the same logits.

The reference computes a whole sequence at once in fp32; the graph computes it at once, in chunks, and row by row beside others.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sardonyx_export.builders.decoder import BuildOptions, build_decoder
from sardonyx_export.families.llm import architectures
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder
from tests.export.packed_step import PackedStep

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")

TOLERANCE = 1e-3
VOCAB_SIZE = 128
MAX_POSITIONS = 96


@dataclass(frozen=True)
class Case:
    """One configuration of one architecture."""

    architecture: str
    fields: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, int, int] = (75, 33, 9)
    """Tokens of three sequences; the first is the long prompt."""
    max_model_len: int | None = None


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
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 24, "head_dim": 64},
        lengths=(75, 40, 26),
    ),
    "phi3-longrope-kept-short": Case(
        "Phi3ForCausalLM",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 40, "head_dim": 64},
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


def test_every_architecture_has_a_parity_case() -> None:
    assert {case.architecture for case in CASES.values()} == set(architectures)


@dataclass
class Pair:
    """A graph, and what the reference says of three sequences."""

    model: Path
    max_model_len: int
    sequences: list[list[int]]
    logits: list[npt.NDArray[np.float32]]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = CASES[request.param]
    folder: Path = tmp_path_factory.mktemp(request.param)
    reference = _reference_model(case)
    reference.save_pretrained(folder / "source")
    (folder / "source" / "tokenizer.json").write_text("{}")
    (folder / "graph").mkdir()
    options = BuildOptions(precision="fp32", max_model_len=case.max_model_len)
    report = build_decoder(SafetensorsFolder(folder / "source", uri="tiny"), folder / "graph", options)
    generator = np.random.default_rng(5)
    sequences = [generator.integers(0, VOCAB_SIZE, length).tolist() for length in case.lengths]
    with torch.no_grad():
        logits = [reference(torch.tensor([ids])).logits[0].numpy() for ids in sequences]
    return Pair(report.files[0], report.max_model_len, sequences, logits)


def test_logits_equal_the_reference_when_a_prompt_is_run_at_once(pair: Pair) -> None:
    logits = PackedStep(pair.model, pair.max_model_len).run({0: pair.sequences[0]})
    assert np.ptp(pair.logits[0], axis=-1).min() > 1  # A flat reference would prove nothing.
    np.testing.assert_allclose(logits, pair.logits[0], rtol=0, atol=TOLERANCE)


def test_logits_equal_the_reference_when_a_prompt_is_run_in_chunks(pair: Pair) -> None:
    step = PackedStep(pair.model, pair.max_model_len)
    ids = pair.sequences[0]
    borders = [0, 5, 6, 22, len(ids) - 1, len(ids)]
    chunks = [step.run({0: ids[start:stop]}) for start, stop in zip(borders, borders[1:], strict=False)]
    np.testing.assert_allclose(np.concatenate(chunks), pair.logits[0], rtol=0, atol=TOLERANCE)


def test_logits_equal_the_reference_when_rows_of_different_length_decode_together(pair: Pair) -> None:
    step = PackedStep(pair.model, pair.max_model_len, num_rows=4)
    rows = dict(zip((0, 1, 3), pair.sequences, strict=True))
    expected = dict(zip((0, 1, 3), pair.logits, strict=True))
    step.run({row: ids[:-3] for row, ids in rows.items()}, only_last=True)
    # One step where a row is at its prompt's end, one decodes and one waits; then one where all decode and row 2 idles.
    mixed = step.run({0: rows[0][-3:-1], 3: rows[3][-3:-2]})
    np.testing.assert_allclose(mixed[:2], expected[0][-3:-1], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(mixed[2], expected[3][-3], rtol=0, atol=TOLERANCE)
    decoded = step.run({0: rows[0][-1:], 1: rows[1][-3:-2], 3: rows[3][-2:-1]}, only_last=True)
    np.testing.assert_allclose(decoded[0], expected[0][-1], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(decoded[1], expected[1][-3], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(decoded[2], expected[3][-2], rtol=0, atol=TOLERANCE)


def _reference_model(case: Case) -> Any:
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
