"""Work: the executions that run or queue, of all sessions, each as a task from its begin to its account."""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import structlog

from orchestrator import cells, traces
from orchestrator.container import Container
from orchestrator.executions import Record, job_of, lambda_context
from orchestrator.metrics import Metrics
from orchestrator.models import ExecutionRequest
from orchestrator.pool import Pool
from orchestrator.session import Session
from orchestrator.settings import Settings

log = structlog.get_logger()


class Work:
    """The tasks of executions. With `keeping`, those that are let go of go on in their containers."""

    def __init__(self, settings: Settings, pools: dict[str, Pool], metrics: Metrics) -> None:
        self.keeping = False
        self._settings = settings
        self._pools = pools
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()  # those of the tasks that nobody waits for

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def unattended(self) -> int:
        """How many run in the background."""
        return len(self._background)

    def begin(self, session: Session, record: Record, request: ExecutionRequest) -> None:
        """Run an execution in its turn."""
        self._begin(session, record, self._run(session, record, request))

    def resume(self, session: Session, record: Record, *, done: bool, queued: bool) -> None:
        """Follow an execution that an earlier orchestrator began, or `queued`; `done` tells whether it has ended since."""
        work = self._run(session, record, None) if queued else self._resume(session, record, done=done)
        self._begin(session, record, work)

    def cancel(self, session: Session, record: Record) -> None:
        """Kill an execution; one that has ended is left alone."""
        if record.sent:
            session.container.cancel(record.id)
        elif record.facts.outcome is None:  # it queues, and need not any more
            record.facts.outcome = "cancelled"
            session.turns.call_off(record.id)
            session.installs.call_off(record.id)
            if record.note.context_id is not None:
                session.container.contexts.call_off(record.note.context_id, record.id)

    async def settle(self, timeout_s: float, *, attended: bool = False) -> None:
        """Wait until all have ended, or only those that are `attended`; not longer than the timeout."""
        if tasks := self._tasks - self._background if attended else set(self._tasks):
            await asyncio.wait(tasks, timeout=timeout_s)

    def let_go(self) -> None:
        """Leave what runs to the next orchestrator."""
        for task in list(self._tasks):
            task.cancel()

    async def execute(
        self, record: Record, container: Container, request: ExecutionRequest | None, env: dict[str, str]
    ) -> None:
        """Hand an execution to a container, follow it to its end, account for it.

        Without a request it is one that an earlier orchestrator queued.
        """
        facts = record.facts
        if record.note.context_id is not None:
            container.contexts.count(record.note.context_id)
        try:
            with traces.execution(facts) as place:
                job = None if request is None else self._job(record, container, request, place | env)
                await record.run(container, job, grace_s=self._grace_s(record))
        finally:
            if facts.outcome is not None or not self.keeping:  # else it goes on
                self._account(record, container.template)

    def _begin(self, session: Session, record: Record, work: Coroutine[None, None, None]) -> None:
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

    def _job(
        self, record: Record, container: Container, request: ExecutionRequest, env: dict[str, str]
    ) -> dict[str, Any]:
        memory_kb = self._pools[container.template].recipe.template.memory_kb
        context = lambda_context(record.id, record.facts.session_id, memory_kb=memory_kb)
        return job_of(request, timeout_s=record.note.timeout_s, env=env, context=context)

    async def _run(self, session: Session, record: Record, request: ExecutionRequest | None) -> None:
        if request is not None and record.is_held and session.is_busy(record.note):
            record.queue(session.container, self._job(record, session.container, request, session.env))
        async with self._turn(session, record) as refusal:
            if refusal is not None and record.facts.outcome is None:
                record.refuse(refusal)
            waits = record.facts.outcome is None and not record.note.background
            has_turn = waits and await session.turns.wait(record.id)
            try:
                session.used = time.monotonic()
                if record.facts.outcome is None:
                    await self.execute(record, session.container, request, session.env)
                else:  # cancelled while it queued, or refused by its context
                    session.container.call_off(record.id)
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
        """Wait for the turn of an execution in its context, if it has one; tell why it cannot run there.

        An installation waits for its turn among those.
        """
        if record.note.installs:
            return session.installs.turn(record.id, begun=begun)
        cid = record.note.context_id
        return nullcontext() if cid is None else session.container.contexts.turn(cid, record.id, begun=begun)

    def _grace_s(self, record: Record) -> float:
        """Return how long after its timeout an execution may still have no result."""
        return self._settings.grace_seconds + (0.0 if record.note.context_id is None else cells.GRACE_S)

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
