"""The client: `SandboxClient` for asyncio and `SyncSandboxClient` for the rest, with typed results and one tree of errors.

The two only send calls: `_awaited` and `_blocking` make methods of the functions that build these, with their
parameters.
"""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, get_args

import httpx

from orchestrator import errors, models
from orchestrator.calls import contexts, executions, files, operations, running, sessions
from orchestrator.calls.call import Call
from orchestrator.exchange import Client
from orchestrator.following import Place

__all__ = ["OpenContext", "OpenSession", "SandboxClient", "SyncOpenContext", "SyncOpenSession", "SyncSandboxClient"]

if TYPE_CHECKING:
    from orchestrator.remote import RemoteTerminal

NO_CONTENT = 204  # the last event is known already
T = TypeVar("T")
P = ParamSpec("P")


def _as_method(method: Callable[..., Any], build: Callable[..., Call[Any]], name: str | None = None) -> None:
    """Give a method the name, help, parameters and answer of the function that builds its call."""
    method.__name__ = name or build.__name__
    method.__doc__ = build.__doc__
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(build)
    (answer,) = get_args(signature.return_annotation)
    parameters = [own, *signature.parameters.values()]
    method.__signature__ = signature.replace(parameters=parameters, return_annotation=answer)  # type: ignore[attr-defined]


def _awaited(
    build: Callable[P, Call[T]],
) -> Callable[Concatenate["SandboxClient", P], Coroutine[Any, Any, T]]:
    async def method(self: "SandboxClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._send(build(*args, **kwargs))

    _as_method(method, build)
    return method


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

    _as_method(method, build, "session")
    return method


def _followed(
    build: Callable[P, Call[models.Event]],
) -> Callable[Concatenate["SandboxClient", P], AsyncIterator[models.Event]]:
    def method(self: "SandboxClient", /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[models.Event]:
        return self._follow(build(*args, **kwargs))

    _as_method(method, build)
    return method


class SandboxClient(Client):
    """A client for asyncio. It may be used without `async with`; `aclose` then lets go of its connections."""

    create_session = _awaited(sessions.create_session)
    get_session = _awaited(sessions.get_session)
    list_sessions = _awaited(sessions.list_sessions)
    extend_session = _awaited(sessions.extend_session)
    session_network = _awaited(sessions.session_network)
    end_session = _awaited(sessions.end_session)
    session = _awaited_life(sessions.create_session)
    execute_code = _awaited(executions.execute_code)
    execute_command = _awaited(executions.execute_command)
    install_packages = _awaited(executions.install_packages)
    execute = _awaited(executions.execute)
    start = _awaited(running.start)
    stream = _followed(running.stream)
    events = _followed(running.events)
    send_stdin = _awaited(running.send_stdin)
    list_executions = _awaited(executions.list_executions)
    get_execution = _awaited(executions.get_execution)
    cancel = _awaited(executions.cancel)
    list_files = _awaited(files.list_files)
    read_file = _awaited(files.read_file)
    write_file = _awaited(files.write_file)
    make_directory = _awaited(files.make_directory)
    rename_file = _awaited(files.rename_file)
    delete_file = _awaited(files.delete_file)
    read_archive = _awaited(files.read_archive)
    write_archive = _awaited(files.write_archive)
    create_context = _awaited(contexts.create_context)
    list_contexts = _awaited(contexts.list_contexts)
    get_context = _awaited(contexts.get_context)
    restart_context = _awaited(contexts.restart_context)
    delete_context = _awaited(contexts.delete_context)
    templates = _awaited(operations.templates)
    pool = _awaited(operations.pool)
    isolation = _awaited(operations.isolation)
    health = _awaited(operations.health)
    ready = _awaited(operations.ready)

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


class OpenSession:
    """A session for the time of `async with client.session()`; `facts` is what the service said at its start."""

    def __init__(self, client: SandboxClient, facts: models.Session) -> None:
        self.facts = facts
        self.id = facts.id
        self._client = client
        self.run = partial(client.execute_code, facts.id)
        self.command = partial(client.execute_command, facts.id)
        self.install = partial(client.install_packages, facts.id)
        self.start = partial(client.start, facts.id)
        self.stream = partial(client.stream, facts.id)
        self.events = partial(client.events, facts.id)
        self.send_stdin = partial(client.send_stdin, facts.id)
        self.list_executions = partial(client.list_executions, facts.id)
        self.get_execution = partial(client.get_execution, facts.id)
        self.extend = partial(client.extend_session, facts.id)
        self.cancel = partial(client.cancel, facts.id)
        self.list_files = partial(client.list_files, facts.id)
        self.read_file = partial(client.read_file, facts.id)
        self.write_file = partial(client.write_file, facts.id)
        self.make_directory = partial(client.make_directory, facts.id)
        self.rename_file = partial(client.rename_file, facts.id)
        self.delete_file = partial(client.delete_file, facts.id)
        self.read_archive = partial(client.read_archive, facts.id)
        self.write_archive = partial(client.write_archive, facts.id)

    async def context(
        self, context_id: str | None = None, *, language: models.ContextLanguage | None = None
    ) -> "OpenContext":
        """Start a context: an interpreter that stays, in which `run` keeps variables."""
        facts = await self._client.create_context(self.id, context_id, language=language)
        return OpenContext(self._client, facts)


class OpenContext:
    """A context of a session, until `delete` or the session's end; `facts` is what the service said at its start."""

    def __init__(self, client: SandboxClient, facts: models.Context) -> None:
        self.facts = facts
        self.id = facts.id
        self.run = partial(client.execute_code, facts.session_id, context_id=facts.id)
        self.read = partial(client.get_context, facts.session_id, facts.id)
        self.restart = partial(client.restart_context, facts.session_id, facts.id)
        self.delete = partial(client.delete_context, facts.session_id, facts.id)


def _blocking(build: Callable[P, Call[T]]) -> Callable[Concatenate["SyncSandboxClient", P], T]:
    def method(self: "SyncSandboxClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._send(build(*args, **kwargs))

    _as_method(method, build)
    return method


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

    _as_method(method, build, "session")
    return method


def _followed_blocking(
    build: Callable[P, Call[models.Event]],
) -> Callable[Concatenate["SyncSandboxClient", P], Iterator[models.Event]]:
    def method(self: "SyncSandboxClient", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[models.Event]:
        return self._follow(build(*args, **kwargs))

    _as_method(method, build)
    return method


class SyncSandboxClient(Client):
    """A client for code without asyncio; threads may share it. `close` lets go of its connections."""

    create_session = _blocking(sessions.create_session)
    get_session = _blocking(sessions.get_session)
    list_sessions = _blocking(sessions.list_sessions)
    extend_session = _blocking(sessions.extend_session)
    session_network = _blocking(sessions.session_network)
    end_session = _blocking(sessions.end_session)
    session = _blocking_life(sessions.create_session)
    execute_code = _blocking(executions.execute_code)
    execute_command = _blocking(executions.execute_command)
    install_packages = _blocking(executions.install_packages)
    execute = _blocking(executions.execute)
    start = _blocking(running.start)
    stream = _followed_blocking(running.stream)
    events = _followed_blocking(running.events)
    send_stdin = _blocking(running.send_stdin)
    list_executions = _blocking(executions.list_executions)
    get_execution = _blocking(executions.get_execution)
    cancel = _blocking(executions.cancel)
    list_files = _blocking(files.list_files)
    read_file = _blocking(files.read_file)
    write_file = _blocking(files.write_file)
    make_directory = _blocking(files.make_directory)
    rename_file = _blocking(files.rename_file)
    delete_file = _blocking(files.delete_file)
    read_archive = _blocking(files.read_archive)
    write_archive = _blocking(files.write_archive)
    create_context = _blocking(contexts.create_context)
    list_contexts = _blocking(contexts.list_contexts)
    get_context = _blocking(contexts.get_context)
    restart_context = _blocking(contexts.restart_context)
    delete_context = _blocking(contexts.delete_context)
    templates = _blocking(operations.templates)
    pool = _blocking(operations.pool)
    isolation = _blocking(operations.isolation)
    health = _blocking(operations.health)
    ready = _blocking(operations.ready)

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


class SyncOpenSession:
    """A session for the time of `with client.session()`; `facts` is what the service said at its start."""

    def __init__(self, client: SyncSandboxClient, facts: models.Session) -> None:
        self.facts = facts
        self.id = facts.id
        self._client = client
        self.run = partial(client.execute_code, facts.id)
        self.command = partial(client.execute_command, facts.id)
        self.install = partial(client.install_packages, facts.id)
        self.start = partial(client.start, facts.id)
        self.stream = partial(client.stream, facts.id)
        self.events = partial(client.events, facts.id)
        self.send_stdin = partial(client.send_stdin, facts.id)
        self.list_executions = partial(client.list_executions, facts.id)
        self.get_execution = partial(client.get_execution, facts.id)
        self.extend = partial(client.extend_session, facts.id)
        self.cancel = partial(client.cancel, facts.id)
        self.list_files = partial(client.list_files, facts.id)
        self.read_file = partial(client.read_file, facts.id)
        self.write_file = partial(client.write_file, facts.id)
        self.make_directory = partial(client.make_directory, facts.id)
        self.rename_file = partial(client.rename_file, facts.id)
        self.delete_file = partial(client.delete_file, facts.id)
        self.read_archive = partial(client.read_archive, facts.id)
        self.write_archive = partial(client.write_archive, facts.id)

    def context(
        self, context_id: str | None = None, *, language: models.ContextLanguage | None = None
    ) -> "SyncOpenContext":
        """Start a context: an interpreter that stays, in which `run` keeps variables."""
        facts = self._client.create_context(self.id, context_id, language=language)
        return SyncOpenContext(self._client, facts)


class SyncOpenContext:
    """A context of a session, until `delete` or the session's end; `facts` is what the service said at its start."""

    def __init__(self, client: SyncSandboxClient, facts: models.Context) -> None:
        self.facts = facts
        self.id = facts.id
        self.run = partial(client.execute_code, facts.session_id, context_id=facts.id)
        self.read = partial(client.get_context, facts.session_id, facts.id)
        self.restart = partial(client.restart_context, facts.session_id, facts.id)
        self.delete = partial(client.delete_context, facts.session_id, facts.id)
