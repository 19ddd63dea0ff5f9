"""The Model Context Protocol's door, `/mcp`: streamable HTTP as the official package speaks it, behind our keys."""

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from typing import Any
from urllib.parse import urlsplit

from litestar import asgi
from litestar.connection import Request
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from orchestrator.errors import ForeignOrigin, MethodNotAllowed, SessionEnded, SessionNotFound, Unavailable
from orchestrator.service import Orchestrator

SESSION_HEADER = "mcp-session-id"


class McpDoor:
    """The door of one service. The package is imported and its server started when the first client comes:
    it is large, and many services have no such client.
    """

    def __init__(self, service: Orchestrator) -> None:
        self._service = service
        self._opening = asyncio.Lock()
        self._open: tuple[Any, asyncio.Task[None]] | None = None
        self._ending = asyncio.Event()

    @property
    def handler(self) -> ASGIRouteHandler:
        """The route."""
        return asgi("/mcp", copy_scope=True)(self._serve)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Serve inside this context."""
        try:
            yield
        finally:
            self._ending.set()
            if self._open is not None:
                await asyncio.wait([self._open[1]])

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request: Request[Any, Any, Any] = Request(scope)
        check_origin(request)
        if request.method not in ("POST", "DELETE"):
            raise MethodNotAllowed("Messages are sent by POST: there is no stream that the service begins by itself")
        tools = await self._tools()
        await tools.serve(scope, receive, send)
        if request.method == "DELETE" and (number := request.headers.get(SESSION_HEADER)) is not None:
            self._end(tools.session_of(number))

    async def _tools(self) -> Any:
        async with self._opening:
            if self._ending.is_set():
                raise Unavailable("The service is ending: use another one", retry_after_s=5)
            if self._open is None:
                module = await asyncio.to_thread(importlib.import_module, "orchestrator.api.tools")
                tools = module.Tools(self._service)
                started = asyncio.Event()
                # In a context of its own: it lasts, and belongs to the trace of no request, not even the first.
                keeping = asyncio.create_task(self._keep(tools, started), context=Context())
                self._open = (tools, keeping)
                await started.wait()
            return self._open[0]

    async def _keep(self, tools: Any, started: asyncio.Event) -> None:
        async with tools.run():
            started.set()
            await self._ending.wait()

    def _end(self, sid: str) -> None:
        with suppress(SessionNotFound, SessionEnded):
            self._service.sessions.end(self._service.sessions.get(sid), "closed")


def check_origin(request: Request[Any, Any, Any]) -> None:
    """Refuse a page of another site, as the protocol demands."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ForeignOrigin("A browser may call this from a page of the service itself only")
