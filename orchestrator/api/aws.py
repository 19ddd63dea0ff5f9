"""AWS Lambda's own wire: functions are invoked, their concurrency is set; and its errors."""

from typing import Annotated, Any, Literal
from uuid import uuid4

import msgspec
from litestar import Response, Router, delete, get, post, put
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import Parameter
from msgspec.structs import replace

from orchestrator import errors
from orchestrator.api import aws_functions
from orchestrator.api import aws_words as words
from orchestrator.api.aws_answers import (
    JSON,
    Asked,
    Name,
    Qualifier,
    answer,
    event_of,
    log_of,
    nothing,
    payload_of,
    read,
)
from orchestrator.api.guard import ACCEPTS, ANY, SIGNED, TAKES
from orchestrator.api.problems import problem_of
from orchestrator.api.signed import Signed
from orchestrator.invocations import Call
from orchestrator.service import Orchestrator
from orchestrator.settings import Settings

INVOKE_LIMIT, EVENT_LIMIT = 6 << 20, 1 << 20  # bytes of a payload: who waits, who does not


@post(
    "/2015-03-31/functions/{name:str}/invocations",
    status_code=200,
    request_max_body_size=INVOKE_LIMIT,
    opt={TAKES: (Any, JSON)},
    responses={
        202: ResponseSpec(None, description="It was taken, and runs when its turn comes (`Event`)"),
        204: ResponseSpec(None, description="There is such a function (`DryRun`)"),
    },
    summary="Invoke a function",
)
async def invoke(
    service: Orchestrator,
    request: Asked,
    name: Name,
    qualifier: Qualifier = None,
    kind: Annotated[str, Parameter(header="X-Amz-Invocation-Type")] = "RequestResponse",
    log_type: Annotated[str, Parameter(header="X-Amz-Log-Type")] = "None",
) -> Response[Any]:
    """Run it and wait (`RequestResponse`), run it later (`Event`), or only look whether it is there (`DryRun`)."""
    if kind not in ("RequestResponse", "Event", "DryRun") or log_type not in ("None", "Tail"):
        raise errors.InvalidRequest(
            "The invocation type is RequestResponse, Event or DryRun, the log type None or Tail"
        )
    if "x-amz-client-context" in request.headers:
        raise errors.InvalidRequest("A client context is not supported: put what is in it into the payload")
    function = service.functions.get(words.name_of(name, qualifier=qualifier))
    body = await request.body()
    region = request.state.region
    call = Call(
        request_id=request.state.request_id,
        event=event_of(body),
        event_bytes=len(body),
        arn=words.arn_of(function.name, region),
        region=region,
    )
    if kind == "DryRun":
        return answer(request, None, 204)
    if kind == "Event":
        if len(body) > EVENT_LIMIT:
            raise errors.BodyTooLarge(f"An event that nobody waits for is at most {EVENT_LIMIT} bytes")
        service.invocations.enqueue(function.name, call)
        return answer(request, None, 202)
    invoked = await service.invocations.invoke(function.name, call)
    payload, failed = payload_of(invoked, call)
    headers = {"X-Amz-Executed-Version": words.VERSION} | ({"X-Amz-Function-Error": "Unhandled"} if failed else {})
    if log_type == "Tail":
        headers["X-Amz-Log-Result"] = log_of(invoked, call)
    return answer(request, payload, headers=headers)


@put(
    "/2017-10-31/functions/{name:str}/concurrency",
    opt={TAKES: (words.Concurrency, JSON)},
    summary="Reserve concurrency",
)
async def put_concurrency(service: Orchestrator, request: Asked, name: Name) -> Response[Any]:
    """Set how many invocations of the function run at once; they are set aside for it."""
    asked = await read(request, words.Concurrency)
    wanted = asked.reserved_concurrent_executions
    with service.functions.change(name := words.name_of(name)):
        function = service.functions.get(name)
        taken = sum(other.reserved or 0 for other in service.functions.held.values() if other.name != name)
        if taken + wanted >= service.invocations.warm.limit:
            raise errors.InvalidRequest(
                "Specified ReservedConcurrentExecutions for function decreases account's "
                "UnreservedConcurrentExecution below its minimum value of [1]"
            )
        await service.functions.put(replace(function, reserved=wanted))
    service.invocations.refresh(name)
    return answer(request, {"ReservedConcurrentExecutions": wanted})


@get("/2019-09-30/functions/{name:str}/concurrency", summary="Read reserved concurrency")
async def get_concurrency(service: Orchestrator, request: Asked, name: Name) -> Response[Any]:
    """Return how many invocations are set aside for the function."""
    reserved = service.functions.get(words.name_of(name)).reserved
    return answer(request, {} if reserved is None else {"ReservedConcurrentExecutions": reserved})


@delete("/2017-10-31/functions/{name:str}/concurrency", status_code=204, summary="Release concurrency")
async def delete_concurrency(service: Orchestrator, request: Asked, name: Name) -> Response[None]:
    """Have the function share with all others again."""
    with service.functions.change(name := words.name_of(name)):
        await service.functions.put(replace(service.functions.get(name), reserved=None))
    service.invocations.refresh(name)
    return nothing(request)


def handle(request: Asked, error: Exception) -> Response[Any]:
    """Answer in Lambda's form of an error."""
    reason = None
    if isinstance(error, words.AwsError):
        kind, status, message, retry_after_s = error.kind, error.status, error.message, None
    else:
        problem = problem_of(request, error)
        kind, status = words.TYPES.get(problem.code, ("ServiceException", 500))
        message, retry_after_s = problem.detail, problem.retry_after_s
    if isinstance(error, HTTPException) and status == errors.BodyTooLarge.status:
        message = f"Request must be smaller than {request.route_handler.resolve_request_max_body_size()} bytes"
    if isinstance(error, errors.FunctionThrottled):
        start = "ReservedFunction" if error.is_reserved else ""
        reason = f"{start}ConcurrentInvocationLimitExceeded"
    who: Literal["Service", "User"] = "Service" if status >= 500 else "User"
    body = words.AwsProblem(Type=who, Message=message, message=message, Reason=reason)
    headers = {"X-Amzn-Errortype": kind, "x-amzn-RequestId": request.state.get("request_id") or str(uuid4())}
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json", headers=headers)


def door(settings: Settings) -> Router:
    """Return Lambda's routes, behind its signatures."""
    return Router(
        "/",
        route_handlers=[
            *aws_functions.handlers,
            invoke,
            put_concurrency,
            get_concurrency,
            delete_concurrency,
        ],
        before_request=Signed(settings.api_keys).check,
        exception_handlers={Exception: handle},
        opt={SIGNED: True, ACCEPTS: ANY},
        tags=["lambda"],
    )
