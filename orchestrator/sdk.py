"""The client: `SandboxClient` for asyncio and `SyncSandboxClient` for the rest, with typed results and one tree of errors.

A call is first a value (`_Call`: method, path, body, type of the answer), built by one plain function. The two clients
only send calls: `_awaited` and `_blocking` make methods of these functions, with their parameters.
"""

import asyncio
import inspect
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from functools import cached_property, partial
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, get_args
from urllib.parse import urlsplit

import httpx
import msgspec

from orchestrator import errors, models

__all__ = ["OpenSession", "SandboxClient", "SyncOpenSession", "SyncSandboxClient"]

T = TypeVar("T")
P = ParamSpec("P")
UNSET = msgspec.UNSET
DEFAULT_URL = "http://localhost:8000"
EXECUTION_TIMEOUT_S = 300.0  # what an execution gets that names no timeout, unless the service is set otherwise
CONNECT_S = 5.0
IDLE_CONNECTION_S = 5.0  # shorter than the service's own, so that none is reused while the service closes it
FIRST_PAUSE_S = 0.1
REFUSED = {errors.TooManyRequests.status, errors.Unavailable.status}  # nothing was done, and later it may be
OF_STATUS = {kind.status: kind for kind in (errors.Unauthorized, errors.TooManyRequests, errors.Unavailable)}


class _Call(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One request and the type of its answer. `runs_s` is how long what it starts may run."""

    method: str
    path: str
    answer: type[T]
    body: bytes | None = None
    query: dict[str, str | int] = {}
    runs_s: float = 0.0
    statuses: frozenset[int] = frozenset({200, 201, 204})


# The calls. A parameter that is None is left out: the service's default holds.


def _create_session(
    session_id: str | None = None,
    *,
    template: str | None = None,
    ttl_s: float | None = None,
    idle_timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> _Call[models.Session]:
    """Start a session; without an id the service gives it one."""
    fields = {
        "id": session_id,
        "template": template,
        "ttl_s": ttl_s,
        "idle_timeout_s": idle_timeout_s,
        "env": env,
        "metadata": metadata,
    }
    return _Call(method="POST", path="/v1/sessions", answer=models.Session, body=_body(models.SessionRequest, fields))


def _get_session(session_id: str) -> _Call[models.Session]:
    """Read a session. SessionNotFound or errors.SessionEnded when there is none."""
    return _Call(method="GET", path=_path(session_id), answer=models.Session)


def _list_sessions(*, limit: int = 100, after: str | None = None) -> _Call[models.SessionPage]:
    """List sessions in the order of their ids; `after` continues with the `next` of the page before."""
    query: dict[str, str | int] = {"limit": limit} if after is None else {"limit": limit, "after": after}
    return _Call(method="GET", path="/v1/sessions", answer=models.SessionPage, query=query)


def _extend_session(
    session_id: str,
    *,
    ttl_s: float | None = None,
    idle_timeout_s: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> _Call[models.Session]:
    """Let a session's life count anew from now, or replace its metadata."""
    fields = {"ttl_s": ttl_s, "idle_timeout_s": idle_timeout_s, "metadata": metadata}
    return _Call(method="PATCH", path=_path(session_id), answer=models.Session, body=_body(models.SessionPatch, fields))


def _end_session(session_id: str) -> _Call[None]:
    """End a session; what runs in it is killed."""
    return _Call(method="DELETE", path=_path(session_id), answer=type(None))


def _execute_code(
    session_id: str,
    code: str | None = None,
    *,
    event: Any = UNSET,
    timeout_s: float | None = None,
    handler: str | None = None,
    context: Mapping[str, Any] | None = None,
    args: Sequence[str] | None = None,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    language: models.Language | None = None,
) -> _Call[models.Execution]:
    """Run code in a session to its end. A failing code is an `outcome`, not an exception.

    If the code defines `handler`, `value` is what it returned for `event`. `handler="module.function"` of a file in
    the workspace needs no code.
    """
    fields = {
        "code": code,
        "timeout_s": timeout_s,
        "handler": handler,
        "context": context,
        "args": args,
        "stdin": stdin,
        "env": env,
        "language": language,
    }
    return _execution(_path(session_id, "executions"), models.ExecutionRequest, fields, event=event)


def _execute_command(
    session_id: str,
    command: str | Sequence[str],
    *,
    timeout_s: float | None = None,
    args: Sequence[str] | None = None,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
) -> _Call[models.Execution]:
    """Run a command in a session to its end: a line for bash, or a list of words."""
    fields = {"command": command, "timeout_s": timeout_s, "args": args, "stdin": stdin, "env": env}
    return _execution(_path(session_id, "executions"), models.ExecutionRequest, fields)


def _execute(
    code: str | None = None,
    *,
    command: str | Sequence[str] | None = None,
    event: Any = UNSET,
    timeout_s: float | None = None,
    context: Mapping[str, Any] | None = None,
    args: Sequence[str] | None = None,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    language: models.Language | None = None,
    template: str | None = None,
) -> _Call[models.Execution]:
    """Run code or a command once, in a fresh container that is gone afterwards."""
    fields = {
        "code": code,
        "command": command,
        "timeout_s": timeout_s,
        "context": context,
        "args": args,
        "stdin": stdin,
        "env": env,
        "language": language,
        "template": template,
    }
    return _execution("/v1/execute", models.OneShotRequest, fields, event=event)


def _list_executions(session_id: str) -> _Call[models.ExecutionPage]:
    """List the executions that a session remembers, oldest first."""
    return _Call(method="GET", path=_path(session_id, "executions"), answer=models.ExecutionPage)


def _get_execution(session_id: str, execution_id: str) -> _Call[models.Execution]:
    """Read an execution; its `outcome` is None while it runs."""
    return _Call(method="GET", path=_path(session_id, "executions", execution_id), answer=models.Execution)


def _cancel(session_id: str, execution_id: str) -> _Call[None]:
    """Kill an execution; one that has ended is left alone."""
    return _Call(method="DELETE", path=_path(session_id, "executions", execution_id), answer=type(None))


def _templates() -> _Call[models.TemplatePage]:
    """List what containers can be started from; the first is the default."""
    return _Call(method="GET", path="/v1/templates", answer=models.TemplatePage)


def _pool() -> _Call[models.PoolPage]:
    """Read how many containers are ready, starting and waited for."""
    return _Call(method="GET", path="/v1/pool", answer=models.PoolPage)


def _isolation() -> _Call[models.Isolation]:
    """Read which layers of isolation the newest container's self-test observed active."""
    return _Call(method="GET", path="/v1/isolation", answer=models.Isolation)


def _health() -> _Call[models.Health]:
    """Read whether the service lives."""
    return _Call(method="GET", path="/health", answer=models.Health)


def _ready() -> _Call[models.Readiness]:
    """Read whether the service accepts sessions, and why not."""
    return _Call(method="GET", path="/ready", answer=models.Readiness, statuses=frozenset({200, 503}))


def _execution(
    path: str, kind: type[models.ExecutionRequest], fields: dict[str, Any], *, event: Any = UNSET
) -> _Call[models.Execution]:
    timeout_s = fields["timeout_s"]
    runs_s = EXECUTION_TIMEOUT_S if timeout_s is None else timeout_s
    return _Call(
        method="POST",
        path=path,
        answer=models.Execution,
        body=_body(kind, fields, event=event),
        runs_s=runs_s,
    )


def _body(kind: type[msgspec.Struct], fields: dict[str, Any], *, event: Any = UNSET) -> bytes:
    """Return what was given as JSON; InvalidRequest, before anything is sent, for what the service would refuse."""
    given = {name: value for name, value in fields.items() if value is not None}
    if event is not UNSET:
        given["event"] = event
    try:
        msgspec.convert(given, kind)
        return json.dumps(msgspec.to_builtins(given), allow_nan=False).encode()
    except msgspec.ValidationError as error:
        raise errors.InvalidRequest(str(error)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.InvalidRequest(f"JSON cannot carry what was given: {error}") from None


def _path(session_id: str, *rest: str) -> str:
    try:
        ids = msgspec.convert([session_id, *rest], list[models.Id])
    except msgspec.ValidationError as error:
        raise errors.InvalidRequest(f"{session_id!r} is no id: {error}") from None
    return "/".join(["/v1/sessions", *ids])


class _Tries:
    """The tries of one call: only what certainly was not done is tried again, and not for ever."""

    def __init__(self, most: int, retry_for_s: float) -> None:
        self._left = most
        self._until = time.monotonic() + retry_for_s
        self._pause_s = FIRST_PAUSE_S

    def pause_after(self, error: errors.SandboxError) -> float | None:
        """Return how long to wait before the next try, in seconds; None when there is none."""
        if isinstance(error, errors.ConnectionFailed):
            pause_s, self._pause_s = self._pause_s, 2 * self._pause_s
        elif error.status in REFUSED and error.retry_after_s is not None:
            pause_s = error.retry_after_s
        else:
            return None
        pause_s *= random.uniform(1.0, 1.5)  # noqa: S311 - jitter, no secret
        self._left -= 1
        return pause_s if self._left > 0 and time.monotonic() + pause_s < self._until else None


class _Client:
    """Where the service is, and how patient the client is.

    `base_url` is SANDBOX_URL or http://localhost:8000 unless given, `api_key` SANDBOX_API_KEY. `patience_s` is how long
    an answer may take, beyond the timeout of the execution that it is for. A call that was certainly not served (no
    connection, or an answer 429 or 503 that says when to come again) is made up to `tries` times within `retry_for_s`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        patience_s: float = 60.0,
        tries: int = 4,
        retry_for_s: float = 30.0,
    ) -> None:
        self.base_url = base_url or os.environ.get("SANDBOX_URL") or DEFAULT_URL
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise errors.InvalidRequest(f"base_url is no address of a service: write it like {DEFAULT_URL}")
        self._shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # without a password
        self._is_local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._api_key = api_key or os.environ.get("SANDBOX_API_KEY")
        self._patience_s = patience_s
        self._tries = tries
        self._retry_for_s = retry_for_s

    def _new_tries(self) -> _Tries:
        return _Tries(self._tries, self._retry_for_s)

    def _options(self) -> dict[str, Any]:
        return {
            "base_url": self.base_url,
            "headers": {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            "limits": httpx.Limits(keepalive_expiry=IDLE_CONNECTION_S),
            "verify": not (self._is_local and self.base_url.startswith("http:")),  # no TLS: spare 40 ms of certificates
            "trust_env": not self._is_local,  # a proxy for the world does not reach this machine's loopback
        }

    def _arguments(self, call: _Call[Any]) -> dict[str, Any]:
        wait_s = call.runs_s + self._patience_s
        return {
            "method": call.method,
            "url": call.path,
            "content": call.body,
            "params": call.query,
            "headers": {} if call.body is None else {"Content-Type": "application/json"},
            "timeout": httpx.Timeout(self._patience_s, connect=CONNECT_S, read=wait_s, pool=None),
        }

    def _failure(self, call: _Call[Any], error: httpx.HTTPError) -> errors.NoAnswer:
        what = f"{call.method} {call.path}"
        why = str(error) or type(error).__name__
        match error:
            case httpx.ConnectError() | httpx.ConnectTimeout():
                return errors.ConnectionFailed(
                    f"{self._shown} cannot be reached ({why}): is the service running there?"
                )
            case httpx.ReadTimeout():
                wait_s = call.runs_s + self._patience_s
                return errors.NoAnswer(
                    f"{self._shown} did not answer {what} within {wait_s:g} s: it may still be at it"
                )
            case _:
                return errors.NoAnswer(f"{self._shown} did not answer {what} ({why}): whether it was served is unknown")

    def _read(self, call: _Call[T], response: httpx.Response) -> T:
        """Return the answer as what it stands for; the error of a problem document is raised."""
        if response.status_code not in call.statuses:
            raise self._refusal(call, response)
        try:
            return msgspec.json.decode(response.content or b"null", type=call.answer)
        except msgspec.DecodeError as error:
            raise self._foreign(call, response) from error

    def _refusal(self, call: _Call[Any], response: httpx.Response) -> errors.SandboxError:
        try:
            return errors.from_problem(msgspec.json.decode(response.content, type=errors.Problem))
        except msgspec.DecodeError:
            return self._foreign(call, response)

    def _foreign(self, call: _Call[Any], response: httpx.Response) -> errors.SandboxError:
        """Something in between answered, or base_url is another service's."""
        kind = OF_STATUS.get(response.status_code, errors.NoAnswer)
        media_type = response.headers.get("Content-Type", "nothing")
        retry_after = response.headers.get("Retry-After", "")
        return kind(
            f"{self._shown} answered {call.method} {call.path} with {response.status_code} and {media_type}, "
            "as this service does not: check the address, and what stands between",
            retry_after_s=int(retry_after) if retry_after.isdecimal() else None,
        )


def _as_method(method: Callable[..., Any], build: Callable[..., _Call[Any]], name: str | None = None) -> None:
    """Give a method the name, help, parameters and answer of the function that builds its call."""
    method.__name__ = name or build.__name__.removeprefix("_")
    method.__doc__ = build.__doc__
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(build)
    (answer,) = get_args(signature.return_annotation)
    parameters = [own, *signature.parameters.values()]
    method.__signature__ = signature.replace(parameters=parameters, return_annotation=answer)  # type: ignore[attr-defined]


def _awaited(
    build: Callable[P, _Call[T]],
) -> Callable[Concatenate["SandboxClient", P], Coroutine[Any, Any, T]]:
    async def method(self: "SandboxClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._send(build(*args, **kwargs))

    _as_method(method, build)
    return method


def _awaited_life(
    build: Callable[P, _Call[models.Session]],
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


class SandboxClient(_Client):
    """A client for asyncio. It may be used without `async with`; `aclose` then lets go of its connections."""

    create_session = _awaited(_create_session)
    get_session = _awaited(_get_session)
    list_sessions = _awaited(_list_sessions)
    extend_session = _awaited(_extend_session)
    end_session = _awaited(_end_session)
    session = _awaited_life(_create_session)
    execute_code = _awaited(_execute_code)
    execute_command = _awaited(_execute_command)
    execute = _awaited(_execute)
    list_executions = _awaited(_list_executions)
    get_execution = _awaited(_get_execution)
    cancel = _awaited(_cancel)
    templates = _awaited(_templates)
    pool = _awaited(_pool)
    isolation = _awaited(_isolation)
    health = _awaited(_health)
    ready = _awaited(_ready)

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

    async def _send(self, call: _Call[T]) -> T:
        tries = self._new_tries()
        while True:
            try:
                return self._read(call, await self._exchange(call))
            except errors.SandboxError as error:
                pause_s = tries.pause_after(error)
                if pause_s is None:
                    raise
            await asyncio.sleep(pause_s)

    async def _exchange(self, call: _Call[Any]) -> httpx.Response:
        try:
            return await self._http.request(**self._arguments(call))
        except httpx.HTTPError as error:
            raise self._failure(call, error) from error


class OpenSession:
    """A session for the time of `async with client.session()`; `facts` is what the service said at its start."""

    def __init__(self, client: SandboxClient, facts: models.Session) -> None:
        self.facts = facts
        self.id = facts.id
        self.run = partial(client.execute_code, facts.id)
        self.command = partial(client.execute_command, facts.id)
        self.extend = partial(client.extend_session, facts.id)
        self.cancel = partial(client.cancel, facts.id)


def _blocking(build: Callable[P, _Call[T]]) -> Callable[Concatenate["SyncSandboxClient", P], T]:
    def method(self: "SyncSandboxClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._send(build(*args, **kwargs))

    _as_method(method, build)
    return method


def _blocking_life(
    build: Callable[P, _Call[models.Session]],
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


class SyncSandboxClient(_Client):
    """A client for code without asyncio; threads may share it. `close` lets go of its connections."""

    create_session = _blocking(_create_session)
    get_session = _blocking(_get_session)
    list_sessions = _blocking(_list_sessions)
    extend_session = _blocking(_extend_session)
    end_session = _blocking(_end_session)
    session = _blocking_life(_create_session)
    execute_code = _blocking(_execute_code)
    execute_command = _blocking(_execute_command)
    execute = _blocking(_execute)
    list_executions = _blocking(_list_executions)
    get_execution = _blocking(_get_execution)
    cancel = _blocking(_cancel)
    templates = _blocking(_templates)
    pool = _blocking(_pool)
    isolation = _blocking(_isolation)
    health = _blocking(_health)
    ready = _blocking(_ready)

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

    def _send(self, call: _Call[T]) -> T:
        tries = self._new_tries()
        while True:
            try:
                return self._read(call, self._exchange(call))
            except errors.SandboxError as error:
                pause_s = tries.pause_after(error)
                if pause_s is None:
                    raise
            time.sleep(pause_s)

    def _exchange(self, call: _Call[Any]) -> httpx.Response:
        try:
            return self._http.request(**self._arguments(call))
        except httpx.HTTPError as error:
            raise self._failure(call, error) from error


class SyncOpenSession:
    """A session for the time of `with client.session()`; `facts` is what the service said at its start."""

    def __init__(self, client: SyncSandboxClient, facts: models.Session) -> None:
        self.facts = facts
        self.id = facts.id
        self.run = partial(client.execute_code, facts.id)
        self.command = partial(client.execute_command, facts.id)
        self.extend = partial(client.extend_session, facts.id)
        self.cancel = partial(client.cancel, facts.id)
