"""`manifest.json`: what an export wrote into a version folder and nobody edits.

Floor 1. The exporter fills these structs, the server reads them and guesses nothing. An unknown field is refused: a
newer exporter says so with a higher `format_version`.
"""

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sardonyx.errors import ConfigError
from sardonyx.repository.families import (
    Count,
    Diffusion,
    Embeddings,
    Encoder,
    ImageInput,
    Labels,
    LanguageModel,
    Whisper,
)

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
MAX_BYTES = 4 << 20

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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


Family = Literal["llm", "embeddings", "reranker", "classifier", "image_classifier", "whisper", "diffusion"]

_REQUIRED: dict[str, tuple[str, ...]] = {
    "llm": ("llm",),
    "embeddings": ("encoder", "embeddings"),
    "reranker": ("encoder", "labels"),
    "classifier": ("encoder", "labels"),
    "image_classifier": ("image", "labels"),
    "whisper": ("whisper",),
    "diffusion": ("diffusion",),
}
"""Fields that a family has to have."""
_GRAPHS: dict[str, tuple[str, ...]] = {
    "llm": ("decoder",),
    "embeddings": ("encoder",),
    "reranker": ("encoder",),
    "classifier": ("encoder",),
    "whisper": ("encoder", "decoder"),
    "diffusion": ("unet", "vae_decoder"),
}
"""The graphs that a family has to have; the others' is ``model``."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    format_version: int = FORMAT_VERSION
    family: Family
    precision: str
    """``fp32``, ``fp16``, ``bf16``, ``int8`` or ``int4``; what `Source.weights` says in detail."""
    activations: Literal["fp32", "int8", "int8_rows", "fp16", "bf16"] = "fp32"
    """What quantised matrix products make of their other operand: keep it, round it in blocks, or by row. fp16 and
    bf16: all that a graph for CUDA computes, logits aside."""
    target: Literal["cpu", "cuda"] = "cpu"
    graphs: dict[str, Graph]
    """By role: ``decoder``, ``encoder``, ``head``, ``aligner``, ``unet``, ``model`` ..."""
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
    diffusion: Diffusion | None = None
    """Present when family is ``diffusion``."""
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
    if manifest.diffusion is not None:
        needed = (*needed, *(encoder.graph for encoder in manifest.diffusion.encoders))
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
