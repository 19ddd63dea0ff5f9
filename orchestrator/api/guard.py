"""Who may call, and with what: keys, host names, media types, response headers."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.datastructures import MutableScopeHeaders
from litestar.enums import ScopeType
from litestar.handlers import BaseRouteHandler
from litestar.routes import HTTPRoute
from litestar.types import Message, Scope

from orchestrator.errors import NotFound, Unauthorized, UnsupportedMediaType

OPEN = "open"  # handlers with this option are served without a key
SIGNED = "signed"  # handlers with this option check a signature instead of a key, and do so themselves
ACCEPTS = "accepts"  # the media type of a handler's body, when it is not JSON
ANY = "*/*"
TAKES = "takes"  # type and media type of a body that a handler reads itself, for the specification
SUBPROTOCOL = "bearer."  # and a key in base64url
LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]"}
WITH_BODY = {"POST", "PUT", "PATCH"}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Gate:
    """The keys, by name, as hashes. Without keys only a caller that names this machine is served:
    a web page cannot reach the service by a host name that it controls.
    """

    def __init__(self, keys: Mapping[str, str], *, local_only: bool) -> None:
        self._hashes = {name: _hash(key) for name, key in keys.items()}
        self._local_only = local_only and not keys

    def check(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Raise Unauthorized, NotFound or UnsupportedMediaType for a request that may not pass."""
        if not handler.opt.get(OPEN):
            self._check_host(connection.headers)
            if not handler.opt.get(SIGNED):
                self._check_key(key_of(connection))
        if connection.scope["type"] == ScopeType.WEBSOCKET:
            check_origin(connection.headers)
        if connection.scope["raw_path"].startswith(b"/v1/") and connection.scope["raw_path"].endswith(b"/"):
            raise NotFound("There is nothing at this path: leave out the slash at its end")  # Litestar would ignore it
        if connection.scope.get("method") in WITH_BODY:
            check_body(connection.headers, handler.opt.get(ACCEPTS, "application/json"))

    def _check_host(self, headers: Mapping[str, str]) -> None:
        if self._local_only:
            host = headers.get("host", "")
            if host not in LOCAL_HOSTS and host.rpartition(":")[0] not in LOCAL_HOSTS:
                raise Unauthorized("Without API keys this service answers to localhost only: set SANDBOX_API_KEYS")

    def _check_key(self, key: str) -> None:
        if self._hashes:
            given = _hash(key)
            # Every hash is compared, so that the time tells nothing about which one matched.
            matches = [hmac.compare_digest(given, known) for known in self._hashes.values()]
            if not any(matches):
                raise Unauthorized("Send a valid key as `Authorization: Bearer KEY`")


def key_of(connection: ASGIConnection[Any, Any, Any, Any]) -> str:
    """Return the key that was sent. For a WebSocket a browser sends no headers of ours: there it is a subprotocol."""
    headers = connection.headers
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token
    if connection.scope["type"] == ScopeType.WEBSOCKET:
        for name in connection.scope["subprotocols"]:
            if name.startswith(SUBPROTOCOL):
                return decoded(name.removeprefix(SUBPROTOCOL))
    return headers.get("x-api-key", "")


def decoded(text: str) -> str:
    """Return what base64url without its padding stands for; nothing when it is none."""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except (binascii.Error, ValueError):
        return ""


def check_origin(headers: Mapping[str, str]) -> None:
    """Refuse the page of another site: unlike requests, a WebSocket needs no leave of ours to be opened."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        raise Unauthorized("A page of another site may not open a WebSocket here: leave out `Origin`")


def check_body(headers: Mapping[str, str], accepted: str) -> None:
    """Refuse a body of another media type, and one that is encoded: a browser's simple request is neither."""
    if headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaType("Send the body without Content-Encoding")
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if has_body and accepted not in (ANY, media_type):
        raise UnsupportedMediaType(f"Send the body as Content-Type: {accepted}")


async def add_headers(message: Message, scope: Scope) -> None:
    """Add the security headers to every response."""
    if message["type"] == "http.response.start":
        headers = MutableScopeHeaders.from_message(message)
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
        if scope.get("method") == "OPTIONS":
            headers["Allow"] = allowed(scope)


def allowed(scope: Scope) -> str:
    """Return the methods of a path. Litestar's own answer has those of one of its handlers."""
    routes = [route for route in scope["litestar_app"].routes if isinstance(route, HTTPRoute)]
    handlers = [
        handler for route in routes if route.path_format == scope["path_template"] for handler in route.route_handlers
    ]
    shown = [handler for handler in handlers if handler.resolve_include_in_schema()] or handlers
    return ", ".join(sorted({"OPTIONS"}.union(*(handler.http_methods for handler in shown))))


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
