"""Every error as a problem document (RFC 9457) with a stable code; nothing internal leaks."""

from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.connection import ASGIConnection
from litestar.enums import ScopeType
from litestar.exceptions import HTTPException, MethodNotAllowedException, ValidationException

from orchestrator import errors
from orchestrator.errors import Problem, SandboxError

log = structlog.get_logger()
PROBLEM_JSON = "application/problem+json"
OF_STATUS: dict[int, type[SandboxError]] = {
    kind.status: kind
    for kind in (
        errors.InvalidRequest,
        errors.Unauthorized,
        errors.NotFound,
        errors.MethodNotAllowed,
        errors.BodyTooLarge,
        errors.UnsupportedMediaType,
    )
}


def problem_of(request: ASGIConnection[Any, Any, Any, Any], error: Exception) -> Problem:
    """Return the problem document of whatever was raised."""
    match error:
        case SandboxError():
            return error.problem()
        case ValidationException():
            return errors.InvalidRequest(_explain(error)).problem()
        case HTTPException() if request.scope["type"] == ScopeType.WEBSOCKET:
            return errors.NotFound("There is no WebSocket at this path: see docs/api.md").problem()
        case HTTPException() if error.status_code in OF_STATUS:
            return OF_STATUS[error.status_code](_sentence(error, request)).problem()
        case UnicodeDecodeError():
            return errors.InvalidRequest("The body is not UTF-8: encode it so").problem()
        case HTTPException(detail="client disconnected prematurely"):  # Litestar's 500; nobody reads the answer
            return errors.InvalidRequest("The body ended before its end").problem()
        case RecursionError():
            return errors.InvalidRequest("The body is nested too deeply: flatten it").problem()
        case _:
            log.error("request_failed", path=request.scope.get("path_template"), exc_info=error)
            return SandboxError("Something went wrong in the service; its log has the cause").problem()


def handle(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Answer with the problem document."""
    problem = problem_of(request, error)
    headers = {} if problem.retry_after_s is None else {"Retry-After": str(problem.retry_after_s)}
    if problem.status == errors.Unauthorized.status:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowedException):
        headers |= error.headers or {}  # which are allowed
    return Response(msgspec.json.encode(problem), status_code=problem.status, media_type=PROBLEM_JSON, headers=headers)


def _explain(error: ValidationException) -> str:
    details = error.extra if isinstance(error.extra, list) else []
    if any(isinstance(item, dict) and item.get("key") == "data" for item in details):
        return "The body is missing: send one as JSON"
    parts = [
        f"`{item['key']}`: {item['message']}" if item.get("key") is not None else str(item.get("message"))
        for item in details
        if isinstance(item, dict)
    ]
    return "; ".join(parts) or error.detail


def _sentence(error: HTTPException, request: ASGIConnection[Any, Any, Any, Any]) -> str:
    if error.status_code == errors.NotFound.status:
        return "There is nothing at this path: see /docs"
    if error.status_code == errors.MethodNotAllowed.status:
        return f"This path does not take {request.scope.get('method', 'a WebSocket')}: see /docs"
    if error.status_code == errors.BodyTooLarge.status:
        return "The body is larger than this service takes: see SANDBOX_MAX_BODY"
    return error.detail
