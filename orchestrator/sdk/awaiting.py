"""The client for asyncio."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self, TypeVar

import httpx

from orchestrator import errors, models
from orchestrator.calls import sessions
from orchestrator.calls.call import Call
from orchestrator.exchange import NO_CONTENT, Client
from orchestrator.following import Place
from orchestrator.sdk.methods import ClientMethods, ContextMethods, SessionMethods
from orchestrator.sdk.twins import Awaiting, as_method

if TYPE_CHECKING:
    from orchestrator.remote import RemoteTerminal

T = TypeVar("T")
P = ParamSpec("P")


def _awaited_life(
    build: Callable[P, Call[models.Session]],
) -> Callable[Concatenate["SandboxClient", P], AbstractAsyncContextManager["OpenSession"]]:
    @asynccontextmanager
    async def method(self: "SandboxClient", /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator["OpenSession"]:
        session = OpenSession(self, await self._send(build(*args, **kwargs)))
        try:
            yield session
        finally:
            with suppress(errors.SessionNotFound, errors.SessionEnded):
                await asyncio.shield(self.end_session(session.id))

    as_method(method, build, "session")
    return method


class SandboxClient(Awaiting, ClientMethods, Client):
    """A client for asyncio. It may be used without `async with`; `aclose` then lets go of its connections."""

    session = _awaited_life(sessions.create_session)

    @asynccontextmanager
    async def terminal(
        self,
        session_id: str,
        *,
        cols: int = 80,
        rows: int = 24,
        command: str | None = None,
        term: str = "xterm-256color",
    ) -> AsyncIterator["RemoteTerminal"]:
        """Open a terminal with a shell, or a command, in a session. Its program is killed at the end of the context."""
        from orchestrator.remote import open_terminal  # its library is slow to load, and few open terminals

        query = {"cols": cols, "rows": rows, "command": command, "term": term}
        options = self._options()
        async with open_terminal(
            self.base_url, session_id, headers=options["headers"], through_proxy=options["trust_env"], **query
        ) as remote:
            yield remote

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @cached_property
    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._options())

    async def _send(self, call: Call[T]) -> T:
        tries = self._new_tries(call)
        while True:
            try:
                with self._translated(call):
                    response = await self._http.request(**self._arguments(call))
                return self._read(call, response)
            except errors.SandboxError as error:
                if (pause_s := tries.pause_after(error)) is None:
                    raise
            await asyncio.sleep(pause_s)

    async def _follow(self, call: Call[models.Event]) -> AsyncIterator[models.Event]:
        place = Place(call, self._new_tries)
        while not place.ended:
            try:
                with self._translated(place.call):
                    async with self._http.stream(**self._arguments(place.call)) as response:
                        if response.status_code not in call.statuses:
                            await response.aread()
                            raise self._refusal(call, response)
                        if response.status_code == NO_CONTENT:
                            return
                        async for data in response.aiter_bytes():
                            for event in place.feed(data):
                                yield event
                place.check()
            except errors.SandboxError as error:
                if (pause_s := place.pause_after(error)) is None:
                    raise
                await asyncio.sleep(pause_s)


class OpenSession(Awaiting, SessionMethods):
    """A session for the time of `async with client.session()`; `facts` is what the service said at its start."""

    def __init__(self, client: SandboxClient, facts: models.Session) -> None:
        self.facts = facts
        self.id = facts.id
        self._client = client
        self._ids = (facts.id,)

    async def context(
        self, context_id: str | None = None, *, language: models.ContextLanguage | None = None
    ) -> "OpenContext":
        """Start a context: an interpreter that stays, in which `run` keeps variables."""
        facts = await self._client.create_context(self.id, context_id, language=language)
        return OpenContext(self._client, facts)


class OpenContext(Awaiting, ContextMethods):
    """A context of a session, until `delete` or the session's end; `facts` is what the service said at its start."""

    def __init__(self, client: SandboxClient, facts: models.Context) -> None:
        self.facts = facts
        self.id = facts.id
        self._client = client
        self._ids = (facts.session_id, facts.id)
        self.run = partial(client.execute_code, facts.session_id, context_id=facts.id)
