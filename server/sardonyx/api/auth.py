"""Who may call what: API keys, checked against the matched route, never against the path.

Floor 5. Default deny: `Gatekeeper.guard` stands before every route of the application; a route opts out with
``opt=PUBLIC`` or asks for more with ``opt=ADMIN``.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from sardonyx.errors import PermissionDenied, Unauthenticated

PUBLIC = {"access": "public"}
"""For probes and Prometheus."""
ADMIN = {"access": "admin"}
"""Loads and unloads models, or shows what only an operator should see."""

_PORT = re.compile(r":\d*$")


class Gatekeeper:
    """Checks the key of every request, and on a server without keys where a request comes from.

    Without any API key the server is open to whoever reaches it, which is the loopback interface unless the operator
    said otherwise; then a page in the user's browser must not be able to use it, be it by a form or by DNS rebinding.
    With admin keys only, the API is open and the admin routes are not. With API keys only, each of them is an admin's.

    Args:
        local_hosts: names under which the server may be called while it is open, as in a Host header but without port;
            none: any.
        origins: pages that may call it; ``*``: any.
    """

    def __init__(
        self,
        *,
        api_keys: Iterable[str] = (),
        admin_keys: Iterable[str] = (),
        local_hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
    ) -> None:
        self._admin = [_digest(key.encode()) for key in admin_keys]
        self._api = [_digest(key.encode()) for key in api_keys]
        self._local_hosts = frozenset(local_hosts)
        self._origins = frozenset(origins)

    def guard(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """A Litestar guard.

        Raises:
            Unauthenticated: no key, or one that we do not know.
            PermissionDenied: an API key on an admin route; a foreign page on an open server.
        """
        self.check(connection.headers, handler.opt.get("access") or "")

    def check(self, headers: Mapping[str, str], access: str) -> None:
        """What `guard` asks, for HTTP handlers that are no Litestar routes.

        Args:
            headers: of the request, by lower-case name.
            access: as for `check_key`.

        Raises:
            Unauthenticated: as `guard`.
            PermissionDenied: as `guard`.
        """
        if access == "public":
            return
        if not self._api:
            self._refuse_foreign_pages(headers)
        if self._api or self._admin:
            self.check_key(presented_key(headers), access)

    def require_admin(self, connection: ASGIConnection[Any, Any, Any, Any]) -> None:
        """For handlers where only some requests are an admin's.

        Raises:
            Unauthenticated: as `guard`.
            PermissionDenied: a good key, but not an admin's.
        """
        self.check_key(presented_key(connection.headers), "admin")

    def check_key(self, presented: bytes, access: str = "") -> None:
        """What `guard` asks of a key, for callers that are no ASGI connection.

        Where there are no keys nothing is asked, and where a caller comes from is not looked at.

        Args:
            presented: the key; empty where there is none.
            access: ``public``, ``admin``, or empty for everything else.

        Raises:
            Unauthenticated: as `guard`.
            PermissionDenied: a good key, but not an admin's.
        """
        if access == "admin":
            if (self._api or self._admin) and not self._is_admin(presented):
                raise PermissionDenied("this needs an admin key")
        elif access != "public" and self._api:
            self._is_admin(presented)

    def _is_admin(self, presented: bytes) -> bool:
        """What the presented key is good for: it is good for something, or this raises `Unauthenticated`."""
        if not presented:
            raise Unauthenticated("no API key came with the request: send Authorization: Bearer <key>")
        digest = _digest(presented)
        is_admin = _is_among(digest, self._admin)
        if not (_is_among(digest, self._api) or is_admin):
            raise Unauthenticated("the API key is not valid here")
        return is_admin or not self._admin

    def _refuse_foreign_pages(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        if self._local_hosts and _PORT.sub("", host).lower() not in self._local_hosts:
            raise PermissionDenied(
                "without API keys the server answers under its own address only, not to this Host header; "
                "the operator may set keys, or allow_unauthenticated"
            )
        origin = headers.get("origin")
        if origin and origin.partition("://")[2] != host and not self._origins & {"*", origin}:
            raise PermissionDenied("the page that sent this is not among cors_origins", code="origin_not_allowed")


def presented_key(headers: Mapping[str, str]) -> bytes:
    """From ``Authorization: Bearer``, ``X-Api-Key`` (Anthropic) or ``api-key`` (Azure); empty where there is none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        key = headers.get("x-api-key") or headers.get("api-key") or ""
    return key.strip().encode("latin-1", "replace")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_among(digest: bytes, known: list[bytes]) -> bool:
    """Takes as long for a wrong key as for a right one, whichever it is."""
    return sum([hmac.compare_digest(digest, one) for one in known]) > 0
