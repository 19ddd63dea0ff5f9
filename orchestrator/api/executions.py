"""The executions of a session: begin, wait or not, list, read, cancel, feed."""

from itertools import islice
from typing import Annotated, Any

from litestar import Request, Response, delete, get, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import Parameter
from litestar.status_codes import HTTP_200_OK, HTTP_202_ACCEPTED, HTTP_204_NO_CONTENT

from orchestrator import stdin
from orchestrator.api import events
from orchestrator.api.paths import Eid, Sid
from orchestrator.api.waiting import until_ended
from orchestrator.errors import ExecutionNotFound
from orchestrator.executions import Record
from orchestrator.models import Execution, ExecutionPage, ExecutionRequest, StdinRequest
from orchestrator.service import Orchestrator

RESPOND_ASYNC = "respond-async"
IdempotencyKey = Annotated[
    str | None,
    Parameter(
        header="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="a request that is sent again with its key is answered with the execution that the first one began",
    ),
]
Prefer = Annotated[
    str | None,
    Parameter(header="Prefer", description="`respond-async`: answer 202 at once, and let it go on without this client"),
]
PageSize = Annotated[int, Parameter(ge=1, le=1000, description="executions of one page")]


def begins(path: str, *, summary: str, at_once: str) -> post:
    """Route a handler that begins an execution; `at_once` says when it answers before the end."""
    begun = ResponseSpec(Execution, generate_examples=False, description=at_once)
    return post(
        path,
        status_code=HTTP_200_OK,
        summary=summary,
        operation_class=events.StreamsEvents,
        responses={HTTP_202_ACCEPTED: begun},
    )


@begins(
    "/sessions/{sid:str}/executions", summary="Execute", at_once="It was begun, in the background or as `Prefer` asks"
)
async def execute(
    service: Orchestrator,
    request: Request[Any, Any, Any],
    sid: Sid,
    data: ExecutionRequest,
    key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> Response[Execution]:
    """Run code or a command. A failing code is an outcome, not an HTTP error.

    The answer comes at its end, and who disconnects before cancels it, unless the request has an Idempotency-Key to
    ask again with. With `Prefer: respond-async`, and of one in the background, the answer comes at once. With `Accept:
    text/event-stream` it is the events as they happen.
    """
    await service.sessions.bring(sid, data.files)
    return await answer(service, request, sid, data, key=key, prefer=prefer)


async def answer(
    service: Orchestrator,
    request: Request[Any, Any, Any],
    sid: str,
    data: ExecutionRequest,
    *,
    key: str | None,
    prefer: str | None,
) -> Response[Execution]:
    """Begin an execution, and answer as the request asks."""
    stays = prefer is not None and prefers_async(prefer)
    applied = {"Preference-Applied": RESPOND_ASYNC} if stays else {}
    if events.wants_events(request):
        service.streams.open(sid)
        try:
            record = service.sessions.start(sid, data, key=key, stays=stays, followed=True)
        except BaseException:  # whatever it was, the place of this stream is given back
            service.streams.close(sid)
            raise
        headers = {"Location": location(record)} | applied
        return events.stream(service, record, on_gone=lambda: service.sessions.leave(record), headers=headers)
    record = service.sessions.start(sid, data, key=key, stays=stays)
    if stays or data.background:
        headers = {"Location": location(record)} | applied
        return Response(record.view(), status_code=HTTP_202_ACCEPTED, headers=headers)
    await until_ended(request, service.sessions, record)
    return Response(record.facts)


@get("/sessions/{sid:str}/executions", summary="List executions")
async def list_executions(
    service: Orchestrator,
    sid: Sid,
    limit: PageSize = 100,
    after: Annotated[str | None, Parameter(max_length=63)] = None,
) -> ExecutionPage:
    """List the executions that the session remembers, oldest first; `after` continues behind an id."""
    records = service.sessions.get(sid).records
    if after is not None and after not in records:
        raise ExecutionNotFound(f"The session {sid} has no execution {after} any more: list from the beginning")
    ids = list(records)
    start = 0 if after is None else ids.index(after) + 1
    page = list(islice(ids, start, start + limit))
    more = start + limit < len(ids)
    return ExecutionPage(executions=[records[eid].facts for eid in page], next=page[-1] if more else None)


@get("/sessions/{sid:str}/executions/{eid:str}", summary="Read an execution")
async def read_execution(service: Orchestrator, sid: Sid, eid: Eid) -> Execution:
    """Return one execution; while it runs its outcome is null, and its output what has come."""
    return service.sessions.execution(sid, eid).view()


@delete("/sessions/{sid:str}/executions/{eid:str}", status_code=HTTP_204_NO_CONTENT, summary="Cancel an execution")
async def cancel_execution(service: Orchestrator, sid: Sid, eid: Eid) -> None:
    """Kill an execution; one that has ended is left alone."""
    service.sessions.cancel(sid, eid)


@post("/sessions/{sid:str}/executions/{eid:str}/stdin", status_code=HTTP_204_NO_CONTENT, summary="Send to stdin")
async def send_stdin(service: Orchestrator, sid: Sid, eid: Eid, data: StdinRequest) -> None:
    """Send text to an execution that was begun with `stdin_open`: all of it, or with an error nothing."""
    record = service.sessions.execution(sid, eid)
    await stdin.send_stdin(service.sessions.get(sid), record, data, service.sessions.admission)


def prefers_async(prefer: str) -> bool:
    """Tell whether a `Prefer` header (RFC 7240) has `respond-async` among its preferences."""
    return any(part.partition(";")[0].strip().lower() == RESPOND_ASYNC for part in prefer.split(","))


def location(record: Record) -> str:
    """Return the path of an execution."""
    return f"/v1/sessions/{record.facts.session_id}/executions/{record.id}"


handlers = [execute, list_executions, read_execution, cancel_execution, events.read_events, send_stdin]
