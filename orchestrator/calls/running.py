"""The calls about executions that are not waited for: begin one, follow its events, feed it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from typing import Any, ParamSpec

import msgspec

from orchestrator import models
from orchestrator.calls.call import UNSET, Call, body_of, execution_of, files_of, path_of

P = ParamSpec("P")
Streams = Callable[[Call[models.Execution]], Call[models.Event]]
SILENCE_S = 60.0  # between two signs of life of a stream, beyond the client's patience; the service gives one in 10 s


def start(
    session_id: str,
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
    background: bool = False,
    stdin_open: bool = False,
    idempotency_key: str | None = None,
) -> Call[models.Execution]:
    """Begin code or a command in a session and do not wait for it: its `outcome` is None.

    In the `background` it may run beside the others, as long as the session. With `stdin_open` there is `send_stdin`.
    """
    what = {"code": code, "command": command, "handler": handler, "language": language, "timeout_s": timeout_s}
    inputs = {"context": context, "args": args, "stdin": stdin, "env": env, "files": files_of(files)}
    how = {"background": background, "stdin_open": stdin_open}
    path = path_of(session_id, "executions")
    call = execution_of(path, models.ExecutionRequest, what | inputs | how, event=event, key=idempotency_key)
    return msgspec.structs.replace(
        call,
        headers={"Prefer": "respond-async"},
        runs_s=0.0,
        statuses=call.statuses | {202},
        goes_on=background or idempotency_key is not None,
    )


def _beginning(build: Callable[P, Call[models.Execution]]) -> Callable[[Streams], Callable[P, Call[models.Event]]]:
    """Make of a function that turns one call into another a function with all parameters of what builds the first."""

    def decorate(turn: Streams) -> Callable[P, Call[models.Event]]:
        def turned(*args: P.args, **kwargs: P.kwargs) -> Call[models.Event]:
            return turn(build(*args, **kwargs))

        update_wrapper(turned, turn)
        answer = inspect.signature(turn).return_annotation
        turned.__signature__ = inspect.signature(build).replace(return_annotation=answer)  # type: ignore[attr-defined]
        return turned

    return decorate


@_beginning(start)
def stream(begun: Call[models.Execution]) -> Call[models.Event]:
    """Run code or a command in a session, and yield its events as they happen; the last one is `done`.

    Who closes the iterator before, cancels it, unless it has an `idempotency_key` or runs in the `background`: then
    it also outlives a lost connection, and its events go on where they were cut off.
    """
    return Call(
        method="POST",
        path=begun.path,
        answer=models.Event,
        body=begun.body,
        headers={"Accept": "text/event-stream"},
        key=begun.key,
        runs_s=SILENCE_S,
        goes_on=begun.goes_on,
    )


def events(session_id: str, execution_id: str, *, last_event_id: int | None = None) -> Call[models.Event]:
    """Yield the events of an execution that runs or has ended: all, or those behind the last one that arrived."""
    path = path_of(session_id, "executions", execution_id, "events")
    headers = {} if last_event_id is None else {"Last-Event-ID": str(last_event_id)}
    return Call(method="GET", path=path, answer=models.Event, headers=headers, runs_s=SILENCE_S, goes_on=True)


def send_stdin(session_id: str, execution_id: str, text: str = "", *, close: bool = False) -> Call[None]:
    """Send text to an execution that was begun with `stdin_open`, and perhaps close its stdin behind it.

    errors.StdinClosed when it takes none; TooManyRequests when what it was sent before is not read in time.
    """
    body = body_of(models.StdinRequest, {"text": text, "close": close})
    path = path_of(session_id, "executions", execution_id, "stdin")
    return Call(method="POST", path=path, answer=type(None), body=body)
