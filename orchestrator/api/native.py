"""The native door, `/v1`."""

from bisect import bisect_right
from typing import Annotated, Any

from litestar import Request, Response, Router, delete, get, patch, post
from litestar.params import Parameter
from litestar.status_codes import HTTP_200_OK, HTTP_204_NO_CONTENT

from orchestrator import packages
from orchestrator.api import contexts, executions, files, terminal
from orchestrator.api import packages as package_routes
from orchestrator.api.paths import Sid
from orchestrator.api.waiting import while_connected
from orchestrator.models import (
    Execution,
    Isolation,
    OneShotRequest,
    PoolPage,
    PoolState,
    Session,
    SessionNetwork,
    SessionPage,
    SessionPatch,
    SessionRequest,
    TemplatePage,
)
from orchestrator.service import Orchestrator

PageSize = Annotated[int, Parameter(ge=1, le=1000, description="sessions of one page")]


@post("/sessions", summary="Start a session")
async def create_session(
    service: Orchestrator, request: Request[Any, Any, Any], data: SessionRequest | None = None
) -> Response[Session]:
    """Take a container from the warm pool for a new session, and install its packages."""
    created = packages.create_session(service.sessions, data or SessionRequest())
    session = await (while_connected(request, created) if data is not None and data.packages else created)
    return Response(session.facts(), headers={"Location": f"/v1/sessions/{session.id}"})


@get("/sessions", summary="List sessions")
async def list_sessions(
    service: Orchestrator, limit: PageSize = 100, after: Annotated[str | None, Parameter(max_length=63)] = None
) -> SessionPage:
    """List sessions in the order of their ids; `after` continues behind an id."""
    ids = sorted(service.sessions.held)
    start = 0 if after is None else bisect_right(ids, after)
    page = ids[start : start + limit]
    more = start + limit < len(ids)
    sessions = [service.sessions.held[sid].facts() for sid in page]
    return SessionPage(sessions=sessions, next=page[-1] if more else None)


@get("/sessions/{sid:str}", summary="Read a session")
async def read_session(service: Orchestrator, sid: Sid) -> Session:
    """Return one session. Reading does not count as use."""
    return service.sessions.get(sid).facts()


@patch("/sessions/{sid:str}", summary="Extend a session")
async def extend_session(service: Orchestrator, sid: Sid, data: SessionPatch) -> Session:
    """Count the session's life anew from now, or replace its metadata or network."""
    return service.sessions.patch(sid, data).facts()


@get("/sessions/{sid:str}/network", summary="Read a session's network")
async def read_network(service: Orchestrator, sid: Sid) -> SessionNetwork:
    """Return what a session may reach, its open connections, what they carried, and the last refusals."""
    return service.sessions.get(sid).outlet.facts()


@delete("/sessions/{sid:str}", status_code=HTTP_204_NO_CONTENT, summary="End a session")
async def end_session(service: Orchestrator, sid: Sid) -> None:
    """End a session; what runs in it is killed and its container destroyed."""
    service.sessions.end(service.sessions.get(sid), "closed")


@post("/execute", status_code=HTTP_200_OK, summary="Execute once")
async def execute_once(service: Orchestrator, request: Request[Any, Any, Any], data: OneShotRequest) -> Execution:
    """Run one execution in a fresh container that is destroyed afterwards."""
    return await while_connected(request, service.sessions.execute_once(data))


@get("/templates", summary="List templates")
async def list_templates(service: Orchestrator) -> TemplatePage:
    """List what containers can be started from; the first is the default."""
    return TemplatePage(templates=[pool.template for pool in service.pools.values()])


@get("/pool", summary="Read the pools")
async def read_pool(service: Orchestrator) -> PoolPage:
    """Return how many containers are ready, starting and waited for."""
    value = service.metrics.value
    return PoolPage(
        pools=[
            PoolState(
                template=name,
                target=pool.recipe.template.pool_size,
                ready=len(pool.ready),
                starting=len(pool.starting),
                waiting=len(pool.waiting),
                hits=int(value("sandbox_pool_hits_total", template=name)),
                misses=int(value("sandbox_pool_misses_total", template=name)),
            )
            for name, pool in service.pools.items()
        ],
        containers=service.reconciler.occupied,
        quarantined=list(service.reconciler.removals.quarantined),
        max_containers=service.settings.max_containers,
    )


@get("/isolation", summary="Read the isolation")
async def read_isolation(service: Orchestrator) -> Isolation:
    """Return the layers that the self-test of the newest container observed active."""
    return Isolation(engine=service.engine.name, layers=service.reconciler.layers, observed=service.reconciler.canary)


router = Router(
    "/v1",
    route_handlers=[
        create_session,
        list_sessions,
        read_session,
        extend_session,
        read_network,
        end_session,
        *executions.handlers,
        execute_once,
        list_templates,
        read_pool,
        read_isolation,
        *files.handlers,
        terminal.attend,
        *contexts.handlers,
        *package_routes.handlers,
    ],
    tags=["native"],
)
