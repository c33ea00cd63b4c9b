"""The decoder of `tests.tiny_models` in the contract of steps over blocks: the same weights, so the same texts.

Only attention is computed in 16 bits, as PagedAttention has it; everything around it is as in the graph over slots.
"""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper
from tests.tiny_models import TinyDecoder, _GraphWriter, make_language_model

from sardonyx.repository import families, manifest
from sardonyx_export.builders.feed import build_feed
from sardonyx_export.builders.sampler import build_sampler

BLOCK_SIZE = 16


KV_SCALES = {"INT8": 8 / 127, "FP8": 16 / 448}
"""Of quantised caches, whose keys and values stay below 8 in the tiny model."""
_ELEMENT_TYPES = {"FP16": TensorProto.FLOAT16, "INT8": TensorProto.INT8, "FP8": TensorProto.FLOAT8E4M3FN}


def paged_language_model(sizes: TinyDecoder, cache: str = "FP16") -> families.LanguageModel:
    """The manifest's part."""
    model = sizes.language_model
    layout = families.KvLayout(
        num_layers=model.kv.num_layers,
        num_kv_heads=model.kv.num_kv_heads,
        head_size=model.kv.head_size,
        datatype=cache,
        block_size=BLOCK_SIZE,
    )
    return families.LanguageModel(vocab_size=model.vocab_size, max_model_len=model.max_model_len, kv=layout)


def make_paged_model(folder: Path, sizes: TinyDecoder, cache: str = "FP16") -> dict[str, Path]:
    """Write ``decoder.onnx``, ``sampler.onnx`` and ``feed.onnx``, and return their paths by role."""
    onnx.save_model(_PagedWriter(sizes, cache).decoder(), folder / "decoder.onnx")
    return {
        "decoder": folder / "decoder.onnx",
        "sampler": build_sampler(sizes.vocab_size, folder)[0],
        "feed": build_feed(folder)[0],
    }


class _PagedWriter(_GraphWriter):
    def __init__(self, sizes: TinyDecoder, cache: str) -> None:
        super().__init__(sizes)
        self.cache = cache

    def attention(self, source: str, layer: int) -> str:
        sizes, prefix = self.sizes, f"layers.{layer}.attention"
        parts = []
        for part, heads in (("q", sizes.num_heads), ("k", sizes.num_kv_heads), ("v", sizes.num_kv_heads)):
            weight = self.weight(f"{prefix}.{part}.weight", sizes.hidden_size, heads * sizes.head_size, gain=1.5)
            parts.append(self.node("MatMul", [source, weight], f"{prefix}.{part}"))
        packed = self.node("Concat", parts, f"{prefix}.qkv", axis=1)
        half = self.node("Cast", [packed], f"{prefix}.qkv.half", to=TensorProto.FLOAT16)
        if not layer:
            self.node("Cast", ["cos_cache"], "cos_half", to=TensorProto.FLOAT16)
            self.node("Cast", ["sin_cache"], "sin_half", to=TensorProto.FLOAT16)
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        lengths = ["cumulative_sequence_length", "past_seqlens", "block_table"]
        scales, kinds = ["", ""], {}
        if self.cache in KV_SCALES:
            scales, kinds = ["kv.scale"] * 2, {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}
            if not layer:
                scale = np.array([KV_SCALES[self.cache]], np.float32)
                self.initializers.append(onnx.numpy_helper.from_array(scale, "kv.scale"))
        inputs = [half, "", "", *past, *lengths, "cos_half", "sin_half", "slot_mapping", *[""] * 3, *scales]
        self.nodes.append(
            helper.make_node(
                "PagedAttention",
                [*inputs, "attention_metadata"],
                [f"{prefix}.out.half", f"present.{layer}.key", f"present.{layer}.value"],
                domain="com.microsoft",
                num_heads=sizes.num_heads,
                kv_num_heads=sizes.num_kv_heads,
                do_rotary=1,
                **kinds,
            )
        )
        out = self.node("Cast", [f"{prefix}.out.half"], f"{prefix}.out", to=TensorProto.FLOAT)
        weight = self.weight(f"{prefix}.o.weight", sizes.hidden_size, sizes.hidden_size)
        return self.node("MatMul", [out, weight], f"{prefix}.o")

    def model(self) -> onnx.ModelProto:
        sizes = self.sizes
        cache = ["blocks", BLOCK_SIZE, sizes.num_kv_heads, sizes.head_size]
        inputs = [
            _port("input_ids", TensorProto.INT64, "T"),
            _port("logits_index", TensorProto.INT64, "N"),
            _port("block_table", TensorProto.INT32, "B", "M"),
            _port("cumulative_sequence_length", TensorProto.INT32, "B + 1"),
            _port("past_seqlens", TensorProto.INT32, "B"),
            _port("slot_mapping", TensorProto.INT32, "T"),
            _port("attention_metadata", TensorProto.INT32, 3),
        ]
        outputs = [_port("logits", TensorProto.FLOAT, "N", sizes.vocab_size)]
        for layer in range(sizes.num_layers):
            for side in ("key", "value"):
                inputs.append(_port(f"past_key_values.{layer}.{side}", _ELEMENT_TYPES[self.cache], *cache))
                outputs.append(_port(f"present.{layer}.{side}", _ELEMENT_TYPES[self.cache], *cache))
        return _model(self.nodes, inputs, outputs, self.initializers)


def make_paged_repository(
    root: Path, *, parameters: dict[str, str] | None = None, instance_group: str = "", cache: str = "FP16"
) -> Path:
    """A model ``tiny`` of `tests.tiny_models` as if it had been exported for cards. Returns its version folder."""
    folder = make_language_model(root, parameters=parameters)
    old = manifest.parse((folder / manifest.FILE_NAME).read_bytes())
    assert old.llm is not None
    for file in (old.graphs["decoder"].model, *old.graphs["decoder"].data):
        (folder / file.path).unlink()
    sizes = TinyDecoder(vocab_size=old.llm.vocab_size)
    paths = make_paged_model(folder, sizes, cache)
    graphs = {
        role: manifest.Graph(model=manifest.GraphFile(path=path.name, sha256="0" * 64, size_bytes=path.stat().st_size))
        for role, path in paths.items()
    }
    llm = msgspec.structs.replace(old.llm, kv=paged_language_model(sizes, cache).kv)
    new = msgspec.structs.replace(old, target="cuda", precision="fp16", activations="fp16", graphs=graphs, llm=llm)
    (folder / manifest.FILE_NAME).write_bytes(manifest.encode(new))
    with (root / "tiny" / "config.pbtxt").open("a") as config:
        config.write(instance_group)
    return folder


def poison(path: Path, token_id: int) -> Path:
    """A copy of a decoder in which one token's embedding is not a number."""
    model = onnx.load(path)
    for initializer in model.graph.initializer:
        if initializer.name == "embed.weight":
            values = onnx.numpy_helper.to_array(initializer).copy()
            values[token_id] = np.nan
            initializer.CopyFrom(onnx.numpy_helper.from_array(values, initializer.name))
    target = path.with_name("poisoned") / path.name
    target.parent.mkdir(exist_ok=True)
    onnx.save_model(model, target)
    return target


def tiny_sizes(**changes: int) -> TinyDecoder:
    return replace(TinyDecoder(vocab_size=64, max_model_len=96), **changes)


def _port(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def _model(nodes, inputs, outputs, initializers) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "tiny_paged", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="sardonyx tests")
