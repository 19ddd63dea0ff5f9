"""The calls of executions that are waited for, and about those that a session remembers."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator import models
from orchestrator.calls.call import UNSET, Call, execution_of, files_of, page_of, path_of


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
    return Call(
        method="GET", path=path_of(session_id, "executions"), answer=models.ExecutionPage, query=page_of(limit, after)
    )


def get_execution(session_id: str, execution_id: str) -> Call[models.Execution]:
    """Read an execution; its `outcome` is None while it runs."""
    return Call(method="GET", path=path_of(session_id, "executions", execution_id), answer=models.Execution)


def cancel(session_id: str, execution_id: str) -> Call[None]:
    """Kill an execution; one that has ended is left alone."""
    return Call(method="DELETE", path=path_of(session_id, "executions", execution_id), answer=type(None))
