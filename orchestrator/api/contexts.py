"""The native door's contexts: interpreters of a session that stay."""

from litestar import Response, delete, get, post
from litestar.status_codes import HTTP_200_OK, HTTP_204_NO_CONTENT

from orchestrator.api.paths import Cid, Sid
from orchestrator.models import Context, ContextPage, ContextRequest
from orchestrator.service import Orchestrator


@post("/sessions/{sid:str}/contexts", summary="Start a context")
async def create_context(service: Orchestrator, sid: Sid, data: ContextRequest | None = None) -> Response[Context]:
    """Start an interpreter in which executions share variables, and wait until it has booted."""
    session = service.sessions.get(sid)
    contexts = session.container.contexts
    service.sessions.admission.context(in_session=len(contexts.held))
    session.touch()
    context = await contexts.open(data or ContextRequest(), deadline_s=service.settings.start_timeout_seconds)
    return Response(context.facts(sid), headers={"Location": f"/v1/sessions/{sid}/contexts/{context.id}"})


@get("/sessions/{sid:str}/contexts", summary="List contexts")
async def list_contexts(service: Orchestrator, sid: Sid) -> ContextPage:
    """List the contexts of a session, oldest first."""
    contexts = service.sessions.get(sid).container.contexts
    return ContextPage(contexts=[context.facts(sid) for context in contexts.held.values()])


@get("/sessions/{sid:str}/contexts/{cid:str}", summary="Read a context")
async def read_context(service: Orchestrator, sid: Sid, cid: Cid) -> Context:
    """Return one context."""
    return service.sessions.get(sid).container.contexts.get(cid).facts(sid)


@post("/sessions/{sid:str}/contexts/{cid:str}/restart", status_code=HTTP_200_OK, summary="Restart a context")
async def restart_context(service: Orchestrator, sid: Sid, cid: Cid) -> Context:
    """Give a context a fresh interpreter. Its executions, those that run and those that wait, are cancelled."""
    session = service.sessions.get(sid)
    session.container.contexts.get(cid)
    service.sessions.cancel_waiting(session, cid)
    session.touch()
    deadline_s = service.settings.start_timeout_seconds
    context = await session.container.contexts.restart(cid, deadline_s=deadline_s)
    return context.facts(sid)


@delete("/sessions/{sid:str}/contexts/{cid:str}", status_code=HTTP_204_NO_CONTENT, summary="Delete a context")
async def delete_context(service: Orchestrator, sid: Sid, cid: Cid) -> None:
    """Kill a context's interpreter. Its executions, those that run and those that wait, are cancelled."""
    session = service.sessions.get(sid)
    session.container.contexts.get(cid)
    service.sessions.cancel_waiting(session, cid)
    session.container.contexts.delete(cid)


handlers = [create_context, list_contexts, read_context, restart_context, delete_context]
