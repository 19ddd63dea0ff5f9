"""The calls: one plain function builds each, with the parameters that both clients' methods take.

A call is a value: what to ask for, the type of the answer, how long it may take. A parameter that is None is left out:
the service's default holds.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar
from urllib.parse import quote

import msgspec

from orchestrator import errors, models

T = TypeVar("T")
UNSET = msgspec.UNSET
EXECUTION_TIMEOUT_S = 300.0  # what an execution gets that names no timeout, unless the service is set otherwise
CONTEXT_BOOT_S = 30.0  # what a context gets to boot, unless the service is set otherwise
Key = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,255}\Z")]


class Call(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One request and the type of its answer, `bytes` for what is no JSON. `runs_s` is how long what it starts may run.

    With a `key` the service does it once, however often it is sent. `goes_on` is a call whose answer, when it is cut
    off, can be had from there on.
    """

    method: str
    path: str
    answer: type[T]
    body: bytes | None = None
    media_type: str = "application/json"
    query: dict[str, str | int] = {}
    headers: dict[str, str] = {}
    key: str | None = None
    runs_s: float = 0.0
    goes_on: bool = False
    statuses: frozenset[int] = frozenset({200, 201, 204})


def create_session(
    session_id: str | None = None,
    *,
    template: str | None = None,
    ttl_s: float | None = None,
    idle_timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    network: models.Network | Mapping[str, Any] | None = None,
    packages: Sequence[str] | None = None,
) -> Call[models.Session]:
    """Start a session; without an id the service gives it one. `network` is what its code may reach.

    With `packages`, pip installs these first.
    """
    life = {"ttl_s": ttl_s, "idle_timeout_s": idle_timeout_s, "network": network}
    fields = {"id": session_id, "template": template, "env": env, "metadata": metadata, "packages": packages} | life
    body = body_of(models.SessionRequest, fields)
    runs_s = EXECUTION_TIMEOUT_S if packages else 0.0
    return Call(method="POST", path="/v1/sessions", answer=models.Session, body=body, runs_s=runs_s)


def get_session(session_id: str) -> Call[models.Session]:
    """Read a session. SessionNotFound or errors.SessionEnded when there is none."""
    return Call(method="GET", path=path_of(session_id), answer=models.Session)


def list_sessions(*, limit: int = 100, after: str | None = None) -> Call[models.SessionPage]:
    """List sessions in the order of their ids; `after` continues with the `next` of the page before."""
    query: dict[str, str | int] = {"limit": limit} if after is None else {"limit": limit, "after": after}
    return Call(method="GET", path="/v1/sessions", answer=models.SessionPage, query=query)


def extend_session(
    session_id: str,
    *,
    ttl_s: float | None = None,
    idle_timeout_s: float | None = None,
    metadata: Mapping[str, str] | None = None,
    network: models.Network | Mapping[str, Any] | None = None,
) -> Call[models.Session]:
    """Let a session's life count anew from now, or replace its metadata or its network."""
    fields = {"ttl_s": ttl_s, "idle_timeout_s": idle_timeout_s, "metadata": metadata, "network": network}
    return Call(
        method="PATCH", path=path_of(session_id), answer=models.Session, body=body_of(models.SessionPatch, fields)
    )


def session_network(session_id: str) -> Call[models.SessionNetwork]:
    """Read what a session may reach, what it is connected to, and what it was refused last."""
    return Call(method="GET", path=f"{path_of(session_id)}/network", answer=models.SessionNetwork)


def end_session(session_id: str) -> Call[None]:
    """End a session; what runs in it is killed."""
    return Call(method="DELETE", path=path_of(session_id), answer=type(None))


def execute_code(
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
    files: Mapping[str, str | bytes] | None = None,
    language: models.Language | None = None,
    context_id: str | None = None,
    idempotency_key: str | None = None,
) -> Call[models.Execution]:
    """Run code in a session to its end. A failing code is an `outcome`, not an exception.

    If the code defines `handler`, `value` is what it returned for `event`. `handler="module.function"` of a file in
    the workspace needs no code. With a `context_id`, the code is a cell of that context: nothing but files may go with
    it. With an `idempotency_key`, new for each execution, it is sent again when the connection is lost, and runs at most
    once: its outcome is `cancelled` where the service saw the loss first.
    """
    inputs = {"context": context, "args": args, "stdin": stdin, "env": env, "files": files_of(files)}
    fields = {"code": code, "handler": handler, "language": language, "timeout_s": timeout_s} | inputs
    fields["context_id"] = context_id
    path = path_of(session_id, "executions")
    return execution_of(path, models.ExecutionRequest, fields, event=event, key=idempotency_key)


def execute_command(
    session_id: str,
    command: str | Sequence[str],
    *,
    timeout_s: float | None = None,
    args: Sequence[str] | None = None,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    idempotency_key: str | None = None,
) -> Call[models.Execution]:
    """Run a command in a session to its end: a line for bash, or a list of words.

    `idempotency_key` is that of `execute_code`.
    """
    fields = {
        "command": command,
        "timeout_s": timeout_s,
        "args": args,
        "stdin": stdin,
        "env": env,
        "files": files_of(files),
    }
    return execution_of(path_of(session_id, "executions"), models.ExecutionRequest, fields, key=idempotency_key)


def install_packages(
    session_id: str,
    packages: Sequence[str],
    *,
    timeout_s: float | None = None,
    idempotency_key: str | None = None,
) -> Call[models.Execution]:
    """Install Python packages for all further executions of a session; the execution of pip tells how it went.

    A package is a name with versions, such as "requests==2.*". `idempotency_key` is that of `execute_code`.
    """
    fields = {"packages": packages, "timeout_s": timeout_s}
    return execution_of(path_of(session_id, "packages"), models.PackagesRequest, fields, key=idempotency_key)


def execute(
    code: str | None = None,
    *,
    command: str | Sequence[str] | None = None,
    event: Any = UNSET,
    timeout_s: float | None = None,
    handler: str | None = None,
    context: Mapping[str, Any] | None = None,
    args: Sequence[str] | None = None,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    language: models.Language | None = None,
    template: str | None = None,
    network: models.Network | Mapping[str, Any] | None = None,
) -> Call[models.Execution]:
    """Run code or a command once, in a fresh container that is gone afterwards."""
    inputs = {"context": context, "args": args, "stdin": stdin, "env": env, "files": files_of(files)}
    what = {"code": code, "command": command, "handler": handler}
    chosen = {"language": language, "template": template, "timeout_s": timeout_s, "network": network}
    return execution_of("/v1/execute", models.OneShotRequest, what | chosen | inputs, event=event)


def list_executions(session_id: str, *, limit: int = 100, after: str | None = None) -> Call[models.ExecutionPage]:
    """List the executions that a session remembers, oldest first; `after` continues with a page's `next`."""
    query: dict[str, str | int] = {"limit": limit} if after is None else {"limit": limit, "after": after}
    return Call(method="GET", path=path_of(session_id, "executions"), answer=models.ExecutionPage, query=query)


def get_execution(session_id: str, execution_id: str) -> Call[models.Execution]:
    """Read an execution; its `outcome` is None while it runs."""
    return Call(method="GET", path=path_of(session_id, "executions", execution_id), answer=models.Execution)


def cancel(session_id: str, execution_id: str) -> Call[None]:
    """Kill an execution; one that has ended is left alone."""
    return Call(method="DELETE", path=path_of(session_id, "executions", execution_id), answer=type(None))


def list_files(
    session_id: str, path: str = "", *, recursive: bool = False, limit: int = 1000, after: str | None = None
) -> Call[models.FilePage]:
    """List a directory of a session's workspace in the order of the paths; `after` continues with a page's `next`."""
    query: dict[str, str | int] = {"path": path, "recursive": str(recursive).lower(), "limit": limit}
    query |= {} if after is None else {"after": after}
    return Call(method="GET", path=path_of(session_id, "files"), answer=models.FilePage, query=query)


def read_file(session_id: str, path: str) -> Call[bytes]:
    """Read a file of the workspace. errors.FileNotFound, or FileConflict for what is no plain file."""
    return Call(method="GET", path=file_path_of(session_id, path), answer=bytes)


def write_file(session_id: str, path: str, content: bytes | str) -> Call[models.File]:
    """Write a file of the workspace, and make the directories above it; one that is there already is replaced."""
    body = content.encode() if isinstance(content, str) else bytes(content)
    return Call(
        method="PUT",
        path=file_path_of(session_id, path),
        answer=models.File,
        body=body,
        media_type="application/octet-stream",
    )


def make_directory(session_id: str, path: str) -> Call[models.File]:
    """Make a directory of the workspace, and those above it."""
    body = body_of(models.NewDirectory, {"type": "directory"})
    return Call(method="POST", path=file_path_of(session_id, path), answer=models.File, body=body)


def rename_file(session_id: str, path: str, new_path: str, *, overwrite: bool = False) -> Call[models.File]:
    """Move a file or directory of the workspace; what is at the new path is replaced only with `overwrite`."""
    body = body_of(models.Move, {"path": new_path, "overwrite": overwrite})
    return Call(method="PATCH", path=file_path_of(session_id, path), answer=models.File, body=body)


def delete_file(session_id: str, path: str, *, recursive: bool = False) -> Call[None]:
    """Delete a file or directory of the workspace; one that is not empty only with `recursive`."""
    query: dict[str, str | int] = {"recursive": str(recursive).lower()}
    return Call(method="DELETE", path=file_path_of(session_id, path), answer=type(None), query=query)


def read_archive(session_id: str, path: str = "") -> Call[bytes]:
    """Read a directory of the workspace as a tar."""
    return Call(method="GET", path=path_of(session_id, "archive"), answer=bytes, query={"path": path})


def write_archive(session_id: str, archive: bytes, *, path: str = "") -> Call[models.Unpacked]:
    """Unpack a tar, plain or compressed, below a directory of the workspace: all of it, or nothing."""
    return Call(
        method="POST",
        path=path_of(session_id, "archive"),
        answer=models.Unpacked,
        body=archive,
        media_type="application/x-tar",
        query={"path": path},
    )


def create_context(
    session_id: str, context_id: str | None = None, *, language: models.ContextLanguage | None = None
) -> Call[models.Context]:
    """Start a context: an interpreter of the session that stays, whose executions share variables."""
    body = body_of(models.ContextRequest, {"id": context_id, "language": language})
    path = path_of(session_id, "contexts")
    return Call(method="POST", path=path, answer=models.Context, body=body, runs_s=CONTEXT_BOOT_S)


def list_contexts(session_id: str) -> Call[models.ContextPage]:
    """List the contexts of a session, oldest first."""
    return Call(method="GET", path=path_of(session_id, "contexts"), answer=models.ContextPage)


def get_context(session_id: str, context_id: str) -> Call[models.Context]:
    """Read a context."""
    return Call(method="GET", path=path_of(session_id, "contexts", context_id), answer=models.Context)


def restart_context(session_id: str, context_id: str) -> Call[models.Context]:
    """Give a context a fresh interpreter; its executions that run or wait are cancelled."""
    path = path_of(session_id, "contexts", context_id, "restart")
    return Call(method="POST", path=path, answer=models.Context, runs_s=CONTEXT_BOOT_S)


def delete_context(session_id: str, context_id: str) -> Call[None]:
    """Delete a context; its executions that run or wait are cancelled."""
    return Call(method="DELETE", path=path_of(session_id, "contexts", context_id), answer=type(None))


def templates() -> Call[models.TemplatePage]:
    """List what containers can be started from; the first is the default."""
    return Call(method="GET", path="/v1/templates", answer=models.TemplatePage)


def pool() -> Call[models.PoolPage]:
    """Read how many containers are ready, starting and waited for."""
    return Call(method="GET", path="/v1/pool", answer=models.PoolPage)


def isolation() -> Call[models.Isolation]:
    """Read which layers of isolation the newest container's self-test observed active."""
    return Call(method="GET", path="/v1/isolation", answer=models.Isolation)


def health() -> Call[models.Health]:
    """Read whether the service lives."""
    return Call(method="GET", path="/health", answer=models.Health)


def ready() -> Call[models.Readiness]:
    """Read whether the service accepts sessions, and why not."""
    return Call(method="GET", path="/ready", answer=models.Readiness, statuses=frozenset({200, 503}))


def execution_of(
    path: str,
    kind: type[models.ExecutionRequest] | type[models.PackagesRequest],
    fields: dict[str, Any],
    *,
    event: Any = UNSET,
    key: str | None = None,
) -> Call[models.Execution]:
    """Return the call of an execution, which is waited for."""
    try:
        msgspec.convert(key, Key | None)
    except msgspec.ValidationError:
        raise errors.InvalidRequest("An idempotency_key is 1 to 255 ASCII characters without spaces") from None
    timeout_s = fields["timeout_s"]
    runs_s = EXECUTION_TIMEOUT_S if timeout_s is None else timeout_s
    body = body_of(kind, fields, event=event)
    return Call(method="POST", path=path, answer=models.Execution, body=body, key=key, runs_s=runs_s)


def body_of(kind: type[msgspec.Struct], fields: dict[str, Any], *, event: Any = UNSET) -> bytes:
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


def files_of(files: Mapping[str, str | bytes] | None) -> dict[str, Any] | None:
    """Return files as they travel in JSON: text as it is, bytes in base64."""
    if files is None:
        return None
    return {path: what if isinstance(what, str) else {"base64": what} for path, what in files.items()}


def path_of(session_id: str, *rest: str) -> str:
    """Return the path of a session, or of something of it; InvalidRequest for what cannot be an id."""
    try:
        ids = msgspec.convert([session_id, *rest], list[models.Id])
    except msgspec.ValidationError as error:
        raise errors.InvalidRequest(f"{session_id!r} is no id: {error}") from None
    return "/".join(["/v1/sessions", *ids])


def file_path_of(session_id: str, path: str) -> str:
    """Return the path of a file of a session."""
    return f"{path_of(session_id, 'files')}/{quote(path, safe='/')}"
