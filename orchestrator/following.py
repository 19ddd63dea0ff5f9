"""The calls about executions that are not waited for, and a client's place in the events of one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import httpx
import msgspec

from orchestrator import errors, models
from orchestrator.calls import UNSET, Call, body_of, execution_of, files_of, path_of
from orchestrator.exchange import Tries

SILENCE_S = 60.0  # between two signs of life of a stream, beyond the client's patience; the service gives one in 10 s
KINDS = frozenset(get_args(models.EventKind))


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
        call, headers={"Prefer": "respond-async"}, runs_s=0.0, statuses=call.statuses | {202}
    )


def stream(
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
) -> Call[models.Event]:
    """Run code or a command in a session, and yield its events as they happen; the last one is `done`.

    Who closes the iterator before, cancels it, unless it has an `idempotency_key` or runs in the `background`: then
    it also outlives a lost connection, and its events go on where they were cut off.
    """
    begun = start(
        session_id,
        code,
        command=command,
        event=event,
        timeout_s=timeout_s,
        handler=handler,
        context=context,
        args=args,
        stdin=stdin,
        env=env,
        files=files,
        language=language,
        background=background,
        stdin_open=stdin_open,
        idempotency_key=idempotency_key,
    )
    return Call(
        method="POST",
        path=begun.path,
        answer=models.Event,
        body=begun.body,
        headers={"Accept": "text/event-stream"},
        key=idempotency_key,
        runs_s=SILENCE_S,
        goes_on=background or idempotency_key is not None,
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


class Place:
    """Where a client is in the events of an execution. `call` is what to send to go on from there."""

    def __init__(self, call: Call[models.Event], new_tries: Callable[[Call[Any]], Tries]) -> None:
        self.call = call
        self.ended = False
        self._new_tries = new_tries
        self._tries = new_tries(call)
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[models.Event]:
        """Yield the events that these bytes complete."""
        whole, _, self._rest = (self._rest + data).rpartition(b"\n\n")
        for event in parsed(whole):
            self._move(event)
            yield event

    def check(self) -> None:
        """Tell what the end of a stream means: NoAnswer when it came before that of the execution."""
        self._rest = b""
        if not self.ended:
            lost = httpx.RemoteProtocolError("the stream ended early")
            raise errors.NoAnswer("The events were cut off: ask for those behind the last one that came") from lost

    def pause_after(self, error: errors.SandboxError) -> float | None:
        """Return how long to wait before going on, in seconds; None when that makes no sense."""
        self._rest = b""
        return self._tries.pause_after(error)

    def _move(self, event: models.Event) -> None:
        self.ended = event.kind == "done"
        if not self.call.goes_on:
            return
        if event.execution is not None:
            at = event.execution
            self.call = events(at.session_id, at.id, last_event_id=event.id)
        else:
            self.call = msgspec.structs.replace(self.call, headers={"Last-Event-ID": str(event.id)})
        self._tries = self._new_tries(self.call)


def parsed(data: bytes) -> Iterator[models.Event]:
    """Yield the events that a stream's bytes hold, which are whole. NoAnswer for one that makes no sense."""
    for block in data.split(b"\n\n"):
        if (event := _event_of(block)) is not None:
            yield event


def _event_of(block: bytes) -> models.Event | None:
    """Return the event of a block of lines; None for a comment, and for a kind that is newer than this client."""
    fields = {}
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        fields[name] = value.removeprefix(b" ")
    kind = fields.get(b"event", b"").decode()
    if kind not in KINDS:
        return None
    try:
        number, data = int(fields[b"id"]), fields[b"data"]
        known: dict[str, Any] = {"id": number, "kind": kind}
        match kind:
            case "stdout" | "stderr":
                known["text"] = msgspec.json.decode(data, type=models.EventText).text
            case "display":
                known["item"] = msgspec.json.decode(data, type=dict[str, Any])
            case "artifact":
                known["artifact"] = msgspec.json.decode(data, type=models.Artifact)
            case _:
                known["execution"] = msgspec.json.decode(data, type=models.Execution)
        return models.Event(**known)
    except (KeyError, ValueError) as error:
        raise errors.NoAnswer(f"An event came that this client does not understand: {error}") from None
