"""Small encoder models and image classifiers for everybody's tests: real graphs and tokenizers, milliseconds to build.

`make_encoder_model` writes a whole entry of a model repository. The graphs say something that a test can expect:

- embeddings: the mean of its tokens' random vectors, of length 1, so texts that share words lie near each other;
- reranker: the more words a text shares with the query, the higher its score;
- classifier: a text that holds a label's name as a word scores 0.998 for that label, others 0.018;
- image_classifier: the mean red, green and blue, as softmax.

The same arguments give the same files on every machine.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from sardonyx.repository import families, manifest

Family = Literal["embeddings", "reranker", "classifier", "image_classifier"]
Layout = Literal["packed", "padded"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LABELS = ("insult", "threat", "praise")
"""Of a classifier."""
COLOURS = ("red", "green", "blue")
"""Labels of an image classifier."""
IMAGE_SIZE = 8
"""Height and width of what the image classifier's graph takes."""
WORDS = (
    *("the", "a", "of", "is", "and", "what", "where", "query", "passage", "document"),
    *("paris", "berlin", "france", "germany", "capital", "cat", "dog", "sun", "moon", "tree", "house", "blue"),
    *LABELS,
)
PROMPTS = {"query": "query: ", "document": "passage: "}
_HIDDEN_SIZE = 16


def make_encoder_model(
    repository_root: Path,
    name: str = "tiny",
    *,
    family: Family = "embeddings",
    version: int = 1,
    layout: Layout = "packed",
    max_model_len: int = 64,
    size: int = 16,
    pools_prompt: bool = True,
    labels: Sequence[str] = LABELS,
    activation: Literal["none", "sigmoid", "softmax"] | None = None,
    tokenizer: Tokenizer | None = None,
    embeddings: Mapping[str, object] | None = None,
    parameters: Mapping[str, str] | None = None,
    config: str = "",
) -> Path:
    """Write a complete model and return its version folder.

    Args:
        layout: of the graph, see `families.Encoder`.
        size: of an embedding.
        labels: of a classifier; other families have their own.
        activation: ``None``: softmax for pictures, else sigmoid.
        tokenizer: in place of `make_tokenizer`'s.
        embeddings: fields of `families.Embeddings` to replace.
        parameters: of ``config.pbtxt``, say ``moderation.insult``.
        config: further lines of it.
    """
    folder = repository_root / name / str(version)
    folder.mkdir(parents=True)
    if family == "image_classifier":
        written = _write_image_classifier(folder)
    else:
        labels = labels if family == "classifier" else ("relevance",)
        tokenizer = tokenizer or make_tokenizer()
        tokenizer.save(str(folder / "tokenizer.json"))
        width = size if family == "embeddings" else len(labels)
        model = _encoder_graph(family, layout, tokenizer, max_model_len, labels, size, pools_prompt)
        onnx.save_model(model, folder / "model.onnx")
        written = {
            "graphs": {"encoder": manifest.Graph(model=_file(folder, "model.onnx"))},
            "files": [_file(folder, "tokenizer.json")],
            "encoder": families.Encoder(
                layout=layout,
                output="result",
                width=width,
                vocab_size=tokenizer.get_vocab_size(),
                max_model_len=max_model_len,
                pad_token_id=0,
            ),
        }
        if family == "embeddings":
            fields: dict[str, object] = {
                "pooling": "mean",
                "is_normalized": True,
                "matryoshka_dims": [size // 4, size // 2],
                "prompts": PROMPTS,
                "pools_prompt": pools_prompt,
            }
            written["embeddings"] = families.Embeddings(**(fields | dict(embeddings or {})))  # type: ignore[arg-type]
        else:
            written["labels"] = families.Labels(names=list(labels), activation=activation or "sigmoid")
    entry = manifest.Manifest(
        family=family,
        precision="fp32",
        source=manifest.Source(uri="tests/tiny_encoders.py", architecture="BertModel", licence="Apache-2.0"),
        created="2026-01-01T00:00:00Z",
        **written,  # type: ignore[arg-type]
    )
    (folder / manifest.FILE_NAME).write_bytes(manifest.encode(entry))
    (folder.parent / "config.pbtxt").write_text(_config_text(name, parameters or {}, config), encoding="utf-8")
    return folder


def make_tokenizer() -> Tokenizer:
    """A lower-casing WordPiece as BERT's: special tokens, letters, marks and `WORDS`. Pairs have types 0 and 1."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [*SPECIAL_TOKENS, *characters, *(f"##{each}" for each in characters), *".,:;!?'-", *WORDS]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


_INPUTS = {
    "packed": "int64[T] input_ids, int64[T] token_type_ids, int64[B,S] row_gather, int64[T] row_scatter, "
    "int32[B] seqlens",
    "padded": "int64[B,S] input_ids, int64[B,S] attention_mask, int64[B,S] token_type_ids",
}
_ROWS = {
    # Rows of token numbers and types (B, S), and which places hold a token.
    "packed": """
        ids = Gather<axis=0>(input_ids, row_gather)
        types = Gather<axis=0>(token_type_ids, row_gather)
        shape = Shape(row_gather)
        length = Gather<axis=0>(shape, one)
        places = Range(zero, length, one)
        lengths64 = Cast<to=7>(seqlens)
        lengths = Unsqueeze(lengths64, last)
        inside = Less(places, lengths)
    """,
    "padded": """
        ids = Identity(input_ids)
        types = Identity(token_type_ids)
        inside = Cast<to=9>(attention_mask)
    """,
}
_WITHOUT_PROMPT = """
        prompts64 = Cast<to=7>(num_prompt_tokens)
        prompts = Unsqueeze(prompts64, last)
        behind = GreaterOrEqual(places, prompts)
        pooled = And(inside, behind)
"""
_BODIES = {
    "embeddings": """
        flags = Cast<to=1>(pooled)
        mask = Unsqueeze(flags, last)
        vectors = Gather<axis=0>(table, ids)
        kept = Mul(vectors, mask)
        sum = ReduceSum<keepdims=0>(kept, middle)
        count = ReduceSum<keepdims=0>(mask, middle)
        some = Max(count, tiny)
        mean = Div(sum, some)
        length2 = ReduceL2<keepdims=1>(mean, last)
        long = Max(length2, tiny)
        result = Div(mean, long)
    """,
    # 8 times the cosine between the sums of both sides' vectors, less 4. Special tokens have no vector.
    "reranker": """
        is_query = Equal(types, zero)
        is_text = Equal(types, one)
        query_places = And(inside, is_query)
        text_places = And(inside, is_text)
        query_flags = Cast<to=1>(query_places)
        text_flags = Cast<to=1>(text_places)
        query_mask = Unsqueeze(query_flags, last)
        text_mask = Unsqueeze(text_flags, last)
        vectors = Gather<axis=0>(table, ids)
        query_kept = Mul(vectors, query_mask)
        text_kept = Mul(vectors, text_mask)
        query = ReduceSum<keepdims=0>(query_kept, middle)
        text = ReduceSum<keepdims=0>(text_kept, middle)
        products = Mul(query, text)
        product = ReduceSum<keepdims=1>(products, last)
        query_length = ReduceL2<keepdims=1>(query, last)
        text_length = ReduceL2<keepdims=1>(text, last)
        lengths_product = Mul(query_length, text_length)
        long = Max(lengths_product, tiny)
        cosine = Div(product, long)
        scaled = Mul(cosine, eight)
        result = Sub(scaled, four)
    """,
    # The highest of its tokens' numbers.
    "classifier": """
        mask = Unsqueeze(inside, last)
        vectors = Gather<axis=0>(table, ids)
        kept = Where(mask, vectors, least)
        result = ReduceMax<keepdims=0>(kept, middle)
    """,
}


def _encoder_graph(
    family: str,
    layout: Layout,
    tokenizer: Tokenizer,
    max_model_len: int,
    labels: Sequence[str],
    size: int,
    pools_prompt: bool,
) -> onnx.ModelProto:
    inputs, rows = _INPUTS[layout], _ROWS[layout]
    if family == "embeddings" and not pools_prompt:
        inputs += ", int32[B] num_prompt_tokens"
        rows += _WITHOUT_PROMPT
    else:
        rows += "\n        pooled = Identity(inside)\n"
    width = {"embeddings": size, "reranker": 1}.get(family, len(labels))
    text = f"""
    <ir_version: 10, opset_import: ["" : 21], producer_name: "sardonyx tests">
    tiny ({inputs}) => (float[B,{width}] result) {{ {rows} {_BODIES[family]} }}
    """
    model = parser.parse_model(text)
    constants: dict[str, npt.NDArray[np.generic]] = {
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "last": np.array([-1], np.int64),
        "middle": np.array([1], np.int64),
        "tiny": np.array(1e-9, np.float32),
        "eight": np.array(8, np.float32),
        "four": np.array(4, np.float32),
        "least": np.array(-1e9, np.float32),
        "table": _table(family, tokenizer, labels, size),
    }
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in constants.items() if name in used
    )
    return model


def _table(family: str, tokenizer: Tokenizer, labels: Sequence[str], size: int) -> npt.NDArray[np.float32]:
    vocab = tokenizer.get_vocab()
    rows = max(vocab.values()) + 1
    if family == "classifier":
        table = np.full((rows, len(labels)), -4.0, np.float32)
        for column, label in enumerate(labels):
            if label in vocab:
                table[vocab[label], column] = 6.0
        return table
    table = np.random.default_rng(0).standard_normal((rows, size if family == "embeddings" else _HIDDEN_SIZE))
    if family == "reranker":
        table[[vocab[token] for token in SPECIAL_TOKENS if token in vocab]] = 0
    return table.astype(np.float32)


def _write_image_classifier(folder: Path) -> dict[str, object]:
    model = parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 21], producer_name: "sardonyx tests">
    tiny (float[B,{IMAGE_SIZE},{IMAGE_SIZE},3] image) => (float[B,3] result) {{
        mean = ReduceMean<keepdims=0>(image, axes)
        result = Mul(mean, eight)
    }}
    """)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.int64), "axes"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(8, np.float32), "eight"))
    onnx.save_model(model, folder / "model.onnx")
    return {
        "graphs": {"model": manifest.Graph(model=_file(folder, "model.onnx"))},
        "labels": families.Labels(names=list(COLOURS), activation="softmax"),
        "image": families.ImageInput(
            name="image",
            output="result",
            layout="NHWC",
            resize=[IMAGE_SIZE],
            crop=[IMAGE_SIZE, IMAGE_SIZE],
            scale=1 / 255,
            mean=[0.0, 0.0, 0.0],
        ),
    }


def _file(folder: Path, name: str) -> manifest.GraphFile:
    data = (folder / name).read_bytes()
    return manifest.GraphFile(path=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def _config_text(name: str, parameters: Mapping[str, str], more: str) -> str:
    lines = [f'name: "{name}"', 'backend: "onnxruntime"']
    lines += [
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
        for key, value in parameters.items()
    ]
    return "\n".join([*lines, more]) + "\n"
