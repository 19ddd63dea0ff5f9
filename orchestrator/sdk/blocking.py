"""The client for code without asyncio."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property, partial
from typing import Concatenate, ParamSpec, Self, TypeVar

import httpx

from orchestrator import errors, models
from orchestrator.calls import sessions
from orchestrator.calls.call import Call
from orchestrator.exchange import NO_CONTENT, Client
from orchestrator.following import Place
from orchestrator.sdk.methods import ClientMethods, ContextMethods, SessionMethods
from orchestrator.sdk.twins import Blocking, as_method

T = TypeVar("T")
P = ParamSpec("P")


def _blocking_life(
    build: Callable[P, Call[models.Session]],
) -> Callable[Concatenate["SyncSandboxClient", P], AbstractContextManager["SyncOpenSession"]]:
    @contextmanager
    def method(self: "SyncSandboxClient", /, *args: P.args, **kwargs: P.kwargs) -> Iterator["SyncOpenSession"]:
        session = SyncOpenSession(self, self._send(build(*args, **kwargs)))
        try:
            yield session
        finally:
            with suppress(errors.SessionNotFound, errors.SessionEnded):
                self.end_session(session.id)

    as_method(method, build, "session")
    return method


class SyncSandboxClient(Blocking, ClientMethods, Client):
    """A client for code without asyncio; threads may share it. `close` lets go of its connections."""

    session = _blocking_life(sessions.create_session)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @cached_property
    def _http(self) -> httpx.Client:
        return httpx.Client(**self._options())

    def _send(self, call: Call[T]) -> T:
        tries = self._new_tries(call)
        while True:
            try:
                with self._translated(call):
                    response = self._http.request(**self._arguments(call))
                return self._read(call, response)
            except errors.SandboxError as error:
                if (pause_s := tries.pause_after(error)) is None:
                    raise
            time.sleep(pause_s)

    def _follow(self, call: Call[models.Event]) -> Iterator[models.Event]:
        place = Place(call, self._new_tries)
        while not place.ended:
            try:
                with (
                    self._translated(place.call),
                    self._http.stream(**self._arguments(place.call)) as response,
                ):
                    if response.status_code not in call.statuses:
                        response.read()
                        raise self._refusal(call, response)
                    if response.status_code == NO_CONTENT:
                        return
                    for data in response.iter_bytes():
                        yield from place.feed(data)
                place.check()
            except errors.SandboxError as error:
                if (pause_s := place.pause_after(error)) is None:
                    raise
                time.sleep(pause_s)


class SyncOpenSession(Blocking, SessionMethods):
    """A session for the time of `with client.session()`; `facts` is what the service said at its start."""

    def __init__(self, client: SyncSandboxClient, facts: models.Session) -> None:
        self.facts = facts
        self.id = facts.id
        self._client = client
        self._ids = (facts.id,)

    def context(
        self, context_id: str | None = None, *, language: models.ContextLanguage | None = None
    ) -> "SyncOpenContext":
        """Start a context: an interpreter that stays, in which `run` keeps variables."""
        facts = self._client.create_context(self.id, context_id, language=language)
        return SyncOpenContext(self._client, facts)


class SyncOpenContext(Blocking, ContextMethods):
    """A context of a session, until `delete` or the session's end; `facts` is what the service said at its start."""

    def __init__(self, client: SyncSandboxClient, facts: models.Context) -> None:
        self.facts = facts
        self.id = facts.id
        self._client = client
        self._ids = (facts.session_id, facts.id)
        self.run = partial(client.execute_code, facts.session_id, context_id=facts.id)
