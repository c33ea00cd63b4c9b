"""An export from source to published version: fetch, plan, build, verify, publish.

Everything is written into a staging folder of the repository and appears there by one rename, or not at all.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from sardonyx.repository.layout import Repository, validate_model_name
from sardonyx.repository.manifest import LanguageModel, Parity
from sardonyx.runtime.session import configure_threads
from sardonyx_export.builders.decoder import BuildOptions, BuildReport, build_decoder
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.errors import ExportError
from sardonyx_export.families.llm import read_spec
from sardonyx_export.plan import Plan, make_plan
from sardonyx_export.request import ExportRequest, ExportResult, has_usable_version
from sardonyx_export.sources.resolve import open_source, parse_source
from sardonyx_export.special_tokens import load_tokenizer, read_special_tokens
from sardonyx_export.stages.publish import config_text, write_version
from sardonyx_export.stages.reference import reference_logits
from sardonyx_export.stages.verify import compare, make_prompts, run_graph

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done and how much there is."""


def run_export(request: ExportRequest, *, progress: Progress, announce: Callable[[Plan], None]) -> ExportResult:
    """Export a model into a repository.

    Args:
        request: what to export.
        progress: of what takes long, called in this thread.
        announce: called once with what will be built, before anything is written.

    Raises:
        ConfigError: the request, the source or the repository is at fault, or the result is out of tolerance. The
            repository is then as it was.
        EngineError: the graph cannot be run; the same holds.
    """
    source = parse_source(request.source)
    if request.name is not None:
        validate_model_name(request.name)
    request.repository.mkdir(parents=True, exist_ok=True)
    repository = Repository(request.repository)
    opened = open_source(source, sha256=request.sha256, progress=progress)
    plan = make_plan(
        opened.checkpoint,
        name=request.name or opened.name,
        precision=request.precision,
        activations=request.activations,
        max_model_len=request.max_model_len,
        target=request.target,
    )
    _check_target(repository, plan, adds_version=request.adds_version)
    announce(plan)
    with repository.staging(plan.name) as folder:
        report, llm, parity = _build_and_verify(opened.checkpoint, plan, folder, progress)
        manifest = write_version(
            folder,
            opened.checkpoint,
            plan,
            revision=opened.revision,
            graphs={"decoder": [file.name for file in report.files]},
            weights=report.weights,
            activations=report.activations,
            llm=llm,
            parity=[parity],
        )
        version = repository.publish(plan.name, folder, config_text(plan))
    path = repository.root / plan.name / str(version)
    return ExportResult(name=plan.name, version=version, path=path, manifest=manifest)


def _build_and_verify(
    checkpoint: Checkpoint, plan: Plan, folder: Path, progress: Progress
) -> tuple[BuildReport, LanguageModel, Parity]:
    spec = read_spec(checkpoint.config, max_model_len=plan.max_model_len)
    tokenizer = load_tokenizer(checkpoint)
    special = read_special_tokens(checkpoint, tokenizer, vocab_size=spec.vocab_size)
    prompts = make_prompts(tokenizer, vocab_size=spec.vocab_size, max_model_len=plan.max_model_len)
    options = BuildOptions(
        precision=plan.precision,
        activations=plan.activations,
        max_model_len=plan.max_model_len,
        target=plan.target,
    )
    report = build_decoder(checkpoint, folder, options, lambda done, total: progress("build", done, total))
    llm = LanguageModel(
        vocab_size=report.vocab_size,
        max_model_len=report.max_model_len,
        kv=report.kv,
        bos_token_id=special.bos,
        eos_token_ids=special.eos,
        pad_token_id=special.pad,
        add_bos_token=special.add_bos,
    )
    # The reference comes first and leaves only its logits: its weights and the session's are never held at once.
    reference = reference_logits(checkpoint, spec, prompts, lambda done, total: progress("verify", done, total))
    configure_threads(os.cpu_count() or 1, allow_spinning=False)
    measured = run_graph(report.files[0], plan.name, llm, prompts)
    return report, llm, compare(reference, measured, plan.precision, report.activations)


def _check_target(repository: Repository, plan: Plan, *, adds_version: bool) -> None:
    """Refuse before the work is done what would fail after it.

    Raises:
        ConfigError: the name is taken or no name, or the disk is too full.
    """
    validate_model_name(plan.name)
    if has_usable_version(repository, plan.name) and not adds_version:
        raise ExportError(
            f"{plan.name} is in the repository already: --force adds a version, --name gives another name", field="name"
        )
    free = shutil.disk_usage(repository.root).free
    if free < plan.estimated_bytes:
        raise ExportError(
            f"{plan.name} takes about {plan.estimated_bytes / 1e9:.1f} GB, free are {free / 1e9:.1f} GB",
            file=str(repository.root),
        )
