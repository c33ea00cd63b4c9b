"""`manifest.json`: what an export wrote into a version folder and nobody edits.

Floor 1. The exporter fills these structs, the server reads them and guesses nothing. An unknown field is refused: a
newer exporter says so with a higher `format_version`.
"""

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sardonyx.errors import ConfigError

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
MAX_BYTES = 4 << 20

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Count = Annotated[int, Meta(ge=1, le=1 << 31)]
TokenId = Annotated[int, Meta(ge=0, le=1 << 31)]


class GraphFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of the version folder that belongs to a graph."""

    path: str
    """File name inside the version folder."""
    sha256: str
    size_bytes: Annotated[int, Meta(ge=0, le=1 << 50)]


class Graph(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ONNX graph and its external data."""

    model: GraphFile
    data: list[GraphFile] = []


class KvLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of the in-place cache: ``past_key_values.{i}.key|value`` is ``(B, K, C, D)``, bound as present too."""

    num_layers: Count
    num_kv_heads: Count
    head_size: Count
    datatype: Literal["FP32", "FP16", "BF16", "INT8"] = "FP32"


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the weights came from."""

    uri: str
    """As given to ``sardonyx export``; local folders and files by their name only."""
    revision: str | None = None
    """The hub's commit, for ``hf:`` sources: what a branch's name meant at the time."""
    architecture: str
    """The checkpoint's own word: ``LlamaForCausalLM``."""
    licence: str | None = None
    """SPDX identifier or the source's own words."""
    sha256: str | None = None
    """Of the downloaded archive or the GGUF file."""
    weights: str = ""
    """How the weights were stored and what became of them: ``Q4_1 → int4 block 32 ...``."""


class Parity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What verification measured, by running the exported graph through the server's own session."""

    reference: str
    """What it was compared with."""
    max_abs_error: float
    """Largest difference of a number: a logit, an element of an embedding, a score."""
    mean_kl: float | None = None
    """Language models: mean Kullback-Leibler divergence of the next-token distributions, in nats."""
    top1_agreement: float | None = None
    """Language models: share of positions whose likeliest token agrees, in [0, 1]. Classifiers: share of items whose
    likeliest label agrees."""
    min_cosine: float | None = None
    """Embeddings: the smallest cosine between an item's embedding and the source's."""
    num_positions: Count
    """Numbers of what was compared: tokens of language models, items of all others."""
    tolerance: str
    """The rule that publishing held it to."""


class LanguageModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the llm family adds."""

    vocab_size: Count
    """Width of the logits; the tokenizer may know fewer."""
    max_model_len: Count
    """Positions that the graph was built for."""
    kv: KvLayout
    bos_token_id: TokenId | None = None
    eos_token_ids: list[TokenId] = []
    """Tokens that end a completion."""
    pad_token_id: TokenId | None = None
    add_bos_token: bool = False
    """The tokenizer puts a BOS before a plain prompt."""


class Encoder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the families embeddings, reranker and classifier add: a graph that sees each text once and as a whole.

    Its graph ``encoder`` has one of two layouts (T packed tokens of all rows, B rows, S tokens of the longest row). An
    input that a graph does not declare is not given.

    packed: input_ids (T) int64, token_type_ids (T) int64, position_ids (T) int64 from 0 in each row, row_gather (B, S)
    int64, row_scatter (T) int64, seqlens (B) int32, num_prompt_tokens (B) int32 -> `output` (B, width) float32.

    padded: input_ids, attention_mask, token_type_ids, position_ids, each (B, S) int64, rows filled up on the right ->
    `output`; (B, width) float32, or (B, S, hidden size) where there is a graph ``head``. That one takes
    token_embeddings (B, S, hidden size) float32, seqlens (B) int32 and num_prompt_tokens (B) int32, and gives
    embeddings (B, width) float32.
    """

    layout: Literal["packed", "padded"]
    output: str
    """Of the graph ``encoder``."""
    width: Count
    """Of a row's result: embedding size, or number of labels."""
    vocab_size: Count
    max_model_len: Count
    """Tokens of a row at most, special ones among them."""
    pad_token_id: TokenId = 0
    """Fills rows of the padded layout."""


class Embeddings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the family embeddings adds."""

    pooling: str
    """How token vectors become one, in sentence-transformers' words: ``mean``, ``cls+max``."""
    is_normalized: bool
    """Embeddings leave the graph with length 1."""
    similarity: Literal["cosine", "dot", "euclidean", "manhattan"] = "cosine"
    """What the model was trained to be compared with."""
    matryoshka_dims: list[Count] = []
    """Sizes to which an embedding may be cut, ascending; none: the model was not trained for it."""
    prompts: dict[str, str] = {}
    """Texts to put in front of an input, by name: ``query`` -> ``query: ``."""
    default_prompt: str | None = None
    """Name of the prompt for requests that name none."""
    pools_prompt: bool = True
    """Tokens of the prompt take part in pooling."""


class Labels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the families reranker, classifier and image_classifier add: what the numbers of a result mean."""

    names: list[str]
    """By index. A reranker has one."""
    activation: Literal["none", "sigmoid", "softmax"]
    """What makes scores of the graph's output; softmax where exactly one label holds."""


class ImageInput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the family image_classifier adds: how a picture becomes the graph's input.

    In this order: decoded as RGB, resized, by way of JPEG where the model was trained so, cropped in the middle,
    channels swapped, ``(x * scale - mean) / std``.
    """

    name: str
    """Of the graph's input."""
    output: str
    """Of the graph's output, (B, number of labels)."""
    layout: Literal["NHWC", "NCHW"]
    resize: Annotated[list[Count], Meta(min_length=1, max_length=2)]
    """Height and width; one number: of the shorter side, the picture keeping its shape."""
    crop: Annotated[list[Count], Meta(min_length=2, max_length=2)]
    """Height and width of the middle that is kept."""
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    is_bgr: bool = False
    scale: float = 1.0
    mean: Annotated[list[float], Meta(min_length=3, max_length=3)]
    """In the graph's order of channels."""
    std: Annotated[list[float], Meta(min_length=3, max_length=3)] = msgspec.field(default_factory=lambda: [1.0] * 3)
    has_jpeg_round_trip: bool = False


class Whisper(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the family whisper adds: three graphs over one window of sound, and the tokens that steer the decoder.

    B windows or rows, M mel bands, F frames, P = F / 2 positions, T packed tokens, A alignment heads; H heads of size D
    are those of `kv`.

    encoder: mel (B, M, F) float32 -> for each decoder layer i cross.{i}.key (B, H, D, P), cross.{i}.value (B, H, P, D).

    decoder: the packed-step contract with position_ids (T), and cross.{i}.key, cross.{i}.value of the row's window.

    aligner: input_ids (1, S) int64, cross.{i}.key, cross.{i}.value with B = 1 -> attention (A, S, P) float32, the
    scaled products before the softmax of the heads in `alignment_heads`; logprobs (S - 1) float32, of each token given
    those before it, among the tokens below `end_id`.
    """

    vocab_size: Count
    """Width of the logits; the tokenizer may know fewer: timestamps need no names."""
    max_model_len: Count
    """Tokens of a window, prompt and result together."""
    num_mels: Count
    num_frames: Count
    """Of a window, 100 a second."""
    kv: KvLayout
    """Of the decoder's own cache."""
    start_id: TokenId
    """``<|startoftranscript|>``."""
    end_id: TokenId
    """``<|endoftext|>``: every token below it is text."""
    previous_id: TokenId
    """``<|startofprev|>``, in front of the text before the window."""
    no_speech_id: TokenId
    """``<|nospeech|>``, in older files ``<|nocaptions|>``."""
    no_timestamps_id: TokenId
    timestamp_begin_id: TokenId
    """``<|0.00|>``; those after it are 20 ms apart."""
    transcribe_id: TokenId | None = None
    """``None`` in English-only models, which take neither a language nor a task."""
    translate_id: TokenId | None = None
    language_ids: dict[str, TokenId] = {}
    """``en`` -> ``<|en|>``; empty in English-only models."""
    suppress_ids: list[TokenId] = []
    """Never a result: signs that are no speech, and all special tokens but `end_id` and timestamps."""
    begin_suppress_ids: list[TokenId] = []
    """Never the first of a result: a lone space, and `end_id`."""
    alignment_heads: list[Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=2, max_length=2)]] = []
    """Layer and head of the cross-attention that follows the sound; none: there is no graph ``aligner``."""


Family = Literal["llm", "embeddings", "reranker", "classifier", "image_classifier", "whisper", "diffusion"]

_REQUIRED: dict[str, tuple[str, ...]] = {
    "llm": ("llm",),
    "embeddings": ("encoder", "embeddings"),
    "reranker": ("encoder", "labels"),
    "classifier": ("encoder", "labels"),
    "image_classifier": ("image", "labels"),
    "whisper": ("whisper",),
}
"""Fields that a family has to have."""
_GRAPHS: dict[str, tuple[str, ...]] = {
    "llm": ("decoder",),
    "embeddings": ("encoder",),
    "reranker": ("encoder",),
    "classifier": ("encoder",),
    "whisper": ("encoder", "decoder"),
}
"""The graphs that a family has to have; the others' is ``model``."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    format_version: int = FORMAT_VERSION
    family: Family
    precision: str
    """``fp32``, ``int8`` or ``int4``; what `Source.weights` says in detail."""
    activations: Literal["fp32", "int8", "int8_rows"] = "fp32"
    """What quantised matrix products make of their other operand: keep it, round it in blocks, or by row."""
    target: Literal["cpu", "cuda"] = "cpu"
    graphs: dict[str, Graph]
    """By role: ``decoder``, ``encoder``, ``head``, ``aligner``, ``model``."""
    files: list[GraphFile] = []
    """Everything else in the folder: tokenizer.json, chat_template.jinja, generation_config.json ..."""
    source: Source
    llm: LanguageModel | None = None
    """Present when family is ``llm``."""
    encoder: Encoder | None = None
    """Present when family is ``embeddings``, ``reranker`` or ``classifier``."""
    embeddings: Embeddings | None = None
    """Present when family is ``embeddings``."""
    labels: Labels | None = None
    """Present when family is ``reranker``, ``classifier`` or ``image_classifier``."""
    image: ImageInput | None = None
    """Present when family is ``image_classifier``."""
    whisper: Whisper | None = None
    """Present when family is ``whisper``."""
    parity: list[Parity] = []
    tools: dict[str, str] = {}
    """Package versions that wrote this."""
    created: str = ""
    """RFC 3339, UTC."""


class _Format(msgspec.Struct, frozen=True):
    """All that has to stay the same in every format."""

    format_version: int = FORMAT_VERSION


def parse(data: bytes, *, file: str = FILE_NAME) -> Manifest:
    """Decode and check a manifest.

    Raises:
        ConfigError: not JSON, a field of the wrong type, an unknown field or format, a path that leaves the folder.
    """
    if len(data) > MAX_BYTES:
        raise ConfigError(f"is {len(data):,} bytes; a manifest has at most {MAX_BYTES:,}", file=file)
    try:
        # First, because another format would fail as an unknown field.
        version = msgspec.json.decode(data, type=_Format).format_version
        if version != FORMAT_VERSION:
            raise ConfigError(f"is {version}; this server reads {FORMAT_VERSION}", file=file, field="format_version")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason, _, path = str(error).partition(" - at `$")
        raise ConfigError(reason, file=file, field=path.strip("`.") or None) from error
    listed: dict[str, GraphFile] = {}
    for entry in all_files(manifest):
        if not _FILE_NAME.fullmatch(entry.path):
            raise ConfigError(f"{entry.path!r} is not a plain file name", file=file, field="path")
        if listed.setdefault(entry.path, entry) != entry:
            raise ConfigError(f"{entry.path!r} is listed twice and differs", file=file, field="path")
        if not _SHA256.fullmatch(entry.sha256):
            raise ConfigError(f"of {entry.path} is not 64 hexadecimal digits", file=file, field="sha256")
    _check_family(manifest, file)
    return manifest


def _check_family(manifest: Manifest, file: str) -> None:
    """What a family needs is there, and its parts fit each other."""
    if manifest.family not in _REQUIRED:
        return
    for field in _REQUIRED[manifest.family]:
        if getattr(manifest, field) is None:
            raise ConfigError(f"is missing although family is {manifest.family}", file=file, field=field)
    needed = _GRAPHS.get(manifest.family, ("model",))
    if manifest.whisper is not None and manifest.whisper.alignment_heads:
        needed = (*needed, "aligner")
    for role in needed:
        if role not in manifest.graphs:
            raise ConfigError(f"needs {'an' if role[0] in 'ae' else 'a'} {role}", file=file, field="graphs")
    labels, encoder = manifest.labels, manifest.encoder
    if labels is not None and not labels.names:
        raise ConfigError("is empty", file=file, field="labels.names")
    if labels is not None and encoder is not None and len(labels.names) != encoder.width:
        raise ConfigError(
            f"has {len(labels.names)} names; the encoder gives {encoder.width} numbers", file=file, field="labels.names"
        )
    if manifest.family == "reranker" and labels is not None and len(labels.names) != 1:
        raise ConfigError("a reranker has exactly one", file=file, field="labels.names")
    if manifest.whisper is not None:
        _check_whisper(manifest.whisper, file)


def _check_whisper(whisper: Whisper, file: str) -> None:
    """Its numbers fit each other: none leads outside of a tensor."""
    for name in (field.name for field in msgspec.structs.fields(whisper)):
        if not name.endswith(("_id", "_ids")):
            continue
        value = getattr(whisper, name)
        token_ids = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if any(token_id is not None and token_id >= whisper.vocab_size for token_id in token_ids):
            raise ConfigError(f"is not below vocab_size, {whisper.vocab_size}", file=file, field=f"whisper.{name}")
    if whisper.end_id >= whisper.timestamp_begin_id:
        raise ConfigError("is not below timestamp_begin_id", file=file, field="whisper.end_id")
    if whisper.num_frames % 2:
        raise ConfigError("is odd; the encoder makes one position of two frames", file=file, field="whisper.num_frames")
    for layer, head in whisper.alignment_heads:
        if layer >= whisper.kv.num_layers or head >= whisper.kv.num_kv_heads:
            raise ConfigError(f"there is no head {head} in a layer {layer}", file=file, field="whisper.alignment_heads")


def all_files(manifest: Manifest) -> list[GraphFile]:
    """Every file that the manifest vouches for."""
    listed = list(manifest.files)
    for graph in manifest.graphs.values():
        listed += [graph.model, *graph.data]
    return listed


def encode(manifest: Manifest) -> bytes:
    """The file's bytes, indented for people."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
