from typing import Any

import pytest
from tests.export.families.parity_cases import CASES

from sardonyx_export.errors import ExportError
from sardonyx_export.families.llm import architectures, read_spec
from sardonyx_export.spec import Layer

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "attention_dropout": 0.1,
    "use_cache": True,
}
GEMMA: dict[str, Any] = {
    **{name: value for name, value in LLAMA.items() if name != "hidden_act"},
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 32,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
}
QWEN: dict[str, Any] = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}


def test_every_architecture_has_a_parity_case() -> None:
    assert {case.architecture for case in CASES.values()} == set(architectures)


def test_sizes_that_a_llama_leaves_out_follow_from_the_others() -> None:
    spec = read_spec(LLAMA)
    assert (spec.num_kv_heads, spec.head_size, spec.max_model_len) == (4, 16, 256)
    assert spec.attention_scale == 0.25
    assert not spec.tied_head
    assert spec.layers == (Layer(),) * 4


def test_an_architecture_that_nobody_built_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ExportError, match=r"architectures: .*MixtralForCausalLM.*LlamaForCausalLM"):
        read_spec(LLAMA | {"architectures": ["MixtralForCausalLM"]})


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("LlamaForCausalLM", "hidden_act", "relu"),
        ("LlamaForCausalLM", "num_local_experts", 8),
        ("LlamaForCausalLM", "sliding_window", 4096),
        ("LlamaForCausalLM", "partial_rotary_factor", 0.5),
        ("LlamaForCausalLM", "rope_interleaved", True),
        ("LlamaForCausalLM", "quantization_config", {"quant_method": "awq"}),
        ("LlamaForCausalLM", "logits_scaling", 2.0),
        ("LlamaForCausalLM", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("LlamaForCausalLM", "rope_scaling", {"rope_type": "linear", "factor": 2.0, "ntk_alpha": 1.5}),
        ("LlamaForCausalLM", "rope_parameters", {"rope_type": "linear"}),
        ("LlamaForCausalLM", "rope_parameters", "linear"),
        ("LlamaForCausalLM", "hidden_size", "64"),
        ("LlamaForCausalLM", "num_hidden_layers", 0),
        ("LlamaForCausalLM", "rms_norm_eps", None),
        ("LlamaForCausalLM", "num_key_value_heads", 3),
        ("LlamaForCausalLM", "tie_word_embeddings", "yes"),
        ("MistralForCausalLM", "attention_bias", True),
        ("MistralForCausalLM", "layer_types", ["full_attention"] * 4),
        ("Qwen2ForCausalLM", "layer_types", ["full_attention"] * 3),
        ("Qwen2ForCausalLM", "layer_types", ["chunked_attention"] * 4),
        ("Qwen2ForCausalLM", "use_mrope", True),
        ("Qwen3ForCausalLM", "num_experts", 128),
        ("Phi3ForCausalLM", "lm_head_bias", True),
        ("SmolLM3ForCausalLM", "no_rope_layers", [1, 0]),
    ],
)
def test_what_is_not_implemented_is_refused_by_its_name(architecture: str, field: str, value: Any) -> None:
    with pytest.raises(ExportError, match=rf"config\.json: {field}\b"):
        read_spec(LLAMA | {"architectures": [architecture], field: value})


@pytest.mark.parametrize("value", [None, False])
def test_a_feature_that_is_off_is_no_obstacle(value: Any) -> None:
    assert read_spec(LLAMA | {"some_new_feature": value}) == read_spec(LLAMA)


def test_bidirectional_attention_is_refused() -> None:
    with pytest.raises(ExportError, match="use_bidirectional_attention"):
        read_spec(GEMMA | {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True})


@pytest.mark.parametrize("max_model_len", [0, 257])
def test_more_positions_than_the_checkpoint_has_are_refused(max_model_len: int) -> None:
    with pytest.raises(ExportError, match="max_model_len"):
        read_spec(LLAMA, max_model_len)


def test_qwen_has_windows_only_where_it_says_so() -> None:
    fields = {"sliding_window": 16, "max_window_layers": 3}
    assert read_spec(QWEN | fields | {"use_sliding_window": False}).layers == (Layer(),) * 4
    windowed = read_spec(QWEN | fields | {"use_sliding_window": True}).layers
    assert [layer.window for layer in windowed] == [None, None, None, 16]


def test_layer_types_win_over_a_pattern() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    spec = read_spec(GEMMA | {"architectures": ["Gemma2ForCausalLM"], "layer_types": kinds})
    assert [layer.window for layer in spec.layers] == [None, 8, 8, None]
    pattern = read_spec(GEMMA | {"architectures": ["Gemma2ForCausalLM"]})
    assert [layer.window for layer in pattern.layers] == [8, None, 8, None]


def test_gemma_3_rotates_windowed_layers_by_a_base_of_their_own_in_either_spelling() -> None:
    gemma = GEMMA | {"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 2}
    old = read_spec(
        gemma | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    )
    del gemma["rope_theta"]
    new = read_spec(
        gemma
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        }
    )
    assert old == new
    assert [layer.rope for layer in old.layers] == [1, 0, 1, 0]
    assert old.ropes[0].inverse_frequencies[0] == 1 / 8
    assert old.ropes[1].inverse_frequencies[0] == 1


def test_smollm3_leaves_the_rotation_out_of_every_fourth_layer() -> None:
    spec = read_spec(LLAMA | {"architectures": ["SmolLM3ForCausalLM"]})
    assert [layer.rope for layer in spec.layers] == [0, 0, 0, None]
    assert spec.tied_head
