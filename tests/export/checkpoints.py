"""Tiny checkpoints for tests, written as their publishers would write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Arrays = Mapping[str, npt.NDArray[Any]]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_WORDS = ["the", "of", "and", "to", "in", "he", "is", "that", "capital", "France", "hello", "world", "12", "123", "ä"]


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def byte_level_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges: bytes, a few words with and without a leading blank, three control tokens."""
    spelling = byte_alphabet()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *spelling]
    types = [3, 3, 3] + [1] * 256
    merges: list[str] = []
    for word in _WORDS:
        for text in (word, " " + word):
            symbols = [spelling[byte] for byte in text.encode()]
            joined = symbols[0]
            for symbol in symbols[1:]:
                merge = f"{joined} {symbol}"
                joined += symbol
                if joined not in tokens:
                    tokens.append(joined)
                    types.append(1)
                    merges.append(merge)
    return tokens, types, merges


def sentencepiece_vocabulary() -> tuple[list[str], list[int], list[float]]:
    """Tokens, types and scores: three specials, 256 bytes, letters, and words built from the left."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(tokens)
    rank = 0
    for word in ["\u2581" + word for word in _WORDS] + _WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                types.append(1)
                scores.append(-float(rank))
                rank += 1
    for letter in sorted(set("".join(_WORDS) + "\u2581.,!?bjkquvxyz034567890")):
        if letter not in tokens:
            tokens.append(letter)
            types.append(1)
            scores.append(-float(rank))
            rank += 1
    return tokens, types, scores


def add_vocabulary(
    writer: gguf.GGUFWriter, kind: str = "gpt2", *, pre: str = "smollm", add_bos: bool | None = False
) -> int:
    """Write a tokenizer's metadata; returns the number of tokens."""
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        tokens, types, merges = byte_level_vocabulary()
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)
        writer.add_chat_template(CHAT_TEMPLATE)
    else:
        tokens, types, scores = sentencepiece_vocabulary()
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    return len(tokens)


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    tensors: Arrays | None = None,
    quantised: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    vocabulary: str = "gpt2",
    pre: str = "smollm",
    add_bos: bool | None = False,
) -> Path:
    """Write a GGUF file.

    Args:
        path: of the file.
        architecture: ``general.architecture``.
        metadata: ``{architecture}.*`` keys without that prefix; others by their full name after a ``/``.
        tensors: float arrays by llama.cpp's names; by default an embedding alone.
        quantised: block types by tensor name, where not F32.
        vocabulary: ``gpt2`` or ``llama``.
        pre: llama.cpp's name of the splitting rule.
        add_bos: ``tokenizer.ggml.add_bos_token`` of a ``gpt2`` vocabulary; ``None`` leaves it out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    num_tokens = add_vocabulary(writer, vocabulary, pre=pre, add_bos=add_bos)
    for key, value in (metadata or {}).items():
        full = key[1:] if key.startswith("/") else f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_array(full, value)
    for name, array in (tensors or {"token_embd.weight": np.zeros((num_tokens, 8), np.float32)}).items():
        qtype = (quantised or {}).get(name, gguf.GGMLQuantizationType.F32)
        if qtype == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array, np.float32), qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama_metadata(num_layers: int = 2) -> dict[str, Any]:
    return {
        "block_count": num_layers,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10_000.0,
        "rope.dimension_count": 16,
        "/general.name": "Tiny Llama",
        "/general.license": "apache-2.0",
    }


def tiny_llama_tensors(num_layers: int = 2, *, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Weights for `tiny_llama_metadata` under llama.cpp's names, with a tied head."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    tensors = {"token_embd.weight": matrix(len(byte_level_vocabulary()[0]), 64)}
    for i in range(num_layers):
        tensors |= {
            f"blk.{i}.attn_norm.weight": np.ones(64, np.float32),
            f"blk.{i}.attn_q.weight": matrix(64, 64),
            f"blk.{i}.attn_k.weight": matrix(32, 64),
            f"blk.{i}.attn_v.weight": matrix(32, 64),
            f"blk.{i}.attn_output.weight": matrix(64, 64),
            f"blk.{i}.ffn_norm.weight": np.ones(64, np.float32),
            f"blk.{i}.ffn_gate.weight": matrix(96, 64),
            f"blk.{i}.ffn_up.weight": matrix(96, 64),
            f"blk.{i}.ffn_down.weight": matrix(64, 96),
        }
    return tensors | {"output_norm.weight": np.ones(64, np.float32)}


def byte_level_tokenizer_json() -> bytes:
    """A minimal tokenizer.json with the vocabulary above."""
    tokens, _, merges = byte_level_vocabulary()
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": index,
                    "content": tokens[index],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for index in range(3)
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "vocab": {token: index for index, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in merges],
            },
        }
    ).encode()


def write_llama_folder(
    folder: Path, *, num_layers: int = 2, shards: int = 1, seed: int = 0, hidden: int = 64, ffn: int = 96
) -> Path:
    """A Llama in Hugging Face's layout with random float32 weights, in one file or several."""
    rng = np.random.default_rng(seed)
    vocab = len(byte_level_vocabulary()[0])
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(num_layers):
        part = f"model.layers.{i}."
        shapes |= {
            f"{part}input_layernorm.weight": (hidden,),
            f"{part}self_attn.q_proj.weight": (hidden, hidden),
            f"{part}self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{part}self_attn.v_proj.weight": (hidden // 2, hidden),
            f"{part}self_attn.o_proj.weight": (hidden, hidden),
            f"{part}post_attention_layernorm.weight": (hidden,),
            f"{part}mlp.gate_proj.weight": (ffn, hidden),
            f"{part}mlp.up_proj.weight": (ffn, hidden),
            f"{part}mlp.down_proj.weight": (hidden, ffn),
        }
    folder.mkdir(parents=True, exist_ok=True)
    names = list(shapes)
    weight_map = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: _random(rng, shapes[name]) for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(byte_level_tokenizer_json())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"})
    )
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    return folder


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return (rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))).astype(np.float32)
