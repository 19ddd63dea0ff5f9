"""From a request to an `Execution`: the job for the agent, and what its result means."""

import time
from datetime import UTC, datetime
from typing import Any

import msgspec

from orchestrator.container import Container
from orchestrator.errors import ContainerLost
from orchestrator.frames import Result
from orchestrator.models import Execution, ExecutionError, ExecutionRequest, Outcome, Stream, Usage


class _Report(msgspec.Struct, forbid_unknown_fields=True):
    """What the bootstrap writes on the value's descriptor: hostile, like all that comes from the sandbox."""

    value: Any = msgspec.UNSET
    error: ExecutionError | None = None


class _RawReport(msgspec.Struct):
    value: msgspec.Raw


class Record:
    """One execution that runs or ran: what is known of it, growing as output arrives."""

    def __init__(self, eid: str, session_id: str, request: ExecutionRequest) -> None:
        language = request.language if request.command is None else "shell"
        self.facts = Execution(id=eid, session_id=session_id, started_at=datetime.now(UTC), language=language)
        self._streams: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray(), "value": bytearray()}
        self.begun = time.monotonic()
        self.duration_s = 0.0
        self.sent = False

    @property
    def id(self) -> str:
        """The execution's id."""
        return self.facts.id

    async def run(self, container: Container, job: dict[str, Any], *, deadline_s: float) -> None:
        """Run the job in the container; afterwards `facts` tells the outcome, whatever happened."""
        self.sent = True
        try:
            result = await container.execute(self.id, job, deadline_s=deadline_s, sink=self._take)
        except ContainerLost as error:
            self._lose(error.detail)
        else:
            self._finish(result)
        self.duration_s = time.monotonic() - self.begun

    def _take(self, stream: Stream, data: bytes) -> None:
        self._streams[stream] += data

    def _finish(self, result: Result) -> None:
        facts = self.facts
        facts.exit_code = result.exit_code
        facts.signal = result.signal
        facts.truncated = result.truncated
        facts.usage = Usage(wall_s=result.wall_s, cpu_s=result.cpu_s, max_rss_bytes=result.max_rss_bytes)
        self._show_output()
        outcome: Outcome = result.outcome
        if outcome in ("ok", "error"):
            outcome = self._read_report(outcome)
        elif result.message:
            facts.error = ExecutionError(type="Sandbox.Killed", message=result.message)
        facts.outcome = outcome

    def _lose(self, reason: str) -> None:
        self._show_output()
        self.facts.error = ExecutionError(type="Sandbox.Lost", message=reason)
        self.facts.outcome = "lost"

    def _show_output(self) -> None:
        facts = self.facts
        facts.stdout, stdout_whole = text_of(self._streams["stdout"])
        facts.stderr, stderr_whole = text_of(self._streams["stderr"])
        if not (stdout_whole and stderr_whole):
            whole: dict[Stream, bool] = {"stdout": stdout_whole, "stderr": stderr_whole}
            facts.replaced = [stream for stream, is_whole in whole.items() if not is_whole]

    def _read_report(self, outcome: Outcome) -> Outcome:
        """Take value or error from the report; one that is no report makes an `ok` an `error`."""
        data = bytes(self._streams["value"])
        if not data:
            return outcome
        try:
            report = msgspec.json.decode(data, type=_Report)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            about = "it is too long" if "value" in self.facts.truncated else str(error)
            self.facts.error = ExecutionError(type="Runtime.InvalidValue", message=f"The value is no JSON: {about}")
            return "error"
        self.facts.error = report.error
        if report.error is None and report.value is not msgspec.UNSET and outcome == "ok":
            self.facts.value = msgspec.json.decode(data, type=_RawReport).value
        return "error" if report.error is not None else outcome


def job_of(
    request: ExecutionRequest, *, timeout_s: float, env: dict[str, str], context: dict[str, Any]
) -> dict[str, Any]:
    """Return the job that the agent gets; what a field's default says is left out."""
    job: dict[str, Any] = {"timeout_s": timeout_s, "env": env | request.env}
    if request.command is not None:
        words = ["/bin/bash", "-c", request.command, "bash"] if isinstance(request.command, str) else request.command
        job["argv"] = [*words, *request.args]
    elif request.language == "shell":
        job["argv"] = ["/bin/bash", "-c", request.code, "bash", *request.args]
    else:
        job |= {"code": request.code, "handler": request.handler, "event": request.event, "args": request.args}
        job["context"] = context | request.context
    if request.stdin:
        job["stdin"] = request.stdin
    return job


def lambda_context(eid: str, session_id: str, *, memory_kb: int) -> dict[str, Any]:
    """Return the facts of AWS Lambda's context object for one execution."""
    return {
        "aws_request_id": eid,
        "function_name": session_id,
        "function_version": "$LATEST",
        "memory_limit_in_mb": str(memory_kb // 1024),
        "log_group_name": f"/aws/lambda/{session_id}",
        "log_stream_name": f"{datetime.now(UTC):%Y/%m/%d}/[$LATEST]{eid}",
        "invoked_function_arn": f"arn:aws:lambda:local:000000000000:function:{session_id}",
    }


def text_of(data: bytes | bytearray) -> tuple[str, bool]:
    """Return UTF-8 text, and whether every byte of it was."""
    try:
        return data.decode(), True
    except UnicodeDecodeError:
        return data.decode(errors="replace"), False
