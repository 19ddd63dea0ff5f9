"""A client's place in the events of an execution."""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import httpx
import msgspec

from orchestrator import errors, models
from orchestrator.calls.call import Call
from orchestrator.calls.running import events
from orchestrator.exchange import Tries

KINDS = frozenset(get_args(models.EventKind))


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
