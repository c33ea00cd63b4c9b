"""Small models for everybody's tests: real graphs, real tokenizers, milliseconds to build.

`make_language_model` writes a whole entry of a model repository: a two-layer Llama-like decoder with random weights in
the packed-step contract, a byte-level BPE tokenizer whose vocabulary is exactly the graph's, a ChatML template, a
manifest and a config. The same arguments give the same files on every machine, so texts may be compared between runs.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from sardonyx.repository import families, manifest

BOS, EOS, IM_START, IM_END, PAD = "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (EOS, IM_START, IM_END, BOS, PAD)
"""In id order: ``<|endoftext|>`` is token 0."""

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{%- if not (loop.last and continue_final_message) %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

# Merged into single tokens, so that token borders fall inside and outside of words.
_WORDS = (
    "the",
    "and",
    "you",
    "that",
    "was",
    "for",
    "are",
    "with",
    "his",
    "they",
    "this",
    "have",
    "from",
    "one",
    "had",
    "not",
)


@dataclass(frozen=True, kw_only=True)
class TinyDecoder:
    """Sizes of a decoder graph."""

    vocab_size: int = 64
    max_model_len: int = 256
    """Positions of the RoPE tables, as in exported graphs."""
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 16
    intermediate_size: int = 96
    seed: int = 0
    damped_ids: tuple[int, ...] = ()
    """Tokens whose logits are made smaller, so that they are rarely the likeliest."""

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def language_model(self) -> families.LanguageModel:
        """The manifest's part about this graph alone, without special tokens."""
        layout = families.KvLayout(
            num_layers=self.num_layers, num_kv_heads=self.num_kv_heads, head_size=self.head_size, datatype="FP32"
        )
        return families.LanguageModel(vocab_size=self.vocab_size, max_model_len=self.max_model_len, kv=layout)


def make_decoder(path: Path, sizes: TinyDecoder | None = None, *, external_data: bool = False) -> TinyDecoder:
    """Write a decoder graph in the packed-step contract to `path`, its weights to ``<path>.data`` where asked for."""
    sizes = sizes or TinyDecoder()
    model = _GraphWriter(sizes).decoder()
    if external_data:
        # ORT's shape inference cannot read external data, so the constant of Reshape stays inside.
        onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=64)
    else:
        onnx.save_model(model, path)
    return sizes


def make_language_model(
    repository_root: Path,
    name: str = "tiny",
    *,
    version: int = 1,
    sizes: TinyDecoder | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    parameters: Mapping[str, str] | None = None,
    add_bos_token: bool = False,
) -> Path:
    """Write a complete model and return its version folder.

    Greedy texts differ with the prompt and are mostly printable ASCII with now and then a stray byte. About one token
    in fifty ends the text: a test that counts tokens asks for `ignore_eos`.

    Args:
        sizes: of the graph; its `vocab_size` is replaced by the tokenizer's.
        chat_template: ``None`` writes none.
        parameters: of ``config.pbtxt``.
        add_bos_token: the tokenizer puts a BOS before what it encodes.
    """
    folder = repository_root / name / str(version)
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer(add_bos_token=add_bos_token)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size()
    texts_of_ids = {number: tokenizer.decode([number], skip_special_tokens=False) for number in range(vocab_size)}
    damped_ids = tuple(number for number, text in texts_of_ids.items() if not text.isprintable() or text == "\ufffd")
    sizes = replace(sizes or TinyDecoder(), vocab_size=vocab_size, damped_ids=damped_ids)
    make_decoder(folder / "model.onnx", sizes, external_data=True)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    tokenizer_config = {
        "bos_token": BOS,
        "eos_token": IM_END,
        "pad_token": PAD,
        "unk_token": None,
        "add_bos_token": add_bos_token,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sizes.max_model_len,
    }
    texts = {
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2),
        "generation_config.json": json.dumps({"eos_token_id": [ids[EOS], ids[IM_END]], "bos_token_id": ids[BOS]}),
    }
    if chat_template is not None:
        texts["chat_template.jinja"] = chat_template
    for file_name, text in texts.items():
        (folder / file_name).write_text(text, encoding="utf-8")
    entry = manifest.Manifest(
        family="llm",
        precision="fp32",
        graphs={"decoder": manifest.Graph(model=_file(folder, "model.onnx"), data=[_file(folder, "model.onnx.data")])},
        files=[_file(folder, file_name) for file_name in sorted([*texts, "tokenizer.json"])],
        source=manifest.Source(uri="tests/tiny_models.py", architecture="LlamaForCausalLM", licence="Apache-2.0"),
        llm=families.LanguageModel(
            vocab_size=sizes.vocab_size,
            max_model_len=sizes.max_model_len,
            kv=sizes.language_model.kv,
            bos_token_id=ids[BOS],
            eos_token_ids=[ids[EOS], ids[IM_END]],
            pad_token_id=ids[PAD],
            add_bos_token=add_bos_token,
        ),
        created="2026-01-01T00:00:00Z",
    )
    (folder / manifest.FILE_NAME).write_bytes(manifest.encode(entry))
    (folder.parent / "config.pbtxt").write_text(_config_text(name, parameters or {}), encoding="utf-8")
    return folder


def make_tokenizer(*, add_bos_token: bool = False) -> Tokenizer:
    """A byte-level BPE: special tokens, the 256 bytes, then parts of a few words with and without a leading space."""
    vocabulary: dict[str, int] = {}
    for token in [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]:
        vocabulary[token] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        for spelling in (word, "Ġ" + word):
            merged = spelling[0]
            for character in spelling[1:]:
                if merged + character not in vocabulary:
                    merges.append((merged, character))
                    vocabulary[merged + character] = len(vocabulary)
                merged += character
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if add_bos_token:
        bos_id = tokenizer.token_to_id(BOS)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    return tokenizer


def _file(folder: Path, name: str) -> manifest.GraphFile:
    data = (folder / name).read_bytes()
    return manifest.GraphFile(path=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def _config_text(name: str, parameters: Mapping[str, str]) -> str:
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', "max_batch_size: 0"]
    lines += [
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
        for key, value in parameters.items()
    ]
    return "\n".join(lines) + "\n"


class _GraphWriter:
    """Writes the nodes of one decoder. Weights are drawn in the order of the nodes."""

    def __init__(self, sizes: TinyDecoder) -> None:
        self.sizes = sizes
        self.rng = np.random.default_rng(sizes.seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, values: npt.NDArray[np.generic]) -> str:
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, name: str, *shape: int, gain: float = 1.0) -> str:
        values = self.rng.standard_normal(shape) * (gain / math.sqrt(shape[0]))
        return self.constant(name, values.astype(np.float32))

    def node(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes))
        return output

    def norm(self, source: str, name: str) -> str:
        scale = self.constant(f"{name}.weight", np.ones(self.sizes.hidden_size, np.float32))
        return self.node("SimplifiedLayerNormalization", [source, scale], name, axis=-1, epsilon=1e-5, stash_type=1)

    def attention(self, source: str, layer: int) -> str:
        """Packed (T, E) to packed (T, E): the only part that sees the padded view (B, S)."""
        sizes, prefix = self.sizes, f"layers.{layer}.attention"
        padded = []
        # Large query and key weights make attention pick tokens, so that text depends on the whole prompt.
        for part, heads, gain in (
            ("q", sizes.num_heads, 1.5),
            ("k", sizes.num_kv_heads, 1.5),
            ("v", sizes.num_kv_heads, 1.5),
        ):
            weight = self.weight(f"{prefix}.{part}.weight", sizes.hidden_size, heads * sizes.head_size, gain=gain)
            packed = self.node("MatMul", [source, weight], f"{prefix}.{part}")
            padded.append(self.node("Gather", [packed, "row_gather"], f"{prefix}.{part}.padded", axis=0))
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        # Inputs 9 to 15 (position_ids ... k_norm_weight) are not used; 16 is query_seqlens.
        inputs = [*padded, *past, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache", *[""] * 7]
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*inputs, "query_seqlens"],
                [f"{prefix}.out.padded", f"present.{layer}.key", f"present.{layer}.value"],
                name=f"{prefix}/GroupQueryAttention",
                domain="com.microsoft",
                num_heads=sizes.num_heads,
                kv_num_heads=sizes.num_kv_heads,
                do_rotary=1,
            )
        )
        flat = self.node("Reshape", [f"{prefix}.out.padded", "flat_shape"], f"{prefix}.out.flat")
        out = self.node("Gather", [flat, "row_scatter"], f"{prefix}.out", axis=0)
        weight = self.weight(f"{prefix}.o.weight", sizes.hidden_size, sizes.hidden_size)
        return self.node("MatMul", [out, weight], f"{prefix}.o")

    def mlp(self, source: str, layer: int) -> str:
        prefix, width = f"layers.{layer}.mlp", self.sizes.intermediate_size
        gate = self.node(
            "MatMul", [source, self.weight(f"{prefix}.gate.weight", self.sizes.hidden_size, width)], f"{prefix}.gate"
        )
        up = self.node(
            "MatMul", [source, self.weight(f"{prefix}.up.weight", self.sizes.hidden_size, width)], f"{prefix}.up"
        )
        sigmoid = self.node("Sigmoid", [gate], f"{prefix}.sigmoid")
        silu = self.node("Mul", [gate, sigmoid], f"{prefix}.silu")
        product = self.node("Mul", [silu, up], f"{prefix}.product")
        return self.node(
            "MatMul", [product, self.weight(f"{prefix}.down.weight", width, self.sizes.hidden_size)], f"{prefix}.down"
        )

    def decoder(self) -> onnx.ModelProto:
        sizes = self.sizes
        angles = np.outer(
            np.arange(sizes.max_model_len), 10000.0 ** (-np.arange(0, sizes.head_size, 2) / sizes.head_size)
        )
        self.constant("cos_cache", np.cos(angles).astype(np.float32))
        self.constant("sin_cache", np.sin(angles).astype(np.float32))
        self.constant("flat_shape", np.array([-1, sizes.num_heads * sizes.head_size], np.int64))
        embedding = self.rng.standard_normal((sizes.vocab_size, sizes.hidden_size)).astype(np.float32)
        hidden = self.node("Gather", [self.constant("embed.weight", embedding), "input_ids"], "embed", axis=0)
        for layer in range(sizes.num_layers):
            attended = self.attention(self.norm(hidden, f"layers.{layer}.input_norm"), layer)
            hidden = self.node("Add", [hidden, attended], f"layers.{layer}.attended")
            fed = self.mlp(self.norm(hidden, f"layers.{layer}.mlp_norm"), layer)
            hidden = self.node("Add", [hidden, fed], f"layers.{layer}.hidden")
        wanted = self.node("Gather", [self.norm(hidden, "norm"), "logits_index"], "wanted", axis=0)
        # Gain 3: the likeliest token has a probability of some 10 to 60 %, like a trained model.
        head = self.rng.standard_normal((sizes.hidden_size, sizes.vocab_size)) * (3.0 / math.sqrt(sizes.hidden_size))
        head[:, list(sizes.damped_ids)] *= 0.7
        self.node("MatMul", [wanted, self.constant("head.weight", head.astype(np.float32))], "logits")
        return self.model()

    def model(self) -> onnx.ModelProto:
        sizes = self.sizes
        cache = ["B", sizes.num_kv_heads, "C", sizes.head_size]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["T"]),
            helper.make_tensor_value_info("row_gather", TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info("row_scatter", TensorProto.INT64, ["T"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["B"]),
            helper.make_tensor_value_info("query_seqlens", TensorProto.INT32, ["B"]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
            helper.make_tensor_value_info("logits_index", TensorProto.INT64, ["N"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", sizes.vocab_size])]
        for layer in range(sizes.num_layers):
            for side in ("key", "value"):
                inputs.append(
                    helper.make_tensor_value_info(f"past_key_values.{layer}.{side}", TensorProto.FLOAT, cache)
                )
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{side}", TensorProto.FLOAT, cache))
        graph = helper.make_graph(self.nodes, "tiny_decoder", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="sardonyx tests")
