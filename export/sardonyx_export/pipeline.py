"""An export from source to published version: fetch, plan, build, verify, publish.

Everything is written into a staging folder of the repository and appears there by one rename, or not at all.
"""

import shutil
from collections.abc import Callable

from sardonyx.repository.layout import Repository, validate_model_name
from sardonyx_export.errors import ExportError
from sardonyx_export.plan import Plan
from sardonyx_export.recipes.choose import choose_recipe
from sardonyx_export.recipes.recipe import Progress as Progress
from sardonyx_export.request import ExportRequest, ExportResult, has_usable_version
from sardonyx_export.sources.resolve import open_source, parse_source
from sardonyx_export.stages.publish import config_text, write_version


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
    opened = open_source(source, sha256=request.sha256, progress=progress, file=request.file)
    recipe = choose_recipe(opened, request)
    plan = recipe.plan
    _check_target(repository, plan, adds_version=request.adds_version)
    announce(plan)
    with repository.staging(plan.name) as folder:
        built = recipe.build(folder, progress)
        manifest = write_version(folder, opened, plan, built)
        version = repository.publish(plan.name, folder, config_text(plan, built))
    path = repository.root / plan.name / str(version)
    return ExportResult(name=plan.name, version=version, path=path, manifest=manifest)


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
