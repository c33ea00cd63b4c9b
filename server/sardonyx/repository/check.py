"""Everything that is wrong in a repository and can be seen without running a model.

Floor 1. Goes on after a finding, so that one run names them all.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.repository.autocomplete import DEFAULT_GRAPH, complete_config
from sardonyx.repository.config import ENSEMBLE, language_model_options
from sardonyx.repository.config_fields import refuse_fields
from sardonyx.repository.device_placement import without_device
from sardonyx.repository.layout import ModelEntry, Repository, file_problems, read_manifest
from sardonyx.repository.manifest import Manifest
from sardonyx.repository.tensor_config import read_tensor_config

_MAX_JSON_BYTES = 256 << 20


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to mend."""

    model: str
    file: str | None
    """With the line where it is known."""
    field: str | None
    message: str

    @classmethod
    def of(cls, model: str, error: ConfigError) -> "Finding":
        """What `error` says about `model`."""
        return cls(model=model, file=error.file, field=error.field, message=error.reason)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.model, self.file, self.field, self.message) if part)


def check_repository(root: Path, *, hashes: bool = True) -> list[Finding]:
    """Check every model: names, config, versions, manifest, files, and the JSON beside the graphs.

    Args:
        root: the repository.
        hashes: read every file and compare its sha256; without it sizes only.

    Raises:
        ConfigError: there is no such folder.
    """
    return [
        Finding.of(entry.name, problem)
        for entry in Repository(root).entries()
        for problem in _model_problems(entry, hashes)
    ]


def _model_problems(entry: ModelEntry, hashes: bool) -> Iterator[ConfigError]:
    if entry.error is not None:
        yield entry.error
        return
    for child in sorted(entry.path.iterdir()):
        if child.name.isdecimal() and child.name.startswith("0"):
            yield ConfigError("is ignored: a version is a number without leading zeros", file=str(child))
    if entry.config.version_policy.WhichOneof("policy_choice") == "specific":
        for version in sorted(set(entry.config.version_policy.specific.versions) - set(entry.versions)):
            reason = f"names version {version}, which is not there"
            yield ConfigError(reason, file=str(entry.config_path), field="version_policy.specific.versions")
    if not entry.versions:
        yield ConfigError("has no version to serve", file=str(entry.path))
    for version in entry.versions:
        yield from version_problems(entry, entry.version_path(version), hashes)


def version_problems(entry: ModelEntry, folder: Path, hashes: bool) -> Iterator[ConfigError]:
    """What keeps one version from being served."""
    try:
        manifest = read_manifest(folder)
    except ConfigError as error:
        yield error
        return
    if manifest is None:
        yield from _tensor_model_problems(entry, folder)
        return
    yield from file_problems(folder, manifest, hashes=hashes)
    yield from _json_problems(folder, manifest)
    if manifest.llm is not None:
        yield from _language_model_problems(entry, folder, manifest, manifest.llm.max_model_len)


def _tensor_model_problems(entry: ModelEntry, folder: Path) -> Iterator[ConfigError]:
    """What can be seen without the graph, from which most of the config is completed."""
    file = str(entry.config_path)
    is_ensemble = entry.config.platform == ENSEMBLE
    try:
        if is_ensemble:
            read_tensor_config(complete_config(entry.config, [], [], num_gpus=0), file=file)
        else:
            refuse_fields(entry.config, file=file)
    except ConfigError as error:
        yield error
    graph = entry.config.default_model_filename or DEFAULT_GRAPH
    if not is_ensemble and not (folder / graph).exists():
        yield ConfigError(f"has neither manifest.json nor {graph}", file=str(folder))


def _json_problems(folder: Path, manifest: Manifest) -> Iterator[ConfigError]:
    for listed in manifest.files:
        path = folder / listed.path
        if path.suffix == ".json" and listed.size_bytes <= _MAX_JSON_BYTES and path.is_file():
            try:
                msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                yield ConfigError(str(error), file=str(path))
            except OSError as error:
                yield ConfigError(f"cannot be read: {error.strerror}", file=str(path))


def _language_model_problems(
    entry: ModelEntry, folder: Path, manifest: Manifest, built_for: int
) -> Iterator[ConfigError]:
    if not any(listed.path == "tokenizer.json" for listed in manifest.files):
        yield ConfigError("lists no tokenizer.json", file=str(folder / "manifest.json"), field="files")
    file = str(entry.config_path)
    try:
        # Which card a model for cards runs on is checked where the cards are.
        config = entry.config if manifest.target == "cpu" else without_device(entry.config)
        options = language_model_options(config, file=file)
    except ConfigError as error:
        yield error
        return
    if options.max_model_len is not None and options.max_model_len > built_for:
        reason = f"is {options.max_model_len:,}; the graph was built for {built_for:,}"
        yield ConfigError(reason, file=file, field="parameters['max_model_len']")
