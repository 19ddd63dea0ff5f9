"""Sessions: each holds one container, runs its executions, and ends once."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog

from orchestrator import models
from orchestrator.container import Container
from orchestrator.errors import (
    ExecutionNotFound,
    InvalidRequest,
    SessionEnded,
    SessionExists,
    SessionNotFound,
    TimeoutAboveCap,
    TooManyRequests,
    Unavailable,
    UnknownTemplate,
)
from orchestrator.executions import Record, job_of, lambda_context
from orchestrator.metrics import Metrics
from orchestrator.models import EndReason, ExecutionRequest, OneShotRequest, SessionPatch, SessionRequest, Source
from orchestrator.pool import Pool
from orchestrator.settings import Settings

log = structlog.get_logger()
HISTORY = 64  # finished executions that a session remembers
ENDED = 1024  # ended sessions whose reason is remembered
QUEUE_FACTOR = 16  # executions that may queue in a session, for each that may run at once
CANCEL_S = 5.0


class Session:
    """A client's use of one container. Times are monotonic; `started` is for showing."""

    def __init__(self, request: SessionRequest, sid: str, container: Container, source: Source, limit: int) -> None:
        self.id = sid
        self.container = container
        self.source = source
        self.env = request.env
        self.metadata = request.metadata
        self.created = self.used = time.monotonic()
        self.expires = 0.0
        self.idle_timeout_s = 0.0
        self.count = 0
        self.gate = asyncio.Semaphore(limit)
        self.records: OrderedDict[str, Record] = OrderedDict()
        self.running: dict[str, asyncio.Task[None]] = {}

    @property
    def due(self) -> float:
        """When it ends by itself, unless an execution runs."""
        return min(self.expires, self.used + self.idle_timeout_s)

    def overdue(self, now: float) -> EndReason | None:
        """Why it is to end now, if it is. A running execution keeps it."""
        if self.running or now < self.due:
            return None
        return "expired" if now >= self.expires else "idle"

    def facts(self) -> models.Session:
        """Return what a client sees."""
        now, clock = time.monotonic(), datetime.now(UTC)
        return models.Session(
            id=self.id,
            template=self.container.template,
            created_at=clock - timedelta(seconds=now - self.created),
            last_used_at=clock - timedelta(seconds=now - self.used),
            expires_at=clock + timedelta(seconds=self.expires - now),
            idle_timeout_s=self.idle_timeout_s,
            executions=self.count,
            source=self.source,
            network="none",
            metadata=self.metadata,
            layers=self.container.layers,
        )


class Sessions:
    """All sessions by id. A session leaves the table in the step that ends it."""

    def __init__(
        self,
        settings: Settings,
        pools: dict[str, Pool],
        metrics: Metrics,
        discard: Callable[[Container, str], None],
    ) -> None:
        self.held: dict[str, Session] = {}
        self.draining = False
        self._settings = settings
        self._pools = pools
        self._default = next(iter(pools))
        self._metrics = metrics
        self._discard = discard
        self._opening: dict[str, asyncio.Event] = {}
        self._ended: OrderedDict[str, EndReason] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self.one_shots: set[str] = set()

    # --- life

    async def create(self, request: SessionRequest) -> Session:
        """Start a session. SessionExists, UnknownTemplate, TooManyRequests or Unavailable when it cannot be."""
        sid = request.id or f"s{secrets.token_hex(10)}"
        if sid in self.held or sid in self._opening:
            raise SessionExists(f"There is a session {sid} already: choose another id, or end it first")
        ttl_s = self._ttl(request.ttl_s)
        self._admit()
        opened = self._opening[sid] = asyncio.Event()
        try:
            container, source = await self._acquire(request.template)
            try:
                await container.bind(sid)
            except BaseException:
                self._discard(container, "bind_failed")
                raise
            session = Session(request, sid, container, source, self._settings.session_executions)
            session.expires = session.created + ttl_s
            session.idle_timeout_s = request.idle_timeout_s or self._settings.idle_timeout_seconds
            self.held[sid] = session
        finally:
            del self._opening[sid]
            opened.set()
        self._ended.pop(sid, None)
        log.info("session_started", session=sid, template=container.template, source=source)
        return session

    async def settled(self, sid: str) -> None:
        """Wait until a session of this id that just starts has started, or failed to."""
        if (opening := self._opening.get(sid)) is not None:
            await opening.wait()

    def get(self, sid: str) -> Session:
        """Return a session. SessionNotFound, or SessionEnded for one that did not end by the client's wish."""
        session = self.held.get(sid)
        if session is not None and (reason := session.overdue(time.monotonic())):
            self.end(session, reason)
            session = None
        if session is not None:
            return session
        ended = self._ended.get(sid)
        if ended in (None, "closed"):
            raise SessionNotFound(f"There is no session {sid}: start one first")
        raise SessionEnded(f"The session {sid} has ended ({ended}): start a new one")

    def patch(self, sid: str, patch: SessionPatch) -> Session:
        """Extend a session, or replace its metadata."""
        session = self.get(sid)
        now = time.monotonic()
        if patch.ttl_s is not None:
            session.expires = now + self._ttl(patch.ttl_s)
        if patch.idle_timeout_s is not None:
            session.idle_timeout_s = patch.idle_timeout_s
        if patch.metadata is not None:
            session.metadata = patch.metadata
        session.used = now
        return session

    def end(self, session: Session, reason: EndReason) -> None:
        """End a session; its container is destroyed. A session that has ended already is left alone."""
        if self.held.pop(session.id, None) is None:
            return
        self._ended[session.id] = reason
        if len(self._ended) > ENDED:
            self._ended.popitem(last=False)
        self._metrics.sessions_ended.labels(reason).inc()
        self._discard(session.container, "lost" if reason == "lost" else "ended")
        log.info(
            "session_ended",
            session=session.id,
            template=session.container.template,
            reason=reason,
            executions=session.count,
            lived_s=round(time.monotonic() - session.created, 3),
            detail=session.container.lost_reason,
        )

    # --- executions

    async def execute(self, sid: str, request: ExecutionRequest) -> models.Execution:
        """Run an execution to its end. Who stops waiting cancels it."""
        session = self.get(sid)
        timeout_s = self._check(request)
        queued = len(session.running)
        if queued >= self._settings.session_executions * (1 + QUEUE_FACTOR):
            raise self._refuse("session", "This session has too many executions waiting: wait for some to end")
        record = Record(f"e{secrets.token_hex(10)}", sid, request)
        session.records[record.id] = record
        session.count += 1
        task = asyncio.create_task(self._run(session, record, request, timeout_s))
        session.running[record.id] = task
        self._own(task)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._cancel(session, record)
            raise
        return record.facts

    async def execute_once(self, request: OneShotRequest) -> models.Execution:
        """Run one execution in a fresh container that is destroyed afterwards."""
        timeout_s = self._check(request)
        name = f"once-{secrets.token_hex(8)}"
        self.one_shots.add(name)
        try:
            container, _ = await self._acquire(request.template)
            try:
                await container.bind(name)
                record = Record(f"e{secrets.token_hex(10)}", name, request)
                await self._execute(record, container, request, timeout_s, {})
            finally:
                self._discard(container, "ended")
        finally:
            self.one_shots.discard(name)
        return record.facts

    def execution(self, sid: str, eid: str) -> Record:
        """Return an execution of a session. ExecutionNotFound for one that is unknown or forgotten."""
        record = self.get(sid).records.get(eid)
        if record is None:
            raise ExecutionNotFound(f"The session {sid} has no execution {eid}")
        return record

    def cancel(self, sid: str, eid: str) -> None:
        """Kill an execution; one that has ended is left alone."""
        self._cancel(self.get(sid), self.execution(sid, eid))

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new, let what runs finish for a while, cancel the rest, then end all sessions."""
        self.draining = True
        if tasks := list(self._tasks):
            await asyncio.wait(tasks, timeout=timeout_s)
        for session in self.held.values():
            for eid in session.running:
                self._cancel(session, session.records[eid])
        if tasks := list(self._tasks):
            await asyncio.wait(tasks, timeout=CANCEL_S)
        for session in list(self.held.values()):
            self.end(session, "drained")
        if tasks := list(self._tasks):
            await asyncio.wait(tasks, timeout=CANCEL_S)

    @property
    def in_flight(self) -> int:
        """How many executions run or queue."""
        return len(self._tasks) + len(self.one_shots)

    # --- parts

    async def _run(self, session: Session, record: Record, request: ExecutionRequest, timeout_s: float) -> None:
        try:
            async with session.gate:
                session.used = time.monotonic()
                if record.facts.outcome is None:
                    await self._execute(record, session.container, request, timeout_s, session.env)
                else:  # cancelled while it queued
                    record.duration_s = time.monotonic() - record.begun
                    self._account(record)
        finally:
            del session.running[record.id]
            session.used = time.monotonic()
            finished = [eid for eid in session.records if eid not in session.running]
            for eid in finished[:-HISTORY]:
                del session.records[eid]

    async def _execute(
        self, record: Record, container: Container, request: ExecutionRequest, timeout_s: float, env: dict[str, str]
    ) -> None:
        facts = record.facts
        memory_kb = self._pools[container.template].recipe.template.memory_kb
        context = lambda_context(facts.id, facts.session_id, memory_kb=memory_kb)
        job = job_of(request, timeout_s=timeout_s, env=env, context=context)
        try:
            await record.run(container, job, deadline_s=timeout_s + self._settings.grace_seconds)
        finally:
            self._account(record)

    def _account(self, record: Record) -> None:
        facts = record.facts
        outcome = facts.outcome or "cancelled"
        code_s = facts.usage.wall_s if facts.usage is not None else record.duration_s
        self._metrics.execution_duration.labels(facts.language, outcome).observe(record.duration_s)
        self._metrics.execution_overhead.observe(max(0.0, record.duration_s - code_s))
        log.info(
            "execution_done",
            session=facts.session_id,
            execution=facts.id,
            language=facts.language,
            outcome=outcome,
            exit_code=facts.exit_code,
            duration_s=round(record.duration_s, 6),
            code_s=round(code_s, 6),
            stdout_chars=len(facts.stdout),
            stderr_chars=len(facts.stderr),
        )

    def _cancel(self, session: Session, record: Record) -> None:
        if record.sent:
            session.container.cancel(record.id)
        elif record.facts.outcome is None:  # it queues: its turn finds it cancelled
            record.facts.outcome = "cancelled"

    async def _acquire(self, template: str | None) -> tuple[Container, Source]:
        pool = self._pools.get(template or self._default)
        if pool is None:
            names = ", ".join(self._pools)
            raise UnknownTemplate(f"There is no template {template}: use one of {names}")
        taken = len(self.held) + len(self._opening) + len(self.one_shots)  # the one that asks included
        if taken > self._settings.max_containers:
            raise self._refuse("sessions", "All containers are in use: end a session, or try again later")
        if sum(len(pool.waiting) for pool in self._pools.values()) > self._settings.max_waiting:
            raise self._refuse("waiting", "Too many sessions wait for a container: try again later")
        begun = time.monotonic()
        container, source = await pool.acquire(self._settings.acquire_timeout_seconds)
        self._metrics.acquire.labels(source).observe(time.monotonic() - begun)
        count = self._metrics.pool_hits if source == "warm" else self._metrics.pool_misses
        count.labels(container.template).inc()
        return container, source

    def _check(self, request: ExecutionRequest) -> float:
        """Return the timeout of a request that makes sense; refuse one that does not."""
        if request.command is not None and (request.code is not None or request.handler is not None):
            raise InvalidRequest("Give `code` or `command`, not both")
        if request.command is None and request.code is None and "." not in (request.handler or ""):
            raise InvalidRequest("Give `code`, `command`, or a `handler` of the form module.function")
        if request.language == "shell" and request.command is None and request.code is None:
            raise InvalidRequest("Shell has no handlers: give `code` or `command`")
        timeout_s = request.timeout_s or self._settings.timeout_seconds
        if timeout_s > self._settings.max_timeout_seconds:
            raise TimeoutAboveCap(f"`timeout_s` is at most {self._settings.max_timeout_seconds:g}")
        self._admit()
        if self.in_flight >= self._settings.max_executions:
            raise self._refuse("executions", "Too many executions run: try again later")
        return timeout_s

    def _ttl(self, ttl_s: float | None) -> float:
        if ttl_s is not None and ttl_s > self._settings.max_ttl_seconds:
            raise TimeoutAboveCap(f"`ttl_s` is at most {self._settings.max_ttl_seconds:g}")
        return ttl_s or self._settings.ttl_seconds

    def _admit(self) -> None:
        if self.draining:
            raise Unavailable("The service is ending: use another one", retry_after_s=5)

    def _refuse(self, reason: str, detail: str) -> TooManyRequests:
        self._metrics.refusals.labels(reason).inc()
        return TooManyRequests(detail, retry_after_s=1)

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
