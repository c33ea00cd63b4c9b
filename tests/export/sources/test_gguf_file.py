"""GGUF files against the Hugging Face models that they were made from.

`_to_gguf` does what llama.cpp's converter does: it renames, interleaves the rows of query and key, adds 1 to Gemma's
norms. The checkpoint read back must have the original's tensors, and a configuration that gives the same logits, both
in transformers and in the numpy reference that verification compares with.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from tests.export.checkpoints import byte_level_vocabulary, tiny_llama_metadata, tiny_llama_tensors, write_gguf

from sardonyx_export.errors import ExportError
from sardonyx_export.families.llm import read_spec
from sardonyx_export.sources.gguf_file import GgufFile
from sardonyx_export.stages.reference import reference_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_VOCAB = len(byte_level_vocabulary()[0])
_COMMON: dict[str, Any] = {
    "vocab_size": _VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 2,
}
_SPLIT_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = {
    **_SPLIT_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_PHI_NAMES = {**_SPLIT_NAMES, "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
_METADATA: dict[str, Any] = {
    "context_length": 256,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 16,
}


def _to_gguf(
    state: dict[str, npt.NDArray[np.float32]], names: dict[str, str], *, permuted: bool, offset: float, tied: bool
) -> dict[str, npt.NDArray[np.float32]]:
    tensors = {}
    for name, value in state.items():
        value = value + np.float32(offset) if name.endswith("norm.weight") else value
        if permuted and (".q_proj." in name or ".k_proj." in name):
            num_heads = 4 if ".q_proj." in name else 2
            half = value.shape[0] // num_heads // 2
            value = value.reshape(num_heads, 2, half, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if name == "model.embed_tokens.weight":
            tensors["token_embd.weight"] = value
        elif name == "model.norm.weight":
            tensors["output_norm.weight"] = value
        elif name == "lm_head.weight":
            tensors |= {} if tied else {"output.weight": value}
        else:
            layer, _, part = name.removeprefix("model.layers.").partition(".")
            stem, _, suffix = part.rpartition(".")
            tensors[f"blk.{layer}.{names[stem]}.{suffix}"] = value
    return tensors


_LONG = [1.0, 1.5, 2.0, 4.0, 6.0, 8.0, 10.0, 16.0]
_SHORT = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]


def _llama3_factors() -> npt.NDArray[np.float32]:
    """As llama.cpp computes them from Llama 3's scaling (conversion/llama.py, generate_extra_tensors)."""
    factors = []
    for frequency in 1.0 / (10000.0 ** (np.arange(0, 16, 2, dtype=np.float64) / 16)):
        wavelength = 2 * np.pi / frequency
        if wavelength < 64 / 4.0:
            factors.append(1.0)
        elif wavelength > 64 / 1.0:
            factors.append(8.0)
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(factors, np.float32)


_CASES: dict[str, dict[str, Any]] = {
    "llama": {
        "config": lambda: transformers.LlamaConfig(**_COMMON, num_hidden_layers=2, tie_word_embeddings=False),
        "metadata": {"block_count": 2},
        "permuted": True,
    },
    "llama-biased": {
        "architecture": "llama",
        "config": lambda: transformers.LlamaConfig(
            **_COMMON, num_hidden_layers=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
        ),
        "metadata": {"block_count": 2},
        "permuted": True,
    },
    "llama3": {
        "architecture": "llama",
        "config": lambda: transformers.LlamaConfig(
            **_COMMON,
            num_hidden_layers=2,
            tie_word_embeddings=True,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        "metadata": {"block_count": 2},
        "permuted": True,
        "tensors": lambda: {"rope_freqs.weight": _llama3_factors()},
    },
    "llama-linear": {
        "architecture": "llama",
        "config": lambda: transformers.LlamaConfig(
            **_COMMON,
            num_hidden_layers=2,
            tie_word_embeddings=True,
            rope_scaling={"rope_type": "linear", "factor": 2.0},
        ),
        "metadata": {"block_count": 2, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        "permuted": True,
    },
    "mistral": {
        "architecture": "llama",
        "config": lambda: transformers.MistralConfig(
            **_COMMON, num_hidden_layers=2, sliding_window=8, tie_word_embeddings=False
        ),
        "metadata": {"block_count": 2, "attention.sliding_window": 8},
        "permuted": True,
    },
    "qwen2": {
        "config": lambda: transformers.Qwen2Config(**_COMMON, num_hidden_layers=2, tie_word_embeddings=True),
        "metadata": {"block_count": 2},
    },
    "qwen3": {
        "config": lambda: transformers.Qwen3Config(
            **{**_COMMON, "head_dim": 32}, num_hidden_layers=2, tie_word_embeddings=True
        ),
        "metadata": {"block_count": 2, "attention.key_length": 32, "attention.value_length": 32},
        "drop": ["rope.dimension_count"],
    },
    "qwen3-yarn": {
        "architecture": "qwen3",
        "config": lambda: transformers.Qwen3Config(
            **_COMMON,
            num_hidden_layers=2,
            tie_word_embeddings=True,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        "metadata": {
            "block_count": 2,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    },
    "phi3": {
        "config": lambda: transformers.Phi3Config(
            **{key: value for key, value in _COMMON.items() if key != "head_dim"},
            num_hidden_layers=2,
            tie_word_embeddings=False,
            sliding_window=16,
            original_max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            rope_scaling={"rope_type": "longrope", "long_factor": _LONG, "short_factor": _SHORT},
        ),
        "metadata": {
            "block_count": 2,
            "attention.sliding_window": 16,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": 1.15,
        },
        "names": _PHI_NAMES,
        "tensors": lambda: {
            "rope_factors_long.weight": np.array(_LONG, np.float32),
            "rope_factors_short.weight": np.array(_SHORT, np.float32),
        },
    },
    "gemma2": {
        "config": lambda: transformers.Gemma2Config(
            **_COMMON, num_hidden_layers=3, sliding_window=8, query_pre_attn_scalar=16
        ),
        "metadata": {
            "block_count": 3,
            "attention.key_length": 16,
            "attention.value_length": 16,
            "attention.sliding_window": 8,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        "names": _GEMMA_NAMES,
        "offset": 1.0,
    },
    "gemma3": {
        "config": lambda: transformers.Gemma3TextConfig(
            **_COMMON, num_hidden_layers=7, sliding_window=8, query_pre_attn_scalar=16
        ),
        "metadata": {
            "block_count": 7,
            "attention.key_length": 16,
            "attention.value_length": 16,
            "attention.sliding_window": 8,
            "rope.freq_base": 1_000_000.0,
        },
        "names": _GEMMA_NAMES,
        "offset": 1.0,
    },
    "smollm3": {
        "config": lambda: transformers.SmolLM3Config(**_COMMON, num_hidden_layers=5, tie_word_embeddings=True),
        "metadata": {"block_count": 5, "rope.freq_base": 2_000_000.0},
        "permuted": True,
    },
    "granite": {
        "config": lambda: transformers.GraniteConfig(
            **{key: value for key, value in _COMMON.items() if key != "head_dim"},
            num_hidden_layers=2,
            tie_word_embeddings=True,
            attention_multiplier=0.2,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            logits_scaling=4.0,
        ),
        "metadata": {
            "block_count": 2,
            "attention.scale": 0.2,
            "embedding_scale": 3.0,
            "residual_scale": 0.5,
            "logit_scale": 4.0,
        },
        "permuted": True,
    },
}


def _model(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _state(model: Any) -> dict[str, npt.NDArray[np.float32]]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("case", list(_CASES))
def test_a_gguf_file_gives_back_the_model_it_was_made_from(tmp_path: Path, case: str) -> None:
    facts = _CASES[case]
    make_config: Callable[[], Any] = facts["config"]
    original = _model(make_config())
    tied = original.config.tie_word_embeddings
    tensors = _to_gguf(
        _state(original),
        facts.get("names", _SPLIT_NAMES),
        permuted=facts.get("permuted", False),
        offset=facts.get("offset", 0.0),
        tied=tied,
    )
    metadata = {key: value for key, value in _METADATA.items() if key not in facts.get("drop", [])}
    path = write_gguf(
        tmp_path / f"{case}.gguf",
        architecture=facts.get("architecture", case),
        metadata=metadata | facts["metadata"],
        tensors=tensors | facts.get("tensors", dict)(),
    )
    checkpoint = GgufFile(path, uri=case)

    config = dict(checkpoint.config)
    read_config = type(original.config)(**{key: value for key, value in config.items() if key != "model_type"})
    assert config["architectures"] == [type(original).__name__]
    rebuilt = _model(read_config)
    state = _state(original)
    expected_names = {name for name in state if not (tied and name == "lm_head.weight")}
    assert set(checkpoint.names()) == expected_names
    for name in expected_names:
        np.testing.assert_allclose(checkpoint.tensor(name).read(), state[name], rtol=0, atol=2e-7)
    rebuilt.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    ids = torch.arange(100).reshape(1, 100) % _VOCAB
    with torch.no_grad():
        expected = original(ids).logits.numpy()
        np.testing.assert_allclose(rebuilt(ids).logits.numpy(), expected, rtol=0, atol=2e-5)
    # Longrope: transformers changes its factors with the sequence's length, an export has one set.
    spec = read_spec(checkpoint.config, max_model_len=256)
    prompts = [ids[0, :30].tolist(), ids[0].tolist()]
    short, whole = reference_logits(checkpoint, spec, prompts)
    np.testing.assert_allclose(whole, expected[0], rtol=0, atol=1e-4)
    if case != "phi3":
        np.testing.assert_allclose(short, expected[0, :30], rtol=0, atol=1e-4)


def test_blocks_lie_in_the_order_of_the_dequantised_rows(tmp_path: Path) -> None:
    quantised = {"blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q8_0}
    path = write_gguf(
        tmp_path / "a.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors(), quantised=quantised
    )
    tensor = GgufFile(path, uri="a").tensor("model.layers.0.self_attn.q_proj.weight")
    assert tensor.storage == "Q8_0"
    assert tensor.blocks().shape == (64, 2 * 34)
    assert np.array_equal(gguf.dequantize(tensor.blocks(), gguf.GGMLQuantizationType.Q8_0), tensor.read())


def test_plain_floats_have_no_blocks(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors())
    with pytest.raises(ValueError, match="no blocks"):
        GgufFile(path, uri="a").tensor("model.norm.weight").blocks()


def test_licence_hash_and_name_come_from_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors())
    checkpoint = GgufFile(path, uri="a", licence="something else")
    assert checkpoint.licence == "apache-2.0"
    assert checkpoint.sha256 is not None
    assert len(checkpoint.sha256) == 64
    assert checkpoint.display_name == "Tiny Llama"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_count": None}, r"llama\.block_count"),
        ({"block_count": "two"}, r"llama\.block_count"),
        ({"attention.head_count": 0}, r"llama\.attention\.head_count"),
        ({"attention.head_count": [4, 2]}, r"llama\.attention\.head_count"),
        ({"attention.value_length": 32}, "differs from key_length"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope.scaling.type": "longrope"}, r"rope\.scaling\.type"),
        ({"/split.count": 2}, "merge it first"),
    ],
)
def test_metadata_that_we_cannot_follow_is_refused_by_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    metadata = {key: value for key, value in (tiny_llama_metadata() | change).items() if value is not None}
    path = write_gguf(tmp_path / "a.gguf", metadata=metadata, tensors=tiny_llama_tensors())
    with pytest.raises(ExportError, match=message):
        GgufFile(path, uri="a")


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'mamba' is not supported .*llama"):
        GgufFile(write_gguf(tmp_path / "a.gguf", architecture="mamba"), uri="a")


def test_a_tensor_that_the_architecture_lacks_is_refused(tmp_path: Path) -> None:
    tensors = tiny_llama_tensors() | {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}
    path = write_gguf(tmp_path / "a.gguf", metadata=tiny_llama_metadata(), tensors=tensors)
    with pytest.raises(ExportError, match=r"ffn_gate_inp\.weight: is not a part of LlamaForCausalLM"):
        GgufFile(path, uri="a")
