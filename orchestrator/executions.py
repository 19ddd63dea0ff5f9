"""From a request to an `Execution`: the job for the agent, and what its result means."""

import hashlib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from orchestrator import cells
from orchestrator.container import Container
from orchestrator.errors import ContainerLost
from orchestrator.frames import Described, Result
from orchestrator.models import Artifact, Execution, ExecutionError, ExecutionRequest, Language, Outcome, Stream, Usage
from orchestrator.output import Output

TEXTS: tuple[Stream, ...] = ("stdout", "stderr")


class _Report(msgspec.Struct, forbid_unknown_fields=True):
    """What the bootstrap writes on the value's descriptor: hostile, like all that comes from the sandbox."""

    value: Any = msgspec.UNSET
    error: ExecutionError | None = None


class _RawReport(msgspec.Struct):
    value: msgspec.Raw


_described = msgspec.json.Decoder(Described).decode


class Installation(ExecutionRequest, frozen=True):
    """Install packages into the session: one at a time."""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent keeps of an execution, for the orchestrator that adopts it.

    `stays` is one that goes on when nobody waits for it, `followed` one whose events are read as they happen: both may be
    asked for later. `installs` is an installation.
    """

    language: Language
    timeout_s: float | None
    key: str | None = None
    digest: str | None = None
    stays: bool = False
    followed: bool = False
    background: bool = False
    stdin_open: bool = False
    context_id: str | None = None
    installs: bool = False


class Record:
    """One execution that runs or ran: what is known of it, growing as output arrives."""

    def __init__(self, eid: str, session_id: str, note: Note, *, age_s: float = 0.0) -> None:
        started_at = datetime.now(UTC) - timedelta(seconds=age_s)
        self.facts = Execution(
            id=eid,
            session_id=session_id,
            started_at=started_at,
            language=note.language,
            background=note.background,
            context_id=note.context_id,
        )
        self.note = note
        self.output = Output()
        self.begun = time.monotonic() - age_s
        self.duration_s = 0.0
        self.sent = False
        self.left = False  # to the next orchestrator: nothing more is heard of it here
        self.watchers: set[Callable[[], None]] = set()

    @property
    def id(self) -> str:
        """The execution's id."""
        return self.facts.id

    @property
    def key(self) -> str | None:
        """The client's Idempotency-Key."""
        return self.note.key

    @property
    def goes_on(self) -> bool:
        """Whether it goes on when its client goes away."""
        return self.note.stays or self.note.key is not None

    @property
    def is_held(self) -> bool:
        """Whether the agent is to hold its result, for whoever asks after a crash."""
        return self.goes_on or self.note.followed

    def view(self) -> Execution:
        """Return what is known now: of one that runs, with the output that has come."""
        if self.facts.outcome is not None:
            return self.facts
        texts = {stream: text_of(self.output.whole(stream))[0] for stream in TEXTS}
        return msgspec.structs.replace(self.facts, **texts)

    def tell(self) -> None:
        """Tell those who watch that there is something new."""
        for watcher in self.watchers:
            watcher()

    def queue(self, container: Container, job: dict[str, Any]) -> None:
        """Have the job kept in the container until its turn has come, or it is called off."""
        container.queue(self.id, job, note=msgspec.structs.asdict(self.note))

    async def run(self, container: Container, job: dict[str, Any] | None, *, grace_s: float) -> None:
        """Run the job in the container, without one that which is queued there.

        Afterwards `facts` tells the outcome, whatever happened.
        """
        self.sent = True
        note = msgspec.structs.asdict(self.note)
        deadline_s = None if self.note.timeout_s is None else self.note.timeout_s + grace_s
        await self._await(
            container.execute(self.id, job, note=note, deadline_s=deadline_s, sink=self._take, hold=self.is_held)
        )

    async def resume(self, container: Container, *, grace_s: float) -> None:
        """Take over an execution that an earlier orchestrator began: all its output comes again."""
        self.sent = True
        deadline_s = None
        if self.note.timeout_s is not None:
            deadline_s = max(0.0, self.note.timeout_s - (time.monotonic() - self.begun)) + grace_s
        await self._await(container.resume(self.id, deadline_s=deadline_s, sink=self._take, hold=self.is_held))

    def refuse(self, reason: str) -> None:
        """End a cell that its context cannot run."""
        self.facts.error = ExecutionError(type="Sandbox.ContextDied", message=reason)
        self.facts.outcome = "killed"

    async def _await(self, result: Awaitable[Result]) -> None:
        try:
            self._finish(await result)
        except ContainerLost as error:
            self._lose(error.detail)
        self.duration_s = time.monotonic() - self.begun

    def _take(self, stream: Stream, data: bytes) -> None:
        self.output.add(stream, data)
        if self.watchers:
            self.tell()

    def _finish(self, result: Result) -> None:
        facts = self.facts
        facts.exit_code = result.exit_code
        facts.signal = result.signal
        facts.truncated = result.truncated
        facts.usage = Usage(wall_s=result.wall_s, cpu_s=result.cpu_s, max_rss_bytes=result.max_rss_bytes)
        if artifacts := self.output.whole("artifact"):
            facts.artifacts = artifacts_of(artifacts)
        self._show_output()
        outcome: Outcome = result.outcome
        if self.note.context_id is not None and result.message:
            self._read_report("error")
            facts.error = cells.error_of(result, facts.error)
        elif outcome in ("ok", "error"):
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
        facts.stdout, stdout_whole = text_of(self.output.whole("stdout"))
        facts.stderr, stderr_whole = text_of(self.output.whole("stderr"))
        if displays := self.output.whole("display"):
            facts.displays = cells.displays_of(displays)
        if not (stdout_whole and stderr_whole):
            whole: dict[Stream, bool] = {"stdout": stdout_whole, "stderr": stderr_whole}
            facts.replaced = [stream for stream, is_whole in whole.items() if not is_whole]

    def _read_report(self, outcome: Outcome) -> Outcome:
        """Take value or error from the report; one that is no report makes an `ok` an `error`."""
        data = bytes(self.output.whole("value"))
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


def note_of(
    request: ExecutionRequest, *, timeout_s: float | None, key: str | None, stays: bool = False, followed: bool = False
) -> Note:
    """Return what is to be known of a request when this process is gone."""
    return Note(
        stays=stays or request.background,
        followed=followed,
        background=request.background,
        stdin_open=request.stdin_open,
        language=request.language if request.command is None else "shell",
        timeout_s=timeout_s,
        key=key,
        digest=None if key is None else hashlib.sha256(msgspec.json.encode(request)).hexdigest(),
        context_id=request.context_id,
        installs=isinstance(request, Installation),
    )


def job_of(
    request: ExecutionRequest, *, timeout_s: float | None, env: dict[str, str], context: dict[str, Any]
) -> dict[str, Any]:
    """Return the job that the agent gets; what a field's default says is left out."""
    if request.context_id is not None:
        return cells.job_of(request, timeout_s=timeout_s, env=env)
    job: dict[str, Any] = {"timeout_s": timeout_s, "env": env | request.env}
    if isinstance(request.command, list):
        job["argv"] = [*request.command, *request.args]
    elif request.command is not None:
        job |= {"language": "shell", "code": request.command, "args": request.args}
    else:
        job |= {"code": request.code, "handler": request.handler, "event": request.event, "args": request.args}
        job["context"] = context | request.context
        if request.language != ExecutionRequest.language:
            job["language"] = request.language
    if request.stdin:
        job["stdin"] = request.stdin
    if request.stdin_open:
        job["stdin_open"] = True
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


def artifacts_of(lines: bytearray) -> list[Artifact]:
    """Return what the agent named as artifacts; ContainerLost when that makes no sense."""
    try:
        return [_described(line).artifact() for line in lines.splitlines()]
    except msgspec.DecodeError as error:
        raise ContainerLost(f"the agent told something impossible of a file: {error}") from None


def text_of(data: bytes | bytearray) -> tuple[str, bool]:
    """Return UTF-8 text, and whether every byte of it was."""
    try:
        return data.decode(), True
    except UnicodeDecodeError:
        return data.decode(errors="replace"), False
