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
    """Largest logit difference."""
    mean_kl: float
    """Mean Kullback-Leibler divergence of the next-token distributions, in nats."""
    top1_agreement: float
    """Share of positions whose likeliest token agrees, in [0, 1]."""
    num_positions: Count
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


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    format_version: int = FORMAT_VERSION
    family: Literal["llm", "embeddings", "whisper", "diffusion"]
    precision: str
    """``fp32``, ``int8`` or ``int4``; what `Source.weights` says in detail."""
    activations: Literal["fp32", "int8", "int8_rows"] = "fp32"
    """What quantised matrix products make of their other operand: keep it, round it in blocks, or by row."""
    target: Literal["cpu", "cuda"] = "cpu"
    graphs: dict[str, Graph]
    """By role: ``decoder``."""
    files: list[GraphFile] = []
    """Everything else in the folder: tokenizer.json, chat_template.jinja, generation_config.json ..."""
    source: Source
    llm: LanguageModel | None = None
    """Present when family is ``llm``."""
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
    if manifest.family == "llm":
        if manifest.llm is None:
            raise ConfigError("is missing although family is llm", file=file, field="llm")
        if "decoder" not in manifest.graphs:
            raise ConfigError("needs a decoder", file=file, field="graphs")
    return manifest


def all_files(manifest: Manifest) -> list[GraphFile]:
    """Every file that the manifest vouches for."""
    listed = list(manifest.files)
    for graph in manifest.graphs.values():
        listed += [graph.model, *graph.data]
    return listed


def encode(manifest: Manifest) -> bytes:
    """The file's bytes, indented for people."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
