"""The seed's door, `/workspace/se`: the routes, bodies and errors of the document the project began with."""

import json
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, Response, Router, delete, get, post
from litestar.params import Parameter
from litestar.status_codes import HTTP_200_OK

from orchestrator import errors, models
from orchestrator.api import seed_files
from orchestrator.api.problems import problem_of
from orchestrator.api.waiting import while_connected
from orchestrator.files import Workspace
from orchestrator.models import ID_PATTERN, ExecutionRequest, OneShotRequest, Seconds, SessionRequest
from orchestrator.service import Orchestrator

Sid = Annotated[str, Parameter(pattern=ID_PATTERN, description="id of the session")]
CODES = {
    "session_not_found": "SESSION_NOT_FOUND",
    "session_ended": "SESSION_EXPIRED",
    "invalid_request": "INVALID_CODE",
    "file_not_found": "FILE_NOT_FOUND",
}
ALLOWED: dict[bool, Literal["none", "public"]] = {False: "none", True: "public"}
LIMIT_STATUS, TIMEOUT_STATUS = 429, 408


class NewSession(models.Request, frozen=True):
    """What the seed lets a session ask for. Limits are the template's: they are accepted, not applied."""

    size: int | None = None
    allow_network: bool | None = None
    cpu_quota: float | None = None
    memory_limit: int | None = None
    timeout: Seconds | None = None


class Code(models.Request, frozen=True):
    """Code to execute."""

    code: str
    event: Any = {}
    timeout: Seconds | None = None
    filename: str | None = None
    args: list[str] = []
    script_type: Literal["python", "shell"] = "python"
    output_params: list[Annotated[str, msgspec.Meta(pattern=models.NAME_PATTERN)]] = []


class Command(models.Request, frozen=True):
    """A command, or code with its event."""

    command: str | None = None
    args: list[str] = []
    code: str | None = None
    event: Any = {}
    timeout: Seconds | None = None


class Handler(models.Request, frozen=True):
    """A handler to call once, without a session."""

    handler_code: str
    event: Any = {}
    context: dict[str, Any] = {}
    timeout: Seconds | None = None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What an execution consumed."""

    duration_ms: float
    cpu_time_ms: float
    memory_peak_mb: float


class Outcome(msgspec.Struct, kw_only=True):
    """An execution in both families of names that the seed's documents use."""

    stdout: str
    stderr: str
    exit_code: int
    returncode: int
    result: Any
    execution_time: float
    metrics: Figures
    output_variables: Any = msgspec.UNSET


class Said(msgspec.Struct, frozen=True):
    """What went wrong, for programs and for people."""

    code: str
    message: str


class SeedProblem(msgspec.Struct, frozen=True):
    """An error of this door."""

    detail: str
    error: Said


class _WithVariables(msgspec.Struct):
    result: msgspec.Raw
    output_variables: msgspec.Raw


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


@post("/execute_code/{sid:str}", status_code=HTTP_200_OK, summary="Execute code")
async def execute_code(service: Orchestrator, request: Request[Any, Any, Any], sid: Sid, data: Code) -> Outcome:
    """Run code in a session, which is started when it is missing."""
    order = ExecutionRequest(
        language=data.script_type, code=data.code, event=data.event, args=data.args, timeout_s=data.timeout
    )
    if data.output_params:
        if data.script_type != "python":
            raise errors.InvalidRequest("Only Python code has `output_params`: leave them out")
        code = f"{data.code}\n{_PROBE.format(names=json.dumps(data.output_params))}"
        order = msgspec.structs.replace(order, code=code, handler="_seed_probe")
    outcome = outcome_of(await while_connected(request, _in_session(service, sid, order)))
    if data.output_params and outcome.result is not None:
        both = msgspec.json.decode(outcome.result, type=_WithVariables)
        outcome.result, outcome.output_variables = both.result, both.output_variables
    return outcome


@post("/execute/{sid:str}", status_code=HTTP_200_OK, summary="Execute a command")
async def execute(service: Orchestrator, request: Request[Any, Any, Any], sid: Sid, data: Command) -> Outcome:
    """Run a command, or code with its event, in a session, which is started when it is missing."""
    order = ExecutionRequest(
        command=data.command, code=data.code, event=data.event, args=data.args, timeout_s=data.timeout
    )
    return outcome_of(await while_connected(request, _in_session(service, sid, order)))


@post("/v2/execute_code", status_code=HTTP_200_OK, summary="Call a handler")
async def execute_handler(service: Orchestrator, request: Request[Any, Any, Any], data: Handler) -> Outcome:
    """Call a handler in a fresh container."""
    order = OneShotRequest(code=data.handler_code, event=data.event, context=data.context, timeout_s=data.timeout)
    return outcome_of(await while_connected(request, service.sessions.execute_once(order)))


@get("/workspaces", summary="List sessions")
async def workspaces(service: Orchestrator) -> dict[str, Any]:
    """List all sessions with the time of their start."""
    held = service.sessions.held
    return {"workspaces": {sid: {"created_at": session.facts().created_at} for sid, session in held.items()}}


class CleanUp(models.Request, frozen=True):
    """`force` ends sessions in which something runs as well."""

    force: bool = False


@post("/cleanup-all", status_code=HTTP_200_OK, summary="End all sessions")
async def cleanup_all(service: Orchestrator, data: CleanUp | None = None) -> dict[str, int]:
    """End all sessions, those in which something runs only by force."""
    sessions = list(service.sessions.held.values())
    chosen = [session for session in sessions if (data is not None and data.force) or not session.running]
    for session in chosen:
        service.sessions.end(session, "closed")
    return {"total": len(sessions), "success": len(chosen), "failed": 0, "skipped": len(sessions) - len(chosen)}


# Appended to code whose variables are asked for: the handler's value, and the variables that JSON can carry.
_PROBE = """
def _seed_probe(event, context):
    import inspect, json
    def carried(value):
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            return repr(value)
        return value
    def both(result):
        return {{"result": result, "output_variables": {{n: carried(found[n]) for n in names if n in found}}}}
    async def awaited(waiting):
        return both(await waiting)
    names, found = {names}, globals()
    called = found.get("handler")
    if not callable(called):
        return both(None)
    try:
        takes_two = bool(inspect.signature(called).bind(event, context))
    except (TypeError, ValueError):
        takes_two = False
    result = called(event, context) if takes_two else called(event)
    return awaited(result) if hasattr(result, "__await__") else both(result)
"""


async def _in_session(service: Orchestrator, sid: str, order: ExecutionRequest) -> models.Execution:
    if sid not in service.sessions.held:
        try:
            await service.sessions.create(SessionRequest(id=sid))
        except errors.SessionExists:
            await service.sessions.settled(sid)
    return await service.sessions.execute(sid, order)


def outcome_of(execution: models.Execution) -> Outcome:
    """Return an execution in the seed's names; a timeout and a broken limit are its errors."""
    if execution.outcome == "timeout":
        raise SeedError("EXECUTION_TIMEOUT", TIMEOUT_STATUS, "The execution exceeded its timeout: allow it more time")
    if execution.outcome in ("oom", "output_limit"):
        raise SeedError("RESOURCE_LIMIT", LIMIT_STATUS, f"The execution exceeded a limit ({execution.outcome})")
    usage = execution.usage or models.Usage(wall_s=0.0, cpu_s=0.0, max_rss_bytes=0)
    code = -1 if execution.exit_code is None else execution.exit_code
    return Outcome(
        stdout=execution.stdout,
        stderr=execution.stderr,
        exit_code=code,
        returncode=code,
        result=execution.value,
        execution_time=usage.wall_s,
        metrics=Figures(
            duration_ms=usage.wall_s * 1e3, cpu_time_ms=usage.cpu_s * 1e3, memory_peak_mb=usage.max_rss_bytes / 2**20
        ),
    )


class SeedError(Exception):
    """An error that only the seed's door has."""

    def __init__(self, code: str, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.status_code = status_code


def handle(request: Request[Any, Any, Any], error: Exception) -> Response[SeedProblem]:
    """Answer in the seed's form of an error."""
    if isinstance(error, SeedError):
        code, status_code, detail, retry_after_s = error.code, error.status_code, str(error), None
    else:
        problem = problem_of(request, error)
        code = CODES.get(problem.code, problem.code.upper())
        status_code, detail, retry_after_s = problem.status, problem.detail, problem.retry_after_s
        if problem.code == "session_exists":
            status_code = 400
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    body = SeedProblem(detail, Said(code, detail))
    return Response(body, status_code=status_code, headers=headers)


router = Router(
    "/workspace/se",
    route_handlers=[
        healthy,
        create_session,
        end_session,
        status,
        execute_code,
        execute,
        execute_handler,
        workspaces,
        cleanup_all,
        *seed_files.handlers,
    ],
    exception_handlers={Exception: handle},
    tags=["seed"],
)
