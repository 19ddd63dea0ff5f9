"""The events of an execution as they happen: the response that streams them, and the route that resumes it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from litestar import Request, Response, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIType, Operation, Schema
from litestar.params import Parameter
from litestar.response.base import ASGIResponse
from litestar.status_codes import HTTP_204_NO_CONTENT
from litestar.types import Receive, Send

from orchestrator.api.paths import Eid, Sid
from orchestrator.events import NEVER, Reader
from orchestrator.executions import Record
from orchestrator.service import Orchestrator

EVENT_STREAM = "text/event-stream"
EVENTS_ABOUT = (
    "Server-sent events: `started` (number 0), `stdout` and `stderr` (`{text}`), `display`, `artifact`, and `done` with "
    "the whole execution; `id` is the number. A comment line comes when nothing else does."
)
HEARTBEAT = b":\n\n"
HEADERS = {"X-Accel-Buffering": "no"}  # proxies are not to hold events back
LastEventId = Annotated[
    int | None,
    Parameter(header="Last-Event-ID", ge=0, description="number of the last event that arrived; go on behind it"),
]
LastEventIdQuery = Annotated[
    int | None, Parameter(query="last_event_id", ge=0, description="the same, where the header cannot be set")
]


@dataclass  # so that its `__post_init__` is called
class StreamsEvents(Operation):
    """An operation that may answer with events."""

    def __post_init__(self) -> None:
        answer: Any = (self.responses or {})["200"]
        schema = Schema(type=OpenAPIType.STRING, description=EVENTS_ABOUT)
        answer.content = (answer.content or {}) | {EVENT_STREAM: OpenAPIMediaType(schema=schema)}


class EventStream(Response[Any]):
    """The events of one reader, until its execution or its client ends. `on_gone` is called when the client went first."""

    def __init__(
        self,
        service: Orchestrator,
        reader: Reader,
        *,
        first: bytes,
        on_gone: Callable[[], None],
        headers: dict[str, str],
    ) -> None:
        super().__init__(None, headers=HEADERS | headers, media_type=EVENT_STREAM)
        self._service = service
        self._reader = reader
        self._first = first
        self._on_gone = on_gone

    def to_asgi_response(self, *_: Any, **_options: Any) -> ASGIResponse:
        return _Sending(self)

    async def send(self, receive: Receive, send: Send) -> None:
        """Send what is due when it is due. A client that reads slowly is waited for: `send` returns when there is room."""
        reader = self._reader
        gone = asyncio.create_task(_disconnect(receive))
        gone.add_done_callback(lambda _: reader.woken.set())
        heartbeat_s = self._service.settings.stream_heartbeat_seconds
        try:
            events = self._first
            while not gone.done():
                if events:
                    await send({"type": "http.response.body", "body": events, "more_body": not reader.ended})
                    await asyncio.sleep(0)  # a client that always has room is not the only one
                elif reader.ended:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                if reader.ended:
                    return
                if not events and not await _happens(reader.woken, within_s=heartbeat_s):
                    await send({"type": "http.response.body", "body": HEARTBEAT, "more_body": True})
                events = reader.take()
        finally:
            gone.cancel()
            self.close()
            if not reader.ended:
                self._on_gone()

    def close(self) -> None:
        """Let go of the reader and its place."""
        self._reader.close()
        self._service.streams.close(self._reader.record.facts.session_id)


class _Sending(ASGIResponse):
    _should_set_content_length = False

    def __init__(self, stream: EventStream) -> None:
        super().__init__(headers=stream.headers, media_type=EVENT_STREAM)
        self._stream = stream

    async def send_body(self, send: Send, receive: Receive) -> None:
        await self._stream.send(receive, send)


def stream(
    service: Orchestrator,
    record: Record,
    *,
    after: int = NEVER,
    on_gone: Callable[[], None] = lambda: None,
    headers: dict[str, str] | None = None,
) -> Response[Any]:
    """Answer with the events behind a number; 204 when there will be none. A place was taken in `service.streams`."""
    reader = Reader(record, after=after)
    first = reader.take()
    made = EventStream(service, reader, first=first, on_gone=on_gone, headers=headers or {})
    if reader.ended and not first:
        made.close()
        return Response(None, status_code=HTTP_204_NO_CONTENT)
    return made


@get(
    "/sessions/{sid:str}/executions/{eid:str}/events",
    summary="Follow an execution",
    operation_class=StreamsEvents,
    media_type=EVENT_STREAM,
    responses={
        HTTP_204_NO_CONTENT: ResponseSpec(
            None, description="It has ended, and its last event is the one that was named"
        )
    },
)
async def read_events(
    service: Orchestrator,
    sid: Sid,
    eid: Eid,
    last_event_id: LastEventId = None,
    last_event_id_query: LastEventIdQuery = None,
) -> Response[str]:
    """Send the events of an execution from its beginning, or from behind the last one that arrived.

    None is lost and none comes twice, whether it runs or has ended, and also when the service was started anew meanwhile.
    """
    record = service.sessions.execution(sid, eid)
    service.streams.open(sid)
    last = last_event_id if last_event_id is not None else last_event_id_query
    return stream(service, record, after=NEVER if last is None else last)


def wants_events(request: Request[Any, Any, Any]) -> bool:
    """Tell whether the client accepts events as the answer."""
    accept = request.headers.get("accept", "")
    return EVENT_STREAM in accept and any(
        part.partition(";")[0].strip().lower() == EVENT_STREAM for part in accept.split(",")
    )


async def _happens(event: asyncio.Event, *, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            return await event.wait()
    except TimeoutError:
        return False


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
