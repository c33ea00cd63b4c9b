"""An export from source to published version: fetch, plan, build, verify, publish.

Everything is written into a staging folder of the repository and appears there by one rename, or not at all.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from sardonyx.errors import ConfigError, ModelNotFound
from sardonyx.repository.layout import ModelEntry, Repository, check_files, read_manifest, validate_model_name
from sardonyx.repository.manifest import KvLayout, LanguageModel, Manifest, Parity
from sardonyx.runtime.session import configure_threads
from sardonyx_export.builders.decoder import BuildOptions, BuildReport, build_decoder
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.errors import ExportError
from sardonyx_export.families.llm import read_spec
from sardonyx_export.plan import Plan, Precision, make_plan
from sardonyx_export.sources.resolve import open_source, parse_source, source_uri
from sardonyx_export.special_tokens import load_tokenizer, read_special_tokens
from sardonyx_export.stages.publish import config_text, write_version
from sardonyx_export.stages.reference import reference_logits
from sardonyx_export.stages.verify import compare, make_prompts, run_graph

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done and how much there is; 0 of 0 where nobody knows."""


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody asked for."""

    source: str
    """As on the command line; see `sources.resolve`."""
    repository: Path
    name: str | None = None
    """Of the model; ``None``: made from the source's."""
    precision: Precision | Literal["auto"] = "auto"
    max_model_len: int | None = None
    """Positions that the graph is built for; ``None``: the model's own."""
    sha256: str | None = None
    """What the archive or GGUF file must hash to."""
    if_exists: Literal["refuse", "keep", "add"] = "refuse"
    """Where the model is there already: refuse; keep it if it was made from this source; add its next version."""


class ExportResult(msgspec.Struct, frozen=True, kw_only=True):
    """Where an export went."""

    name: str
    version: int
    path: Path
    """The version folder."""
    manifest: Manifest
    is_new: bool
    """False: it was there already, and nothing was done."""


def run_export(request: ExportRequest, *, progress: Progress, announce: Callable[[Plan], None]) -> ExportResult:
    """Export a model into a repository.

    Args:
        request: what to export.
        progress: of what takes long, called in this thread.
        announce: called once with what will be built, before anything is written.

    Raises:
        ConfigError: the request, the source or the repository is at fault, or the result is out of tolerance. The
            repository is then as it was.
    """
    source = parse_source(request.source)
    if request.name is not None:
        validate_model_name(request.name)
    request.repository.mkdir(parents=True, exist_ok=True)
    repository = Repository(request.repository)
    if request.if_exists == "keep" and (kept := _find_kept(repository, request, source_uri(source))):
        return kept
    opened = open_source(source, sha256=request.sha256, progress=progress)
    plan = make_plan(
        opened.checkpoint,
        name=request.name or opened.name,
        precision=request.precision,
        max_model_len=request.max_model_len,
    )
    _check_target(repository, plan, is_taken_allowed=request.if_exists == "add")
    announce(plan)
    with repository.staging(plan.name) as folder:
        report, llm, parity = _build_and_verify(opened.checkpoint, plan, folder, progress)
        manifest = write_version(
            folder,
            opened.checkpoint,
            plan,
            revision=opened.revision,
            graphs={"decoder": report.files},
            weights=report.weights,
            llm=llm,
            parity=[parity],
        )
        version = repository.publish(plan.name, folder, config_text(plan))
    path = repository.root / plan.name / str(version)
    return ExportResult(name=plan.name, version=version, path=path, manifest=manifest, is_new=True)


def _build_and_verify(
    checkpoint: Checkpoint, plan: Plan, folder: Path, progress: Progress
) -> tuple[BuildReport, LanguageModel, Parity]:
    spec = read_spec(checkpoint.config, max_model_len=plan.max_model_len)
    tokenizer = load_tokenizer(checkpoint)
    special = read_special_tokens(checkpoint, tokenizer, vocab_size=spec.vocab_size)
    prompts = make_prompts(tokenizer, vocab_size=spec.vocab_size, max_model_len=plan.max_model_len)

    options = BuildOptions(precision=plan.precision, max_model_len=plan.max_model_len, target=plan.target)
    report = build_decoder(checkpoint, folder, options, lambda done, total: progress("build", done, total))
    llm = LanguageModel(
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_model_len,
        kv=KvLayout(num_layers=len(spec.layers), num_kv_heads=spec.num_kv_heads, head_size=spec.head_size),
        bos_token_id=special.bos,
        eos_token_ids=special.eos,
        pad_token_id=special.pad,
        add_bos_token=special.add_bos,
    )
    progress("verify", 0, 2)
    reference = reference_logits(checkpoint, spec, prompts)
    progress("verify", 1, 2)
    configure_threads(os.cpu_count() or 1, allow_spinning=False)
    measured = run_graph(folder / report.files[0], llm, prompts)
    progress("verify", 2, 2)
    return report, llm, compare(reference, measured, plan.precision)


def _find_kept(repository: Repository, request: ExportRequest, uri: str) -> ExportResult | None:
    """The version that this request would make again."""
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
                path = entry.version_path(version)
                return ExportResult(name=entry.name, version=version, path=path, manifest=manifest, is_new=False)
    return None


def _usable_manifest(entry: ModelEntry, version: int) -> Manifest | None:
    """``None`` as well where files are missing or cut: such a version is worth exporting again."""
    try:
        manifest = read_manifest(entry.version_path(version))
        if manifest is not None:
            check_files(entry.version_path(version), manifest, hashes=False)
    except ConfigError:
        return None
    return manifest


def _is_wanted(manifest: Manifest, request: ExportRequest, uri: str) -> bool:
    built_len = manifest.llm.max_model_len if manifest.llm else None
    return (
        manifest.source.uri == uri
        and request.precision in ("auto", manifest.precision)
        and request.max_model_len in (None, built_len)
        and (request.sha256 is None or request.sha256.lower() == manifest.source.sha256)
    )


def _check_target(repository: Repository, plan: Plan, *, is_taken_allowed: bool) -> None:
    """Refuse before the work is done what would fail after it.

    Raises:
        ExportError: the name is taken, or the disk too full.
    """
    validate_model_name(plan.name)
    if (repository.root / plan.name).exists() and not is_taken_allowed:
        raise ExportError(
            f"{plan.name} is in the repository already: --force adds a version, --name gives another name", field="name"
        )
    free = shutil.disk_usage(repository.root).free
    if free < plan.estimated_bytes:
        raise ExportError(
            f"{plan.name} takes about {plan.estimated_bytes / 1e9:.1f} GB, free are {free / 1e9:.1f} GB",
            file=str(repository.root),
        )
