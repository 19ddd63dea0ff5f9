"""The seed's door: executions, with the variables that they leave behind."""

import json
from typing import Any

import msgspec
from litestar import Request, post
from litestar.status_codes import HTTP_200_OK

from orchestrator import errors, models
from orchestrator.api.paths import Sid
from orchestrator.api.seed_problems import SeedError
from orchestrator.api.seed_words import Code, Command, Figures, Handler, Outcome
from orchestrator.api.waiting import while_connected
from orchestrator.models import ExecutionRequest, OneShotRequest, SessionRequest
from orchestrator.service import Orchestrator

LIMIT_STATUS, TIMEOUT_STATUS = 429, 408
# Appended to code whose variables are asked for: the handler's value, and the variables that JSON can carry.
PROBE = """
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


class _WithVariables(msgspec.Struct):
    result: msgspec.Raw
    output_variables: msgspec.Raw


@post("/execute_code/{sid:str}", status_code=HTTP_200_OK, summary="Execute code")
async def execute_code(service: Orchestrator, request: Request[Any, Any, Any], sid: Sid, data: Code) -> Outcome:
    """Run code in a session, which is started when it is missing."""
    order = ExecutionRequest(
        language=data.script_type, code=data.code, event=data.event, args=data.args, timeout_s=data.timeout
    )
    if data.output_params:
        if data.script_type != "python":
            raise errors.InvalidRequest("Only Python code has `output_params`: leave them out")
        code = f"{data.code}\n{PROBE.format(names=json.dumps(data.output_params))}"
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


handlers = [execute_code, execute, execute_handler]
