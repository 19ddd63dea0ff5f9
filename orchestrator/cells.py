"""Executions in a context: which requests make one, the job for the agent, and what its result means."""

import signal
from typing import Any

import msgspec

from orchestrator.errors import InvalidRequest
from orchestrator.frames import Result
from orchestrator.models import ExecutionError, ExecutionRequest

GRACE_S = 2.0  # that the agent gives a cell after its interrupt, as images/agent/context.py says
FIELDS = {"context_id", "code", "language", "timeout_s", "files"}
_display = msgspec.json.Decoder(dict[str, Any]).decode


def check(request: ExecutionRequest) -> None:
    """Refuse a cell that is more than code."""
    if request.context_id is None:
        return
    given = [
        field.name
        for field in msgspec.structs.fields(request)
        if field.name not in FIELDS and getattr(request, field.name) != _default(field)
    ]
    if given:
        raise InvalidRequest(f"In a context only `code` runs, as it stands: leave out `{given[0]}`")
    if request.code is None:
        raise InvalidRequest("In a context only `code` runs: give some")
    if request.language != "python":
        raise InvalidRequest(f"The context's language is python, not {request.language}")


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def job_of(request: ExecutionRequest, *, timeout_s: float | None, env: dict[str, str]) -> dict[str, Any]:
    """Return the job that the agent gets. The environment is the context's own from its first cell on."""
    return {"timeout_s": timeout_s, "env": env, "code": request.code, "context_id": request.context_id}


def error_of(result: Result, raised: ExecutionError | None) -> ExecutionError:
    """Return what became of a cell that did not end by itself, with where it was, when it could still tell."""
    kind = "Sandbox.Interrupted" if result.signal == signal.SIGINT else "Sandbox.ContextDied"
    return ExecutionError(type=kind, message=result.message, stack_trace=raised.stack_trace if raised else [])


def displays_of(lines: bytes | bytearray) -> list[msgspec.Raw]:
    """Return the displays of a cell. They come from the sandbox: what is no JSON object is left out."""
    found = []
    for line in bytes(lines).splitlines():
        try:
            _display(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        found.append(msgspec.Raw(line))
    return found
