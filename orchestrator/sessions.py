"""Sessions: each holds one container, has executions, and ends once."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import closing

import msgspec
import structlog

from orchestrator import bundle, models, traces
from orchestrator.admission import Admission
from orchestrator.container import Container
from orchestrator.egress.border import Border
from orchestrator.egress.outlet import Outlet, owner_of
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
from orchestrator.executions import Note, Record, note_of
from orchestrator.files import Workspace
from orchestrator.frames import Hello
from orchestrator.languages import check
from orchestrator.metrics import Metrics
from orchestrator.models import EndReason, ExecutionRequest, OneShotRequest, SessionPatch, SessionRequest, Source
from orchestrator.pool import Pool
from orchestrator.session import Kept, Session, check_kept, new
from orchestrator.settings import Settings
from orchestrator.work import Work

log = structlog.get_logger()
ENDED = 1024  # ended sessions whose reason is remembered
CANCEL_S = 5.0


class Sessions:
    """All sessions by id. A session leaves the table in the step that ends it.

    `make_room` ends one that nobody would miss, if there is one, and tells whether there was.
    """

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
        self.work = Work(settings, pools, metrics)
        self.one_shots: set[str] = set()
        self.make_room: Callable[[], bool] = lambda: False

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
        check_kept(request.env, request.metadata, policy.shown())
        opened = self._opening[sid] = asyncio.Event()
        try:
            container, source = await self._acquire(request.template)
            try:
                outlet = Outlet(self.border, container, sid, policy)
                session = new(sid, container, request, source, outlet, limit=self._settings.session_executions, **life)
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
        metadata = session.metadata if patch.metadata is None else patch.metadata
        check_kept(session.own_env, metadata, (policy or session.outlet.policy).shown())
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
        given = self._pools[container.template].recipe.template.network
        owner = owner_of(container, hello.session)
        policy = self.border.adopt(kept.network, kept.network_seal, owner=owner, given=given)
        outlet = Outlet(self.border, container, hello.session, policy)
        session = Session(hello.session, container, kept, outlet, limit=limit, told_ago_s=hello.kept_age_s)
        self.held[session.id] = session
        for known in hello.executions:
            record = Record(known.id, session.id, notes[known.id], age_s=known.age_s)
            self.work.resume(session, record, done=known.done, queued=known.queued)
        log.info("session_adopted", session=session.id, template=container.template, executions=len(hello.executions))
        return True

    def end(self, session: Session, reason: EndReason) -> None:
        """End a session; its container is destroyed. A session that has ended already is left alone."""
        if self.held.get(session.id) is not session:  # its id may be another's by now
            return
        del self.held[session.id]
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
            self.admission.execution(in_session=in_session, in_flight=self.in_flight - self.work.unattended)
        record = Record(f"e{secrets.token_hex(10)}", sid, note)
        self.work.begin(session, record, request)
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
        if session is not None and record.id in session.running and not (record.goes_on or self.work.keeping):
            self.work.cancel(session, record)

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
        self.admission.execution(in_session=0, in_flight=self.in_flight - self.work.unattended)
        policy = self._policy(request.network, pool)
        name = f"once-{secrets.token_hex(8)}"
        self.one_shots.add(name)
        try:
            container, _ = await self._acquire(request.template)
            try:
                with closing(Outlet(self.border, container, name, policy)) as outlet:
                    check(request, container.languages, template=container.template)
                    await container.bind(name, {})
                    record = Record(f"e{secrets.token_hex(10)}", name, note_of(request, timeout_s=timeout_s, key=None))
                    workspace = Workspace(container)
                    limit = self._pools[container.template].workspace_bytes
                    await bundle.bring(workspace, request.files, limit=limit)
                    await self.work.execute(record, container, request, outlet.environment)
                    if record.facts.artifacts:
                        record.facts.artifacts = await bundle.take(workspace, record.facts.artifacts)
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

    def cancel_waiting(self, session: Session, cid: str) -> None:
        """Cancel the cells that wait for their turn in a context."""
        for eid in session.running:
            if (record := session.records[eid]).note.context_id == cid and not record.sent:
                self.work.cancel(session, record)

    def cancel(self, sid: str, eid: str) -> None:
        """Kill an execution; one that has ended is left alone."""
        self.work.cancel(self.get(sid), self.execution(sid, eid))

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new and let what runs finish for a while.

        Then cancel the rest and end all sessions; or, to keep them, let them go on in their containers.
        """
        self.admission.draining = True
        self.work.keeping = self._settings.on_exit == "keep"
        await self.work.settle(timeout_s, attended=True)
        if self.work.keeping:
            self.work.let_go()
            for session in self.held.values():
                session.outlet.close()
                session.container.close("the service ended")
            await self.work.settle(CANCEL_S)
            return
        for session in self.held.values():
            for eid in session.running:
                self.work.cancel(session, session.records[eid])
        await self.work.settle(CANCEL_S)
        for session in list(self.held.values()):
            self.end(session, "drained")
        await self.work.settle(CANCEL_S)

    @property
    def in_flight(self) -> int:
        """How many executions run or queue."""
        return len(self.work) + len(self.one_shots)

    # --- parts

    def _pool(self, template: str | None) -> Pool:
        pool = self._pools.get(template or self._default)
        if pool is None:
            names = ", ".join(self._pools)
            raise UnknownTemplate(f"There is no template {template}: use one of {names}")
        return pool

    def _policy(self, network: models.Network | None, pool: Pool) -> Policy:
        return self.border.policy(network, given=pool.recipe.template.network)

    @property
    def _taken(self) -> int:
        """How many containers are in use, or asked for."""
        return len(self.held) + len(self._opening) + len(self.one_shots)

    async def _acquire(self, template: str | None) -> tuple[Container, Source]:
        pool = self._pool(template)
        while self._taken > self._settings.max_containers and self.make_room():
            pass
        self.admission.session(taken=self._taken, waiting=sum(len(pool.waiting) for pool in self._pools.values()))
        begun = time.monotonic()
        with traces.span("acquire", template=pool.recipe.template.name):
            container, source = await pool.acquire(self._settings.acquire_timeout_seconds)
        self._metrics.acquire.labels(container.template, source).observe(time.monotonic() - begun)
        count = self._metrics.pool_hits if source == "warm" else self._metrics.pool_misses
        count.labels(container.template).inc()
        return container, source
