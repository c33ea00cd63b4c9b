"""The server process's own options: one struct, filled from flags, environment, a TOML file and defaults.

Floor 0. An option is a field of `Settings`; the string under it is its help text and its row in ``server/README.md``.
Text (flags, environment) and TOML values go through one converter, so a bad value is always a `ConfigError` that names
the option as its writer spelled it: ``--port``, ``SARDONYX_PORT``, or the file and ``port``.
"""

import ast
import difflib
import inspect
import ipaddress
import logging
import os
import re
import sys
import tomllib
import typing
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sardonyx.errors import ConfigError

logger = logging.getLogger(__name__)

ENVIRONMENT_PREFIX = "SARDONYX_"
CONFIG_VARIABLE = "SARDONYX_CONFIG"
"""Names the TOML file where no ``--config`` does."""
DEFAULT_CONFIG = "sardonyx.toml"
"""Read from the working directory where neither names a file, if it is there."""
SECRETS = frozenset({"api_keys", "admin_keys"})
"""Never shown, and no flags: a command line can be read by every user of the machine."""

_MAX_FILE_BYTES = 1 << 20
_SIZE = re.compile(r"(\d{1,18})\s*(|KiB|MiB|GiB|TiB)")
_SIZE_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_ORIGIN = re.compile(r"\*|https?://[^/\s]+")
_PUBLIC_URL = re.compile(r"https?://[^/\s?#@]+(?:/[^\s?#]*)?")
_KEY = re.compile(r"[!-~]{1,512}")

Port = Annotated[int, Meta(ge=0, le=65_535)]
Count = Annotated[int, Meta(ge=1, le=1 << 40)]
CountOrAuto = Annotated[int, Meta(ge=0, le=1 << 50)]
Seconds = Annotated[float, Meta(gt=0, le=7 * 86_400)]
SecondsOrNone = Annotated[float, Meta(ge=0, le=7 * 86_400)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every option of the server process. Build it with `load_settings`."""

    profile: Literal["server", "edge"] = "server"
    """`edge`: smaller defaults for a box with little memory. Each of them can still be set."""
    repository: Path = Path("model_repository")
    """Folder of the model repository. Also the argument of `sardonyx serve`."""
    more_repositories: tuple[Path, ...] = ()
    """Further repositories whose models are served as well. A name that is in two of them is served from neither."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs API keys or `allow_unauthenticated`."""
    port: Port = 8000
    """TCP port; 0 takes a free one and logs it."""
    api_keys: tuple[str, ...] = ()
    """Keys that callers may present. No flag: they come from the environment (separated by commas) or a file."""
    api_keys_file: Path | None = None
    """File with one API key a line (`#` starts a comment), added to `api_keys`. Mode 0600 is recommended."""
    admin_keys: tuple[str, ...] = ()
    """Keys that may also load and unload models. Where there are none, each API key may. No flag."""
    admin_keys_file: Path | None = None
    """As `api_keys_file`, for `admin_keys`."""
    allow_unauthenticated: bool = False
    """Listen beyond loopback although there are no API keys."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser (`https://app.example`, or `*`). None: no CORS headers."""

    id: str = "sardonyx"
    """Name of the server in KServe-v2's metadata. Triton's is `triton`, and some client programs insist on it."""
    allow_grpc: bool = True
    """Also answer KServe-v2 over gRPC."""
    grpc_port: Port = 8001
    """TCP port of gRPC, on the same host; 0 takes a free one and logs it."""
    grpc_max_message_bytes: Annotated[int, Meta(ge=1024, le=(1 << 31) - 1)] = (1 << 31) - 1
    """Bytes of a gRPC message, each way."""
    grpc_certificate: Path | None = None
    """PEM file with the certificate chain of the gRPC port; unset: no TLS."""
    grpc_private_key: Path | None = None
    """PEM file with the key of `grpc_certificate`."""
    grpc_client_certificates: Path | None = None
    """PEM file with the authorities whose client certificates the gRPC port demands; unset: it demands none."""
    metrics_port: Port = 0
    """A port of its own for `/metrics` (Triton has 8002), beside the main one; 0: none."""

    default_model: str | None = None
    """Model for requests that name none. Unset: the first by name that is ready."""
    aliases: dict[str, str] = {}
    """Other names for models: `gpt-3.5-turbo=smollm2-135m-instruct,...`, or a TOML table."""
    model_control_mode: Literal["none", "poll", "explicit"] = "none"
    """`none`: load every model at the start. `poll`: and follow changes. `explicit`: callers load and unload."""
    load_model: tuple[str, ...] = ()
    """Models to load at the start in `explicit` mode; `*` alone: all of them."""
    repository_poll_s: Seconds = 15.0
    """How often `poll` mode looks at the repositories."""
    model_load_thread_count: Annotated[int, Meta(ge=1, le=64)] = 4
    """Models that are loaded at once."""
    strict_readiness: bool = True
    """Ready means that every model of the start is. Without it: that requests are taken."""
    exit_on_error: bool = False
    """End the process, with code 2, where a model of the start cannot be loaded."""
    engine_cache: Path = Path("engine_cache")
    """Folder for the engines that TensorRT builds. It may be deleted at any time: the next load builds them again."""
    auto_complete_config: bool = True
    """Fill in what a tensor model's `config.pbtxt` leaves out, from its ONNX file."""
    allow_file_override: bool = False
    """Let callers that may load models bring the model's files along."""
    allow_client_shm: bool = False
    """Let callers register system shared memory for tensors."""
    allow_setting_updates: bool = False
    """Let callers change log and trace settings."""
    response_cache_bytes: CountOrAuto = 0
    """Memory for answers of tensor models whose config enables `response_cache`. 0: none is kept."""
    max_inflight_inferences: Count = 4096
    """Tensor requests admitted and not yet answered, over all models."""
    max_inflight_tensor_bytes: Count = 1 << 30
    """Bytes of their inputs."""
    http_max_input_size: Annotated[int, Meta(ge=1024, le=1 << 40)] = 64 << 20
    """Bytes of a KServe-v2 body over HTTP, decompressed, and of its tensors, where a string counts as 64."""
    enable_tokenizer_info: bool = False
    """Answer `/tokenizer_info`, which shows the chat template."""

    num_threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """Threads of a model; instances on the CPU divide them. 0: the physical cores that affinity and quota leave us."""
    allow_spinning: bool = False
    """Idle compute threads spin as long as ONNX Runtime likes: for one model alone on its machine."""

    kv_cache_bytes: CountOrAuto = 0
    """Most memory for the KV cache of one model (`2GiB` is understood). 0: from `memory_fraction`."""
    memory_fraction: Annotated[float, Meta(gt=0, le=0.95)] = 0.5
    """Share of the memory free at start that all KV caches may take together."""
    device_memory_fraction: Annotated[float, Meta(gt=0, le=0.98)] = 0.9
    """Share of a card's memory, free when its first model is loaded, that all models may take together."""
    max_num_seqs: Annotated[int, Meta(ge=1, le=4096)] = 32
    """Sequences of one model that run at once."""
    max_model_len: CountOrAuto = 0
    """Prompt and completion tokens of one sequence at most. 0: what the model was built for."""
    max_chunk_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] = 256
    """Prompt tokens of one sequence in one step at most."""
    max_batch_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] = 512
    """Tokens of one step at most."""
    max_step_ms: Annotated[float, Meta(gt=0, le=60_000)] = 200.0
    """Target length of a step while others decode: how long a long prompt may hold them up, in milliseconds."""
    encoder_batch_tokens: Annotated[int, Meta(ge=1, le=1 << 20)] = 1024
    """Tokens of one step of an embedding model, a reranker or a classifier at most. A longer text runs alone."""

    max_queued_requests: Count = 128
    """Sequences (a request has one for each prompt and choice) admitted and not yet finished, over all models."""
    max_queued_tokens: Count = 1 << 20
    """Prompt tokens admitted and not yet finished, over all models; estimated from bytes until they are counted."""
    max_choices: Annotated[int, Meta(ge=1, le=4096)] = 128
    """Sequences (prompts times choices) of one request."""
    max_body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30)] = 10_000_000
    """Bytes of a request's body."""
    max_audio_bytes: Annotated[int, Meta(ge=1024, le=1 << 33)] = 100 << 20
    """Bytes of a request with a sound (`100MiB` is understood)."""
    max_audio_s: Annotated[float, Meta(gt=0, le=86_400)] = 7200.0
    """Length of a sound at most, in seconds; one of an hour takes 0.6 GB while it is prepared, then 0.1 GB."""
    max_queued_audio_s: Annotated[int, Meta(ge=1, le=1 << 40)] = 36_000
    """Seconds of sound admitted and not yet transcribed, over all models; estimated from bytes until it is decoded."""
    max_queued_image_steps: Annotated[int, Meta(ge=1, le=1 << 40)] = 20_000
    """Steps of pictures admitted and not yet made, over all models."""
    image_store_bytes: CountOrAuto = 64 << 20
    """Memory for pictures that are answered as URLs, each for an hour. 0: none is kept, URLs hold them as `data:`."""
    public_url: str | None = None
    """Where callers reach us (`https://ai.example`), for URLs of pictures. Unset: the address that they called."""
    request_timeout_s: Seconds = 600.0
    """A request is ended after so long, counted from its arrival."""
    queue_timeout_s: Seconds = 60.0
    """A request that has not started after so long is refused."""
    drain_grace_s: SecondsOrNone = 5.0
    """After SIGTERM: still accept for so long while readiness already says no, for balancers to notice."""
    drain_timeout_s: Seconds = 30.0
    """After SIGTERM: requests that still run after so long are ended."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message that is logged: `debug`, `info`, `warning` or `error`."""
    log_json: bool = False
    """One JSON object a line instead of text."""

    def __repr__(self) -> str:
        """All but the keys, so that a log line or a traceback cannot carry them."""
        shown = (f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"Settings({', '.join(shown)})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        shown = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return [(name, f"<{len(value)} hidden>" if name in SECRETS else value) for name, value in shown]


EDGE_DEFAULTS: dict[str, Any] = {
    "model_load_thread_count": 1,
    "memory_fraction": 0.25,
    "device_memory_fraction": 0.8,
    "max_num_seqs": 4,
    "max_model_len": 2048,
    "max_chunk_tokens": 128,
    "max_batch_tokens": 128,
    "encoder_batch_tokens": 256,
    "max_queued_requests": 16,
    "max_queued_tokens": 1 << 15,
    "max_choices": 4,
    "max_body_bytes": 4 << 20,
    "max_inflight_inferences": 64,
    "max_inflight_tensor_bytes": 64 << 20,
    "http_max_input_size": 16 << 20,
    "grpc_max_message_bytes": 16 << 20,
    "max_audio_bytes": 32 << 20,
    "max_audio_s": 1800.0,
    "max_queued_audio_s": 3600,
    "max_queued_image_steps": 200,
    "image_store_bytes": 8 << 20,
}
"""What `profile` ``edge`` puts in place of the struct's defaults: for 2 to 8 GB that the system and callers share.

Fractions are of MemAvailable, which a card that shares the host's memory is measured by, too.
"""


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to say about one field of `Settings`."""

    name: str
    """The TOML key."""
    type: Any
    """As annotated."""
    default: Any
    help: str

    @property
    def flag(self) -> str | None:
        """Its flag; ``None`` for secrets, and for `repository`, which is an argument."""
        return None if self.name in SECRETS or self.name == "repository" else _flag(self.name)


def options() -> list[Option]:
    """Every option in the order of the struct, with the text under its field."""
    body = ast.parse(inspect.getsource(Settings)).body[0]
    assert isinstance(body, ast.ClassDef)
    helps = {}
    for field, text in pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            helps[field.target.id] = str(ast.literal_eval(text.value))
    defaults = Settings()
    return [
        Option(name=name, type=kind, default=getattr(defaults, name), help=helps[name])
        for name, kind in _types().items()
    ]


def load_settings(
    flags: Mapping[str, object] | None = None,
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Fill the struct: flags win over ``SARDONYX_*`` variables, these over the TOML file, this over the defaults.

    The defaults are those of the profile. An empty variable counts as not set. Relative paths in the TOML file start
    at its folder, all others at the working directory.

    Args:
        flags: by field name, text or already of the field's type; ``None`` values count as not given.
        config: the file that ``--config`` names.
        environ: defaults to the process's environment.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, an unreadable file, keys that cannot be
            sent in a header.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    named = config or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    path = named or Path(DEFAULT_CONFIG)
    if named or path.is_file():
        values |= _from_toml(path)
    values |= _from_environment(environ)
    values |= _from_flags({name: value for name, value in (flags or {}).items() if value is not None})
    for name in SECRETS:
        if (file := values.get(f"{name}_file")) is not None:
            values[name] = (*values.get(name, ()), *_read_keys(file, f"{name}_file"))
    return Settings(**((EDGE_DEFAULTS if values.get("profile") == "edge" else {}) | values))


def parse_size(text: str) -> int | None:
    """Bytes of ``2GiB``, ``512 MiB`` or ``1048576``; ``None`` for anything else."""
    size = _SIZE.fullmatch(text.strip())
    return int(size[1]) * _SIZE_UNITS[size[2]] if size else None


def check_exposure(settings: Settings) -> None:
    """Refuse to listen beyond loopback without keys, unless told to.

    Raises:
        ConfigError: names the ways out.
    """
    if not (settings.api_keys or settings.allow_unauthenticated or _is_loopback(settings.host)):
        raise ConfigError(
            f"{settings.host!r} can be reached from other machines and there are no API keys: "
            "set SARDONYX_API_KEYS or api_keys_file, or allow_unauthenticated to serve everyone",
            field="host",
        )


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use, at least 1.

    Two hyperthreads of a core count once: they share the units that matrix products keep busy. The cgroup's quota
    bounds the number, because more threads than quota are stopped in the middle of a step until the next period.

    Args:
        root: where ``proc`` and ``sys`` lie.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max), scheduler/sched-bwc.rst (cfs_quota_us).
    """
    cpus = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))
    topology = root / "sys/devices/system/cpu"
    cores = {_read(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return max(1, min([len(cores), *map(int, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs granted by this process's cgroup and each one above it, where there is a limit; versions 2 and 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        relative = Path(group.lstrip("/"))
        for folder in {base / relative, *(base / parent for parent in relative.parents), base}:
            if controllers:
                limit = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
            else:
                limit = _read(folder / "cpu.max").split()
            if len(limit) == 2 and limit[0].isdigit() and limit[1].isdigit() and int(limit[1]):
                yield int(limit[0]) / int(limit[1])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _types() -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(Settings)}


def _from_toml(path: Path) -> dict[str, Any]:
    file = str(path)
    try:
        data = tomllib.loads(_read_bounded(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"is not TOML: {error}", file=file) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=file) from error
    types = _types()
    values = {}
    for name, value in data.items():
        if name not in types:
            raise ConfigError("is not a setting" + _suggestion(name, types), file=file, field=name)
        values[name] = _convert(name, types[name], value, {"file": file, "field": name})
        if isinstance(values[name], Path):
            values[name] = path.parent / values[name]
        elif name == "more_repositories":
            values[name] = tuple(path.parent / each for each in values[name])
    if SECRETS & values.keys():
        _warn_if_readable(path)
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    types = _types()
    names = {ENVIRONMENT_PREFIX + name.upper(): name for name in types}
    values = {}
    for variable, text in environ.items():
        if name := names.get(variable):
            if text:
                values[name] = _convert(name, types[name], text, {"field": variable})
        elif variable.startswith(ENVIRONMENT_PREFIX) and (
            suggestion := _suggestion(variable.removeprefix(ENVIRONMENT_PREFIX).lower(), types)
        ):
            # Not refused: other programs and Kubernetes (for a service called sardonyx) have variables of that prefix.
            logger.warning("%s is not a setting%s", variable, suggestion)
    return values


def _from_flags(flags: Mapping[str, object]) -> dict[str, Any]:
    types = _types()
    return {
        name: _convert(name, types[name], value, {"field": "REPOSITORY" if name == "repository" else _flag(name)})
        for name, value in flags.items()
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _convert(name: str, kind: Any, value: object, where: dict[str, str]) -> Any:
    """One value of any source as its field's type. `where` says how the writer spelled the option."""
    shown = "" if name in SECRETS else f", not {value!r}"
    parsed: object = value
    if isinstance(value, str):
        if typing.get_origin(kind) is tuple:
            parsed = [part.strip() for part in value.split(",") if part.strip()]
        elif typing.get_origin(kind) is dict:
            pairs = [part.partition("=") for part in value.split(",") if part.strip()]
            if not all(key.strip() and target.strip() for key, _, target in pairs):
                raise ConfigError(f"expected name=value,...{shown}", **where)
            parsed = {key.strip(): target.strip() for key, _, target in pairs}
        elif name.endswith("_bytes"):
            parsed = parse_size(value) or value
    try:
        converted = msgspec.convert(parsed, kind, strict=not isinstance(value, str), dec_hook=_to_path)
    except msgspec.ValidationError as error:
        # msgspec says "Expected `int`, got `str`": the value itself says more than its type.
        reason = str(error).partition(", got")[0].replace("`", "").replace("Expected", "expected")
        if where["field"] == "SARDONYX_PORT" and "://" in str(value):
            shown += "; Kubernetes sets it for a service called sardonyx, enableServiceLinks: false stops that"
        raise ConfigError(reason + shown, **where) from error
    _check_value(name, converted, where)
    return converted


def _check_value(name: str, value: Any, where: dict[str, str]) -> None:
    """What a type cannot say."""
    if name in SECRETS and not (value and all(_KEY.fullmatch(key) for key in value)):
        raise ConfigError("holds no key, or one with a space or a character that a header cannot carry", **where)
    if name == "cors_origins" and not all(_ORIGIN.fullmatch(origin) for origin in value):
        raise ConfigError(f"expected * or scheme://host[:port], not {value!r}", **where)
    if name == "public_url" and value is not None and not _PUBLIC_URL.fullmatch(value):
        raise ConfigError(f"expected http://... or https://..., without a query, not {value!r}", **where)
    if name in {"host", "default_model"} and value is not None and (not value or value != value.strip()):
        raise ConfigError("is empty or has spaces around it", **where)


def _to_path(target: type, value: object) -> object:
    if target is Path and isinstance(value, str | Path) and "\0" not in str(value):
        with suppress(RuntimeError):  # ~nobody
            return Path(value).expanduser()
    raise msgspec.ValidationError("expected a path")


def _suggestion(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"is larger than {_MAX_FILE_BYTES:,} bytes", file=str(path))
    return data


def _read_keys(path: Path, field: str) -> list[str]:
    try:
        lines = _read_bounded(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}", field=field) from error
    keys = [key for line in lines if (key := line.partition("#")[0].strip())]
    _check_value("api_keys", keys, {"file": str(path)})
    _warn_if_readable(path)
    return keys


def _warn_if_readable(path: Path) -> None:
    if path.stat().st_mode & 0o077:
        logger.warning("%s holds keys and can be read by other users: chmod 600 it", path)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
