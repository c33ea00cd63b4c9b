"""Writes a ``model.bin`` as CTranslate2's converters do."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KINDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def text(value: str) -> bytes:
    data = value.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def write_model(
    path: Path,
    variables: Mapping[str, npt.NDArray[Any]],
    aliases: Mapping[str, str] | None = None,
    *,
    version: int = 6,
    specification: str = "WhisperSpec",
) -> None:
    """The file with these variables, and other names for some of them."""
    parts = [struct.pack("<I", version), text(specification), struct.pack("<I", 3), struct.pack("<I", len(variables))]
    for name, values in variables.items():
        shape = struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        parts += [text(name), shape, struct.pack("<BI", KINDS[values.dtype.name], values.nbytes), values.tobytes()]
    parts.append(struct.pack("<I", len(aliases or {})))
    for alias, name in (aliases or {}).items():
        parts += [text(alias), text(name)]
    path.write_bytes(b"".join(parts))


def floats(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def variables_of(model: Any) -> dict[str, np.ndarray]:
    """The weights of `make_whisper` under CTranslate2's names, queries, keys and values in one matrix, in float16."""
    state = {name.removeprefix("model."): value.numpy() for name, value in model.state_dict().items()}
    found: dict[str, np.ndarray] = {}

    def linear(name: str, *parts: str) -> None:
        weights = [state[f"{part}.weight"] for part in parts]
        biases = [state.get(f"{part}.bias", np.zeros(len(weight))) for part, weight in zip(parts, weights, strict=True)]
        found[f"{name}/weight"], found[f"{name}/bias"] = np.concatenate(weights), np.concatenate(biases)

    def norm(name: str, part: str) -> None:
        found[f"{name}/gamma"], found[f"{name}/beta"] = state[f"{part}.weight"], state[f"{part}.bias"]

    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            found[f"encoder/{conv}/{kind}"] = state[f"encoder.{conv}.{kind}"]
    found["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    for half, num_layers, num_heads in (("encoder", 2, 4), ("decoder", 3, 2)):
        found[f"{half}/position_encodings/encodings"] = state[f"{half}.embed_positions.weight"]
        norm(f"{half}/layer_norm", f"{half}.layer_norm")
        for i in range(num_layers):
            to, of = f"{half}/layer_{i}", f"{half}.layers.{i}"
            linear(f"{to}/self_attention/linear_0", *(f"{of}.self_attn.{side}_proj" for side in "qkv"))
            linear(f"{to}/self_attention/linear_1", f"{of}.self_attn.out_proj")
            norm(f"{to}/self_attention/layer_norm", f"{of}.self_attn_layer_norm")
            if half == "decoder":
                linear(f"{to}/attention/linear_0", f"{of}.encoder_attn.q_proj")
                linear(f"{to}/attention/linear_1", f"{of}.encoder_attn.k_proj", f"{of}.encoder_attn.v_proj")
                linear(f"{to}/attention/linear_2", f"{of}.encoder_attn.out_proj")
                norm(f"{to}/attention/layer_norm", f"{of}.encoder_attn_layer_norm")
            linear(f"{to}/ffn/linear_0", f"{of}.fc1")
            linear(f"{to}/ffn/linear_1", f"{of}.fc2")
            norm(f"{to}/ffn/layer_norm", f"{of}.final_layer_norm")
        found[f"{half}/num_heads"] = np.array(num_heads, np.int16)
    return {name: each if each.dtype == np.int16 else each.astype(np.float16) for name, each in found.items()}
