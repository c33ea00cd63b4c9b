"""KServe-v2's paths over HTTP: one table, matched on the path as it was sent.

Floor 5. Names are URL-decoded after the match, so that none can hold a slash; versions are digits.

Source: Triton, server/src/http_server.cc and docs/protocol/*.md.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple
from urllib.parse import unquote_to_bytes

from sardonyx.errors import InvalidRequest

Access = Literal["public", "user", "admin"]
"""Who may call: anyone, any key, an admin's key (see `api.auth`)."""

MAX_NAME_BYTES = 1024


class Route(NamedTuple):
    """One path with its methods."""

    template: str
    """As metrics show it."""
    endpoint: str
    """Name of what answers."""
    methods: dict[str, Access]


class Found(NamedTuple):
    """A path that matched."""

    route: Route
    arguments: dict[str, str]
    """By the template's names, decoded."""


def _of_model(suffix: str, endpoint: str, method: str, access: Access = "user") -> Iterator[Route]:
    """A path of a model and of one of its versions."""
    for version in ("", "/versions/{version}"):
        yield Route(f"/v2/models/{{model}}{version}{suffix}", endpoint, {method: access})


def _of_regions(kind: str) -> Iterator[Route]:
    """The paths of one kind of shared memory."""
    base = f"/v2/{kind}sharedmemory"
    yield Route(f"{base}/status", f"{kind}_memory_status", {"GET": "user"})
    yield Route(f"{base}/unregister", f"unregister_{kind}_memory", {"POST": "admin"})
    yield Route(f"{base}/region/{{region}}/status", f"{kind}_memory_status", {"GET": "user"})
    yield Route(f"{base}/region/{{region}}/register", f"register_{kind}_memory", {"POST": "admin"})
    yield Route(f"{base}/region/{{region}}/unregister", f"unregister_{kind}_memory", {"POST": "admin"})


ROUTES: tuple[Route, ...] = (
    *_of_model("/infer", "infer", "POST"),
    *_of_model("/generate", "generate", "POST"),
    *_of_model("/generate_stream", "generate_stream", "POST"),
    Route("/v2/health/live", "live", {"GET": "public"}),
    Route("/v2/health/ready", "ready", {"GET": "public"}),
    *_of_model("/ready", "model_ready", "GET", "public"),
    # Before the model of that name.
    Route("/v2/models/stats", "statistics", {"GET": "user"}),
    *_of_model("/stats", "statistics", "GET"),
    *_of_model("/config", "config", "GET"),
    *_of_model("", "model_metadata", "GET"),
    Route("/v2", "server_metadata", {"GET": "user"}),
    Route("/v2/models/{model}/trace/setting", "trace_settings", {"GET": "user", "POST": "admin"}),
    Route("/v2/trace/setting", "trace_settings", {"GET": "user", "POST": "admin"}),
    Route("/v2/logging", "log_settings", {"GET": "user", "POST": "admin"}),
    Route("/v2/repository/index", "index", {"POST": "user"}),
    Route("/v2/repository/{repository}/index", "index", {"POST": "user"}),
    Route("/v2/repository/models/{model}/load", "load", {"POST": "admin"}),
    Route("/v2/repository/{repository}/models/{model}/load", "load", {"POST": "admin"}),
    Route("/v2/repository/models/{model}/unload", "unload", {"POST": "admin"}),
    Route("/v2/repository/{repository}/models/{model}/unload", "unload", {"POST": "admin"}),
    *_of_regions("system"),
    *_of_regions("cuda"),
)

_ARGUMENT = re.compile(r"\{(\w+)\}")
_NOT_IN_NAMES = re.compile(r"[/\\\x00-\x1f\x7f]")


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(_ARGUMENT.sub(lambda name: f"(?P<{name[1]}>{_argument_pattern(name[1])})", template))


def _argument_pattern(name: str) -> str:
    return "[0-9]+" if name == "version" else "[^/]+"


_PATTERNS = [(_pattern(route.template), route) for route in ROUTES]


@lru_cache(1024)
def find_route(raw_path: bytes) -> Found | None:
    """What answers to a path; ``None``: nothing.

    Args:
        raw_path: as it was sent, still percent-encoded, without the query.

    Raises:
        InvalidRequest: a part of it cannot be a name.
    """
    path = raw_path.decode("latin-1")
    if path == "/v2/":
        path = "/v2"
    for pattern, route in _PATTERNS:
        if match := pattern.fullmatch(path):
            arguments = {name: _decode_name(value, name) for name, value in match.groupdict().items()}
            return Found(route, arguments)
    return None


def _decode_name(quoted: str, kind: str) -> str:
    try:
        name = unquote_to_bytes(quoted.encode("latin-1")).decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"the {kind} in the path is no UTF-8") from None
    if not name.strip() or name in (".", "..") or len(name) > MAX_NAME_BYTES or _NOT_IN_NAMES.search(name):
        raise InvalidRequest(f"invalid {kind} name in the path: it may not be blank, '..', or contain a slash")
    return name
