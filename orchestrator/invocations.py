"""Invocations of functions: in warm containers that serve one function, one invocation at a time."""

import asyncio
import secrets
from collections import Counter, deque
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
import structlog

from orchestrator.errors import FunctionThrottled, SandboxError, TooManyRequests, Unavailable
from orchestrator.executions import Record
from orchestrator.functions import Function, Functions
from orchestrator.metrics import Metrics
from orchestrator.models import Execution, ExecutionRequest
from orchestrator.sessions import Sessions
from orchestrator.warm import WarmSessions

log = structlog.get_logger()
TASK_ROOT = "/workspace"
EVENTS, EVENT_BYTES = 1000, 64 << 20  # events that wait, in number and in all
PAUSES_S = (1.0, 5.0, 25.0)  # before an event that found no container is tried again


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """An invocation that a client asks for; `arn` is the function's, as that client names it."""

    request_id: str
    event: Any
    event_bytes: int
    arn: str
    region: str


class Invoked(NamedTuple):
    """What became of an invocation; `init_s` is how long its container took, when it was not warm."""

    function: Function
    record: Record
    init_s: float | None

    @property
    def execution(self) -> Execution:
        """The execution that it was."""
        return self.record.facts


class Invocations:
    """Who runs, who waits for a turn. An invocation is a task of ours: it goes on when its client is gone."""

    def __init__(self, functions: Functions, sessions: Sessions, warm: WarmSessions, metrics: Metrics) -> None:
        self.warm = warm
        self._functions = functions
        self._sessions = sessions
        self._metrics = metrics
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[Call]] = {}
        self._waiting_bytes = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- functions

    async def deploy(self, function: Function, code: bytes, *, keep: bool = True) -> None:
        """Unpack the code where it is to run, then `keep` the function. InvalidCode when it cannot be unpacked.

        The caller holds the function by `Functions.change`.
        """
        warm = await self.warm.prepare(function, code)
        try:
            if keep:
                await self._functions.put(function, code)
        finally:
            self.warm.give_back(warm)
        self.refresh(function.name)

    def refresh(self, name: str) -> None:
        """Let go of what an earlier revision of the function left; begin what waits and now may."""
        self.warm.refresh(name)
        self._pump()

    # --- invocations

    async def invoke(self, name: str, call: Call) -> Invoked:
        """Run the function to its end, also when nobody waits for it any more. FunctionThrottled at the limit."""
        return await asyncio.shield(self._begin(self._functions.get(name), call))

    def enqueue(self, name: str, call: Call) -> None:
        """Run the function when its turn comes. TooManyRequests when too much waits already."""
        self._functions.get(name)
        self._sessions.admission.open()
        if self.events >= EVENTS or self._waiting_bytes + call.event_bytes > EVENT_BYTES:
            raise TooManyRequests("Too many events wait: send fewer, or later", retry_after_s=5)
        self._waiting.setdefault(name, deque()).append(call)
        self._waiting_bytes += call.event_bytes
        self._pump()

    async def close(self) -> None:
        """Forget what waits, and end what runs. After the drain, so that nothing new comes of it."""
        if self.events:
            log.warning("events_dropped", events=self.events, detail="the service ended")
        self._waiting.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.warm.end_all()

    @property
    def events(self) -> int:
        """How many events wait."""
        return sum(map(len, self._waiting.values()))

    # --- turns

    def _refusal(self, function: Function) -> FunctionThrottled | None:
        """Return why the function may not run now. What is reserved for one function is taken from all others."""
        if function.reserved is not None:
            if self._running[function.name] < function.reserved:
                return None
            return FunctionThrottled("Rate Exceeded.", is_reserved=True)
        reserving = {name: other.reserved for name, other in self._functions.held.items() if other.reserved is not None}
        running = sum(count for name, count in self._running.items() if name not in reserving)
        return None if running < self.warm.limit - sum(reserving.values()) else FunctionThrottled("Rate Exceeded.")

    def _begin(self, function: Function, call: Call, *, is_event: bool = False) -> asyncio.Task[Invoked]:
        self._sessions.admission.open()
        if (refusal := self._refusal(function)) is not None:
            self._metrics.refusals.labels("functions").inc()
            raise refusal
        self._running[function.name] += 1
        work = self._serve_event(function.name, call) if is_event else self._serve(function.name, call)
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def finish(task: asyncio.Task[Invoked]) -> None:
            self._tasks.discard(task)
            self._running[function.name] -= 1
            if not task.cancelled():
                task.exception()  # whoever waits gets it; it is no fault that nobody does
            self._pump()

        task.add_done_callback(finish)
        return task

    def _pump(self) -> None:
        """Begin what waits, as far as it may run."""
        if self._sessions.admission.draining:
            return
        for name, calls in list(self._waiting.items()):
            function = self._functions.held.get(name)
            while calls and (function is None or self._refusal(function) is None):
                call = calls.popleft()
                self._waiting_bytes -= call.event_bytes
                if function is None:
                    log.warning("event_dropped", function=name, request_id=call.request_id, detail="it was deleted")
                else:
                    self._begin(function, call, is_event=True)
            if not calls:
                del self._waiting[name]

    async def _serve_event(self, name: str, call: Call) -> Invoked:
        for pause_s in (*PAUSES_S, None):
            try:
                return await self._serve(name, call)
            except SandboxError as error:
                if pause_s is None or not isinstance(error, TooManyRequests | Unavailable):
                    log.warning("event_dropped", function=name, request_id=call.request_id, detail=error.detail)
                    raise
                await asyncio.sleep(pause_s)
        raise AssertionError  # the last pause is None

    async def _serve(self, name: str, call: Call) -> Invoked:
        function, warm, init_s = await self.warm.take(name)
        try:
            records = self._sessions.get(warm.sid).records
            execution = await self._sessions.execute(warm.sid, request_of(function, call))
        finally:
            self.warm.give_back(warm)
        self._metrics.function_invocations.labels(execution.outcome or "lost").inc()
        log.info("function_invoked", function=name, request_id=call.request_id, outcome=execution.outcome)
        return Invoked(function, records[execution.id], init_s)


def request_of(function: Function, call: Call) -> ExecutionRequest:
    """Return the execution that an invocation is."""
    group, stream = f"/aws/lambda/{function.name}", f"{datetime.now(UTC):%Y/%m/%d}/[$LATEST]{secrets.token_hex(16)}"
    facts = {
        "aws_request_id": call.request_id,
        "function_name": function.name,
        "function_version": "$LATEST",
        "memory_limit_in_mb": str(function.memory_mb),
        "invoked_function_arn": call.arn,
        "log_group_name": group,
        "log_stream_name": stream,
    }
    env = {
        "AWS_REGION": call.region,
        "AWS_DEFAULT_REGION": call.region,
        "AWS_EXECUTION_ENV": f"AWS_Lambda_{function.runtime}",
        "AWS_LAMBDA_FUNCTION_NAME": function.name,
        "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(function.memory_mb),
        "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
        "AWS_LAMBDA_LOG_GROUP_NAME": group,
        "AWS_LAMBDA_LOG_STREAM_NAME": stream,
        "LAMBDA_TASK_ROOT": TASK_ROOT,
        "_HANDLER": function.handler,
    }
    return ExecutionRequest(
        language=function.language,
        handler=function.handler.replace("/", "."),
        event=call.event,
        context=facts,
        env=function.env | env,
        timeout_s=float(function.timeout_s),
    )
