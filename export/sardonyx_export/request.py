"""What somebody asked to have exported, and whether the repository has it already.

Kept apart from the pipeline so that the answer "it is there" needs neither ONNX nor ONNX Runtime to be imported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from sardonyx.errors import ConfigError, ModelNotFound
from sardonyx.repository.layout import ModelEntry, Repository, check_files, read_manifest
from sardonyx.repository.manifest import Manifest
from sardonyx_export.encoder_spec import Pooling
from sardonyx_export.kv_ranges import KvCacheDtype
from sardonyx_export.plan import FAMILY_OF_TASK, Activations, Precision, Target, Task
from sardonyx_export.sources.resolve import parse_source, source_uri


class Lora(msgspec.Struct, frozen=True, kw_only=True):
    """A change of weights that is merged into a diffusion model."""

    path: Path
    """Of its safetensors file."""
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.path.name} by {self.scale:g}"


def lora_words(loras: Sequence[Lora]) -> str:
    """What the manifest says of them at the end of `Source.weights`; nothing where there are none."""
    return f"; LoRA merged: {', '.join(map(str, loras))}" if loras else ""


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One export."""

    source: str
    """As on the command line; see `sources.resolve`."""
    repository: Path
    name: str | None = None
    """Of the model; ``None``: made from the source's."""
    task: Task | Literal["auto"] = "auto"
    """What the model is for; ``auto``: as the source says."""
    precision: Precision | Literal["auto"] = "auto"
    activations: Activations | None = None
    """``None``: what suits the precision and the source."""
    max_model_len: int | None = None
    """Positions that the graph is built for; ``None``: the model's own."""
    target: Target = "cpu"
    kv_cache_dtype: KvCacheDtype | None = None
    """Of a language model's KV cache; ``None``: that of its activations."""
    pooling: Pooling | None = None
    """Of a bare encoder's tokens; ``None``: as the source says, else mean."""
    file: str | None = None
    """A ready ONNX graph inside the source to take; ``None``: the only one, where there are no weights."""
    tokenizer: Path | None = None
    """A tokenizer.json for an ONNX graph that comes without."""
    loras: tuple[Lora, ...] = ()
    """For diffusion models."""
    sha256: str | None = None
    """What the archive or GGUF file must hash to."""
    adds_version: bool = False
    """Where the model is there already, add its next version; else that is refused."""


class ExportResult(msgspec.Struct, frozen=True, kw_only=True):
    """Where an export is."""

    name: str
    version: int
    path: Path
    """The version folder."""
    manifest: Manifest


def find_existing(request: ExportRequest) -> ExportResult | None:
    """The version that this request would make again, if the repository has it whole.

    A local source is known by its name, so another folder of the same name counts as the same.

    Raises:
        ConfigError: the source is none, or the model's config is wrong.
    """
    uri = source_uri(parse_source(request.source))
    if not request.repository.is_dir():
        return None
    repository = Repository(request.repository)
    if request.name is None:
        entries = repository.entries()
    else:
        try:
            entries = [repository.entry(request.name)]
        except ModelNotFound:
            return None
    for entry in entries:
        for version in reversed(entry.versions):
            manifest = _usable_manifest(entry, version)
            if manifest is not None and _is_wanted(manifest, request, uri):
                return ExportResult(
                    name=entry.name, version=version, path=entry.version_path(version), manifest=manifest
                )
    return None


def has_usable_version(repository: Repository, name: str) -> bool:
    """The model is there and can be served. False where all that is there is broken: an export mends that.

    A folder without a manifest is somebody's own model, and counts as usable.
    """
    try:
        entry = repository.entry(name)
        return any(
            read_manifest(entry.version_path(version)) is None or _usable_manifest(entry, version) is not None
            for version in entry.versions
        )
    except ModelNotFound:
        return False
    except ConfigError:
        return True


def _usable_manifest(entry: ModelEntry, version: int) -> Manifest | None:
    """``None`` as well where files are missing or cut short: such a version is worth exporting again."""
    try:
        manifest = read_manifest(entry.version_path(version))
        if manifest is not None:
            check_files(entry.version_path(version), manifest, hashes=False)
    except ConfigError:
        return None
    return manifest


def _is_wanted(manifest: Manifest, request: ExportRequest, uri: str) -> bool:
    limited = manifest.llm or manifest.encoder or manifest.whisper
    built_len = limited.max_model_len if limited else None
    pooling = manifest.embeddings.pooling if manifest.embeddings else None
    cache = manifest.llm.kv.datatype.lower() if manifest.llm else None
    return (
        manifest.source.uri == uri
        and request.task in ("auto", *(task for task, family in FAMILY_OF_TASK.items() if family == manifest.family))
        and request.pooling in (None, pooling)
        and manifest.target == request.target
        and request.precision in ("auto", manifest.precision)
        and request.activations in (None, manifest.activations)
        and request.kv_cache_dtype in (None, cache)
        and request.max_model_len in (None, built_len)
        and f"; LoRA{manifest.source.weights.partition('; LoRA')[2]}" == (lora_words(request.loras) or "; LoRA")
        and (request.sha256 is None or request.sha256.lower() == manifest.source.sha256)
    )
