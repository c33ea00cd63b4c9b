"""The ``sardonyx`` command line.

Floor 7. Imports what a command needs inside the command: ``sardonyx --help`` has to be instant on slow storage, and
must work where a command's packages are not installed.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field, make_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from sardonyx.errors import ConfigError
from sardonyx.settings import Option, load_settings, options
from sardonyx.version import __version__

if TYPE_CHECKING:
    from sardonyx.repository.layout import ModelEntry

COMMANDS = "sardonyx.commands"
"""Entry-point group of commands from other packages. The command ``x`` needs the extra ``x``."""

_SERVE_HELP = (
    "Serve the models of a repository until SIGTERM or Ctrl-C.\n\n"
    "Every flag can also be a SARDONYX_* variable (SARDONYX_PORT=8001) or a key of the TOML file (port = 8001). "
    "Flags win over variables, variables over the file. API keys are read from variables and files only."
)
_CONFIG_HELP = "TOML file with settings. By default $SARDONYX_CONFIG, or sardonyx.toml if it is there."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 findings, 2 a mistake that is told in one line on stderr.

    Args:
        arguments: defaults to the process's own.
    """
    try:
        build_app()(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        sys.stderr.write(f"sardonyx: {error}\n")
        sys.exit(2)


def build_app() -> App:
    """The command line, with a name and a line of help for each command of other packages."""
    app = App(
        name="sardonyx",
        help="Serve a model repository over ONNX Runtime: OpenAI API and KServe-v2 from one process.",
        version=__version__,
        version_flags=["--version"],
        help_format="plaintext",
    )
    app.command(_serve_command(), name="serve", help=_SERVE_HELP)
    app.command(check)
    app.command(models)
    for entry_point in entry_points(group=COMMANDS):
        # Cyclopts can load commands lazily itself, but loads all of them to print some errors.
        help_line = f"Needs the extra {entry_point.name!r}; see sardonyx {entry_point.name} --help."
        app.command(
            _external_command(entry_point), name=entry_point.name, help=help_line, help_flags=[], version_flags=[]
        )
    return app


def check(repository: Path | None = None, /, *, hashes: bool = True, deep: bool = False) -> int:
    """Say what is wrong in a model repository, file and field. Exits with 1 if anything is.

    Args:
        repository: the folder; by default the one that `sardonyx serve` would serve.
        hashes: read every file and compare its sha256 with the manifest.
        deep: also load tokenizers and chat templates, and open every graph with ONNX Runtime; those for cards only
            where there is one.
    """
    from sardonyx.repository.check import Finding, check_repository
    from sardonyx.repository.layout import Repository

    root = load_settings({"repository": repository}).repository
    findings = check_repository(root, hashes=hashes)
    entries = Repository(root).entries()
    if deep:
        broken = {finding.model for finding in findings}
        for entry in entries:
            if entry.name not in broken:
                findings += [Finding.of(entry.name, problem) for problem in _deep_problems(entry)]
    for finding in findings:
        _say(str(finding))
    _say(f"{len(entries)} models, {len(findings)} findings")
    return 1 if findings else 0


def models(repository: Path | None = None, /) -> None:
    """List the models of a repository: versions, family, precision, size, and whether they can be served.

    Args:
        repository: the folder; by default the one that `sardonyx serve` would serve.
    """
    from sardonyx.repository.index import index
    from sardonyx.repository.layout import Repository

    rows = [("MODEL", "VERSIONS", "FAMILY", "PRECISION", "SIZE", "STATE")]
    rows += [
        (
            entry.name,
            ",".join(map(str, entry.versions)) or "-",
            entry.family or "-",
            entry.precision or "-",
            f"{entry.size_bytes / 1e6:,.1f} MB" if entry.versions else "-",
            f"unavailable: {entry.reason}" if entry.reason else "ok",
        )
        for entry in index(Repository(load_settings({"repository": repository}).repository))
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _serve_command() -> Any:
    """``serve`` with a flag for each setting."""
    fields = [(option.name, _flag_type(option), field(default=None)) for option in options() if option.flag]
    # The default, "types", makes cyclopts take the class for the standard library's and leave it whole.
    flags_type = make_dataclass("Flags", fields, kw_only=True, frozen=True, namespace={"__module__": __name__})

    def command(
        repository: Annotated[Path | None, Parameter(help="Folder of the model repository.")] = None,
        /,
        *,
        config: Annotated[Path | None, Parameter(help=_CONFIG_HELP)] = None,
        flags: Any = flags_type(),  # noqa: B008  (frozen; where pydantic is loaded, cyclopts has it check the default)
    ) -> None:
        settings = load_settings({"repository": repository, **vars(flags)}, config=config)
        with _needs("cpu"):
            from sardonyx.app import run

            run(settings)

    command.__annotations__["flags"] = Annotated[flags_type, Parameter(name="*")]
    return command


def _flag_type(option: Option) -> Any:
    """Text for everything but switches: `load_settings` reads it, as it reads variables."""
    default = option.default
    shown = "" if default in (None, (), {}) or isinstance(default, bool) else f" [default: {default}]"
    kind = bool if option.type is bool else str
    return Annotated[kind | None, Parameter(help=option.help.replace("\n", " ") + shown, show_default=False)]


def _external_command(entry_point: EntryPoint) -> Any:
    """A command that is imported when it is run, and gets its arguments as they are."""

    def command(*arguments: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> Any:
        with _needs(entry_point.name):
            return entry_point.load()(arguments)

    return command


def _deep_problems(entry: "ModelEntry") -> Iterator[ConfigError]:
    """What only shows when a model's parts are loaded. The first problem of each version."""
    from sardonyx.processing.chat_template import ChatTemplate
    from sardonyx.processing.tokenizer import Tokenizer
    from sardonyx.repository.layout import read_manifest

    with _needs("cpu"):
        from sardonyx.runtime.providers import execution_provider, num_gpus
        from sardonyx.runtime.session import SessionConfig, open_session

    for version in entry.versions:
        folder = entry.version_path(version)
        try:
            manifest = read_manifest(folder)
            if manifest is not None and manifest.llm is not None:
                source = Tokenizer.load(folder).chat_template
                if source is not None:
                    ChatTemplate(source)
            is_for_card = manifest is not None and manifest.target == "cuda"
            if manifest is None or (is_for_card and not num_gpus()):
                continue  # a graph for cards cannot be opened where there is none
            config = SessionConfig(providers=(execution_provider("cuda"),)) if is_for_card else None
            for graph in manifest.graphs.values():
                open_session(folder / graph.model.path, model_name=entry.name, config=config).close()
        except ConfigError as error:
            yield error


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Around what may import: a package that is not installed is told with the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in {"", "sardonyx", "sardonyx_export"}:
            raise  # a bug of ours
        raise ConfigError(f"{package} is not installed: pip install 'sardonyx[{extra}]'") from error


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
