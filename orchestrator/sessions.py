"""Sessions: each holds one container, runs its executions, and ends once."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext

import msgspec
import structlog

from orchestrator import bundle, cells, models, traces
from orchestrator.admission import Admission
from orchestrator.container import Container
from orchestrator.egress.border import Border
from orchestrator.egress.outlet import Outlet
from orchestrator.egress.policy import Policy
from orchestrator.errors import (
    ExecutionNotFound,
    InvalidRequest,
    KeyReused,
    SessionEnded,
    SessionExists,
    SessionNotFound,
    Unavailable,
    UnknownTemplate,
)
from orchestrator.executions import Note, Record, job_of, lambda_context, note_of
from orchestrator.files import Workspace
from orchestrator.frames import Hello
from orchestrator.languages import check
from orchestrator.metrics import Metrics
from orchestrator.models import EndReason, ExecutionRequest, OneShotRequest, SessionPatch, SessionRequest, Source
from orchestrator.pool import Pool
from orchestrator.session import Kept, Session, new
from orchestrator.settings import Settings

log = structlog.get_logger()
ENDED = 1024  # ended sessions whose reason is remembered
CANCEL_S = 5.0


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
        self.admission = Admission(settings, metrics)
        self.border = Border(settings, metrics)
        self._settings = settings
        self._pools = pools
        self._default = next(iter(pools))
        self._metrics = metrics
        self._discard = discard
        self._opening: dict[str, asyncio.Event] = {}
        self._ended: OrderedDict[str, EndReason] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()  # those of the tasks that nobody waits for
        self.one_shots: set[str] = set()
        self.keeping = False

    # --- life

    async def create(self, request: SessionRequest) -> Session:
        """Start a session. SessionExists, UnknownTemplate, TooManyRequests or Unavailable when it cannot be."""
        sid = request.id or f"s{secrets.token_hex(10)}"
        if sid in self.held or sid in self._opening:
            raise SessionExists(f"There is a session {sid} already: choose another id, or end it first")
        life = {
            "expires_in_s": self.admission.ttl_s(request.ttl_s),
            "idle_timeout_s": request.idle_timeout_s or self._settings.idle_timeout_seconds,
        }
        policy = self._policy(request.network, self._pool(request.template))
        opened = self._opening[sid] = asyncio.Event()
        try:
            container, source = await self._acquire(request.template)
            outlet = Outlet(self.border, container, sid, policy)
            session = new(sid, container, request, source, outlet, limit=self._settings.session_executions, **life)
            try:
                await container.bind(sid, session.kept())
            except BaseException:  # cancelled as well: no container is left behind
                self._discard(container, "bind_failed")
                raise
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
        """Extend a session, or replace its metadata or network."""
        session = self.get(sid)
        session.container.require()
        pool = self._pools[session.container.template]
        policy = None if patch.network is None else self._policy(patch.network, pool)
        now = time.monotonic()
        if patch.ttl_s is not None:
            session.expires = now + self.admission.ttl_s(patch.ttl_s)
        if patch.idle_timeout_s is not None:
            session.idle_timeout_s = patch.idle_timeout_s
        if patch.metadata is not None:
            session.metadata = patch.metadata
        if policy is not None:
            session.outlet.change(policy)
        session.used = now
        session.container.keep(sid, session.kept())
        return session

    def adopt(self, container: Container, hello: Hello) -> bool:
        """Take over the session of a container that an earlier orchestrator started; False when it has none."""
        if hello.session is None or hello.kept is None or hello.session in self.held:
            return False
        try:
            kept = msgspec.convert(hello.kept, Kept)
            notes = {known.id: msgspec.convert(known.note, Note) for known in hello.executions}
        except msgspec.ValidationError:  # kept by an orchestrator of another version
            return False
        limit = self._settings.session_executions
        policy = self.border.adopt(kept.network, given=self._pools[container.template].recipe.template.network)
        outlet = Outlet(self.border, container, hello.session, policy)
        session = Session(hello.session, container, kept, outlet, limit=limit, told_ago_s=hello.kept_age_s)
        self.held[session.id] = session
        for known in hello.executions:
            record = Record(known.id, session.id, notes[known.id], age_s=known.age_s)
            self._begin(session, record, self._resume(session, record, done=known.done))
        log.info("session_adopted", session=session.id, template=container.template, executions=len(hello.executions))
        return True

    def end(self, session: Session, reason: EndReason) -> None:
        """End a session; its container is destroyed. A session that has ended already is left alone."""
        if self.held.pop(session.id, None) is None:
            return
        self._ended[session.id] = reason
        if len(self._ended) > ENDED:
            self._ended.popitem(last=False)
        self._metrics.sessions_ended.labels(session.container.template, reason).inc()
        session.outlet.close()
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

    async def bring(self, sid: str, files: Mapping[str, str | models.Encoded]) -> None:
        """Write the files that come with an execution into the workspace."""
        if files:
            session = self.get(sid)
            with session.in_use() as workspace:
                await bundle.bring(workspace, files, limit=self._pools[session.container.template].workspace_bytes)

    def start(
        self,
        sid: str,
        request: ExecutionRequest,
        *,
        key: str | None = None,
        stays: bool = False,
        followed: bool = False,
    ) -> Record:
        """Begin an execution; one that `stays` goes on when nobody waits for it, of one `followed` the events are read.

        With a `key` that the session knows, nothing begins: the execution that had it first is the answer.
        """
        session = self.get(sid)
        timeout_s = self.admission.timeout_s(request)
        note = note_of(request, timeout_s=timeout_s, key=key, stays=stays, followed=followed)
        check(request, session.container.languages, template=session.container.template)
        if key is not None and (eid := session.keys.get(key)) is not None:
            record = session.records[eid]
            if record.note.digest != note.digest:
                raise KeyReused(f"The Idempotency-Key {key} was used for another request: choose a new one")
            return record
        session.container.require()
        if request.context_id is not None:
            session.container.contexts.living(request.context_id)
        if note.background:
            self.admission.background(in_session=session.background)
        else:
            in_session = len(session.running) - session.background
            self.admission.execution(in_session=in_session, in_flight=self.in_flight - len(self._background))
        record = Record(f"e{secrets.token_hex(10)}", sid, note)
        self._begin(session, record, self._run(session, record, request))
        return record

    async def execute(self, sid: str, request: ExecutionRequest, *, key: str | None = None) -> models.Execution:
        """Run an execution to its end. Who stops waiting cancels it, unless it has a key to ask again with."""
        record = self.start(sid, request, key=key)
        await self.ended(record)
        return record.facts

    async def ended(self, record: Record, timeout_s: float | None = None) -> bool:
        """Wait for an execution to end; return whether it has. Who stops waiting cancels it, unless it goes on without.

        Unavailable when it is left to the next orchestrator.
        """
        session = self.held.get(record.facts.session_id)
        task = None if session is None else session.running.get(record.id)
        if task is None:
            return True
        try:
            await asyncio.wait({task}, timeout=timeout_s)
        except asyncio.CancelledError:
            self.leave(record)
            raise
        if not task.done():
            return False
        if task.cancelled():
            raise Unavailable("The service is ending, its sessions go on: ask again", retry_after_s=5)
        task.result()
        return True

    def leave(self, record: Record) -> None:
        """Cancel an execution whose client went away, unless it goes on without."""
        session = self.held.get(record.facts.session_id)
        if session is not None and record.id in session.running and not (record.goes_on or self.keeping):
            self._cancel(session, record)

    async def execute_once(self, request: OneShotRequest) -> models.Execution:
        """Run one execution in a fresh container that is destroyed afterwards."""
        if request.background or request.stdin_open:
            raise InvalidRequest("`background` and `stdin_open` are for executions in a session")
        if request.context_id is not None:
            raise InvalidRequest("A context belongs to a session: leave out `context_id`")
        timeout_s = self.admission.timeout_s(request)
        pool = self._pool(request.template)
        if pool.languages is not None:  # else the container tells, once there is one
            check(request, pool.languages, template=pool.recipe.template.name)
        self.admission.execution(in_session=0, in_flight=self.in_flight - len(self._background))
        policy = self._policy(request.network, pool)
        name = f"once-{secrets.token_hex(8)}"
        self.one_shots.add(name)
        try:
            container, _ = await self._acquire(request.template)
            outlet = Outlet(self.border, container, name, policy)
            try:
                check(request, container.languages, template=container.template)
                await container.bind(name, {})
                record = Record(f"e{secrets.token_hex(10)}", name, note_of(request, timeout_s=timeout_s, key=None))
                workspace = Workspace(container)
                limit = self._pools[container.template].workspace_bytes
                await bundle.bring(workspace, request.files, limit=limit)
                await self._execute(record, container, request, outlet.environment)
                if record.facts.artifacts:
                    record.facts.artifacts = await bundle.take(workspace, record.facts.artifacts)
            finally:
                outlet.close()
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

    def cancel_waiting(self, session: Session, cid: str) -> None:
        """Cancel the cells that wait for their turn in a context."""
        for eid in session.running:
            if (record := session.records[eid]).note.context_id == cid and not record.sent:
                self._cancel(session, record)

    def cancel(self, sid: str, eid: str) -> None:
        """Kill an execution; one that has ended is left alone."""
        self._cancel(self.get(sid), self.execution(sid, eid))

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new and let what runs finish for a while.

        Then cancel the rest and end all sessions; or, to keep them, let them go on in their containers.
        """
        self.admission.draining = True
        self.keeping = self._settings.on_exit == "keep"
        if waited_for := self._tasks - self._background:
            await asyncio.wait(waited_for, timeout=timeout_s)
        if self.keeping:
            await self._leave()
            return
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

    def _begin(self, session: Session, record: Record, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        def finish(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._background.discard(task)
            record.left = record.facts.outcome is None
            if not task.cancelled():  # else it goes on, and the session with it
                session.finish(record)
            record.tell()

        task = asyncio.create_task(work)
        session.add(record, task)
        self._tasks.add(task)
        if record.note.background:
            self._background.add(task)
        task.add_done_callback(finish)
        return task

    async def _leave(self) -> None:
        """Let go of what runs, for the next orchestrator; nobody listens to the containers from here on."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        for session in self.held.values():
            session.outlet.close()
            session.container.close("the service ended")
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, session: Session, record: Record, request: ExecutionRequest) -> None:
        async with self._turn(session, record) as refusal:
            if refusal is not None and record.facts.outcome is None:
                record.refuse(refusal)
            waits = record.facts.outcome is None and not record.note.background
            has_turn = waits and await session.turns.wait(record.id)
            try:
                session.used = time.monotonic()
                if record.facts.outcome is None:
                    await self._execute(record, session.container, request, session.env)
                else:  # cancelled while it queued, or refused by its context
                    record.duration_s = time.monotonic() - record.begun
                    self._account(record, session.container.template)
            finally:
                if has_turn:
                    session.turns.give_back()

    async def _resume(self, session: Session, record: Record, *, done: bool) -> None:
        # It had its turn before: it counts while it runs, and never waits.
        has_turn = not done and not record.note.background and session.turns.take()
        try:
            async with nullcontext() if done else self._turn(session, record, begun=True):
                await record.resume(session.container, grace_s=self._grace_s(record))
            self._account(record, session.container.template)
        finally:
            if has_turn:
                session.turns.give_back()

    @staticmethod
    def _turn(session: Session, record: Record, *, begun: bool = False) -> AbstractAsyncContextManager[str | None]:
        """Wait for the turn of an execution in its context, if it has one; tell why it cannot run there."""
        cid = record.note.context_id
        return nullcontext() if cid is None else session.container.contexts.turn(cid, record.id, begun=begun)

    def _grace_s(self, record: Record) -> float:
        """Return how long after its timeout an execution may still have no result."""
        return self._settings.grace_seconds + (0.0 if record.note.context_id is None else cells.GRACE_S)

    async def _execute(
        self, record: Record, container: Container, request: ExecutionRequest, env: dict[str, str]
    ) -> None:
        facts = record.facts
        memory_kb = self._pools[container.template].recipe.template.memory_kb
        context = lambda_context(facts.id, facts.session_id, memory_kb=memory_kb)
        if request.context_id is not None:
            container.contexts.count(request.context_id)
        try:
            with traces.execution(facts) as place:
                job = job_of(request, timeout_s=record.note.timeout_s, env=place | env, context=context)
                await record.run(container, job, grace_s=self._grace_s(record))
        finally:
            if facts.outcome is not None or not self.keeping:  # else it goes on
                self._account(record, container.template)

    def _account(self, record: Record, template: str) -> None:
        facts = record.facts
        outcome = facts.outcome or "cancelled"
        code_s = facts.usage.wall_s if facts.usage is not None else record.duration_s
        self._metrics.execution_duration.labels(template, facts.language, outcome).observe(record.duration_s)
        self._metrics.execution_overhead.labels(template).observe(max(0.0, record.duration_s - code_s))
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
        elif record.facts.outcome is None:  # it queues, and need not any more
            record.facts.outcome = "cancelled"
            session.turns.call_off(record.id)
            if record.note.context_id is not None:
                session.container.contexts.call_off(record.note.context_id, record.id)

    def _pool(self, template: str | None) -> Pool:
        pool = self._pools.get(template or self._default)
        if pool is None:
            names = ", ".join(self._pools)
            raise UnknownTemplate(f"There is no template {template}: use one of {names}")
        return pool

    def _policy(self, network: models.Network | None, pool: Pool) -> Policy:
        return self.border.policy(network, given=pool.recipe.template.network)

    async def _acquire(self, template: str | None) -> tuple[Container, Source]:
        pool = self._pool(template)
        taken = len(self.held) + len(self._opening) + len(self.one_shots)  # the one that asks included
        self.admission.session(taken=taken, waiting=sum(len(pool.waiting) for pool in self._pools.values()))
        begun = time.monotonic()
        with traces.span("acquire", template=pool.recipe.template.name):
            container, source = await pool.acquire(self._settings.acquire_timeout_seconds)
        self._metrics.acquire.labels(container.template, source).observe(time.monotonic() - begun)
        count = self._metrics.pool_hits if source == "warm" else self._metrics.pool_misses
        count.labels(container.template).inc()
        return container, source
