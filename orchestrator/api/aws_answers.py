"""Requests and answers on AWS Lambda's wire: bodies in and out, and of an invocation its value or error, and its log."""

import base64
import math
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import msgspec
from litestar import Request, Response
from litestar.params import Parameter

from orchestrator.api.aws_words import AwsError
from orchestrator.errors import InvalidRequest
from orchestrator.functions import Function
from orchestrator.invocations import Call, Invoked
from orchestrator.models import Execution

T = TypeVar("T")
Asked = Request[Any, Any, Any]
Name = Annotated[str, Parameter(max_length=300, description="name or ARN of the function")]
Qualifier = Annotated[str | None, Parameter(query="Qualifier", max_length=128, description="`$LATEST`, if anything")]
JSON = "application/json"
TAIL = 4096  # bytes of the log that a client may have


async def read(request: Asked, kind: type[T]) -> T:
    """Return the body as the words that are expected."""
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AwsError("InvalidRequestContentException", 400, f"The body is no JSON: {error}") from None


def answer(request: Asked, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response[Any]:
    """Return a response with the request's id. Bytes are JSON already."""
    body = content if isinstance(content, bytes) else b"" if content is None else msgspec.json.encode(content)
    given = {"x-amzn-RequestId": request.state.request_id} | (headers or {})
    return Response(body, status_code=status, media_type="application/json", headers=given)


def nothing(request: Asked) -> Response[None]:
    """Return the response of what was done and has nothing to show."""
    return Response(None, status_code=204, headers={"x-amzn-RequestId": request.state.request_id})


def payload_of(invoked: Invoked, call: Call) -> tuple[bytes, bool]:
    """Return the payload, and whether it is an error of the function."""
    execution = invoked.execution
    if execution.outcome == "ok" and execution.value is not None:
        return bytes(execution.value), False
    kind, message, stack = error_of(invoked.function, execution, call.request_id)
    error: dict[str, Any] = {"errorMessage": message, "errorType": kind, "requestId": call.request_id}
    return msgspec.json.encode(error | {"stackTrace": stack}), True


def error_of(function: Function, execution: Execution, request_id: str) -> tuple[str, str, list[str]]:
    """Return type, message and stack trace of what went wrong."""
    error = execution.error
    about = f"RequestId: {request_id} Error:"
    match execution.outcome:
        case "timeout":
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            text = f"{now} {request_id} Task timed out after {function.timeout_s:.2f} seconds"
            return "Sandbox.Timedout", text, []
        case "oom":
            return "Runtime.OutOfMemory", f"{about} Runtime exited with error: signal: killed", []
        case "output_limit":
            return "Runtime.ExitError", f"{about} Runtime was ended, as it printed too much", []
        case "ok":  # it exited with 0 before there was a value
            return "Runtime.ExitError", f"{about} Runtime exited without providing a reason", []
        case "error" if error is None:
            end = f"exit status {execution.exit_code}" if execution.signal is None else f"signal: {execution.signal}"
            return "Runtime.ExitError", f"{about} Runtime exited with error: {end}", []
        case "error" if error is not None and "value" in execution.truncated:
            return "Function.ResponseSizeTooLarge", "Response payload size exceeded maximum allowed payload size", []
        case _:
            reason = "the sandbox vanished" if error is None else error.message
            kind = "Sandbox.Failure" if error is None or execution.outcome != "error" else error.type
            return kind, reason, [] if error is None else error.stack_trace


def log_of(invoked: Invoked, call: Call) -> str:
    """Return the end of the log in base64: what was printed, in its order, between Lambda's own lines."""
    execution, number = invoked.execution, call.request_id
    printed = invoked.record.output.printed().decode(errors="replace")
    if printed and not printed.endswith("\n"):
        printed += "\n"
    usage = execution.usage
    took_ms = 0.0 if usage is None else usage.wall_s * 1000
    used_mb = 0 if usage is None else math.ceil(usage.max_rss_bytes / 2**20)
    report = [
        f"REPORT RequestId: {number}",
        f"Duration: {took_ms:.2f} ms",
        f"Billed Duration: {math.ceil(took_ms)} ms",
        f"Memory Size: {invoked.function.memory_mb} MB",
        f"Max Memory Used: {used_mb} MB",
    ]
    if invoked.init_s is not None:
        report.append(f"Init Duration: {invoked.init_s * 1000:.2f} ms")
    if execution.outcome == "timeout":
        report.append("Status: timeout")
    text = (
        f"START RequestId: {number} Version: $LATEST\n{printed}END RequestId: {number}\n" + "\t".join(report) + "\t\n"
    )
    return base64.b64encode(text.encode("utf-8", "replace")[-TAIL:]).decode()


def event_of(body: bytes) -> Any:
    """Return the event that a body is. No body is an empty object."""
    try:
        return msgspec.json.decode(body) if body else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AwsError(
            "InvalidRequestContentException", 400, f"Could not parse request body into json: {error}"
        ) from None
