"""The seed's door, `/workspace/se`, as the document says that the project began with: sessions, and the router."""

from typing import Any, Literal

from litestar import Router, delete, get, post
from litestar.status_codes import HTTP_200_OK

from orchestrator.api import seed_executions, seed_files
from orchestrator.api.paths import Sid
from orchestrator.api.seed_problems import handle
from orchestrator.api.seed_words import CleanUp, NewSession
from orchestrator.files import Workspace
from orchestrator.models import SessionRequest
from orchestrator.service import Orchestrator

ALLOWED: dict[bool, Literal["none", "public"]] = {False: "none", True: "public"}


@get("/healthy", summary="Is the service alive")
async def healthy() -> dict[str, str]:
    """Answer whenever the process lives."""
    return {"status": "success"}


@post("/session/{sid:str}", status_code=HTTP_200_OK, summary="Start a session")
async def create_session(service: Orchestrator, sid: Sid, data: NewSession | None = None) -> dict[str, str]:
    """Start a session under the given id."""
    asked = data or NewSession()
    network = None if asked.allow_network is None else ALLOWED[asked.allow_network]
    await service.sessions.create(SessionRequest(id=sid, ttl_s=asked.timeout, network=network))
    return {"session_id": sid}


@delete("/session/{sid:str}", status_code=HTTP_200_OK, summary="End a session")
async def end_session(service: Orchestrator, sid: Sid) -> dict[str, str]:
    """End a session."""
    service.sessions.end(service.sessions.get(sid), "closed")
    return {"status": "success"}


@get("/status/{sid:str}", summary="Read a session")
async def status(service: Orchestrator, sid: Sid) -> dict[str, Any]:
    """Tell whether a session exists, and what is at the top of its workspace."""
    session = service.sessions.held.get(sid)
    if session is None:
        return {"id": sid, "exists": False, "created_at": None, "files": []}
    files = await seed_files.all_files(Workspace(session.container), "", recursive=False)
    return {"id": sid, "exists": True, "created_at": session.facts().created_at, "files": files}


@get("/workspaces", summary="List sessions")
async def workspaces(service: Orchestrator) -> dict[str, Any]:
    """List all sessions with the time of their start."""
    held = service.sessions.held
    return {"workspaces": {sid: {"created_at": session.facts().created_at} for sid, session in held.items()}}


@post("/cleanup-all", status_code=HTTP_200_OK, summary="End all sessions")
async def cleanup_all(service: Orchestrator, data: CleanUp | None = None) -> dict[str, int]:
    """End all sessions, those in which something runs only by force."""
    sessions = list(service.sessions.held.values())
    chosen = [session for session in sessions if (data is not None and data.force) or not session.running]
    for session in chosen:
        service.sessions.end(session, "closed")
    return {"total": len(sessions), "success": len(chosen), "failed": 0, "skipped": len(sessions) - len(chosen)}


router = Router(
    "/workspace/se",
    route_handlers=[
        healthy,
        create_session,
        end_session,
        status,
        *seed_executions.handlers,
        workspaces,
        cleanup_all,
        *seed_files.handlers,
    ],
    exception_handlers={Exception: handle},
    tags=["seed"],
)
